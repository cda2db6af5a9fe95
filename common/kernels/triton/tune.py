"""`python -m common.kernels.triton.tune`: measure the expert kernels' tiles on this GPU and write the config of one expert shape.

    python -m common.kernels.triton.tune --experts 128 --top-k 8 --hidden 2048 --width 768 [--fp8]

`--width` is that of the part of an expert that one rank has, `--experts` how many it has. Times CUDA graphs of several routings
over random weights, random inputs and uniform routing, in turn; the fastest tile of each kernel and token count is kept. Tiles are
compiled by many processes first.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from os import cpu_count
from statistics import median
from typing import NamedTuple

import msgspec
import torch

from common.kernels.interface import FP8_BLOCK, ExpertMatrices
from common.kernels.triton import experts, grouped_experts, grouped_fp8, single_experts
from common.kernels.triton.routing import Routing, route
from common.kernels.triton.tuning import ExpertShape, Tile, Tiles, Tuned, config_path

_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_KERNELS = ("gate_up", "down", "grouped_gate_up", "grouped_down")
_MOST_SINGLE = 8  # with more, tokens share experts, and reading one twice costs more than it gains
_LEAST_GROUPED = 64  # with fewer, hardly two tokens share an expert
_ROUTINGS = 4
_SHARED_BYTES = 200_000
_TIMINGS = 5

Timed = tuple[float, Tile]
"""A tile, after the microseconds that it takes."""


def main(argv: list[str]) -> int:
    """Tune and write; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m common.kernels.triton.tune", description=(__doc__ or "").split("\n")[0]
    )
    for name in ("experts", "top-k", "hidden", "width"):
        parser.add_argument("--" + name, type=int, required=True)
    parser.add_argument("--fp8", action="store_true", help="weights of float8 with block scales, not bf16")
    shape = ExpertShape(**vars(parser.parse_args(argv)))
    if not torch.cuda.is_available():
        parser.error("there is no usable GPU on this machine")
    jobs = [(shape, which, tile) for which in _KERNELS for tile in _candidates(shape, which, _TOKENS)]
    with ProcessPoolExecutor(min(16, cpu_count() or 1), mp_context=get_context("spawn")) as executor:
        are_good = executor.map(_compile, jobs, chunksize=8)
        compiled = {(which, tile) for (_, which, tile), is_good in zip(jobs, are_good, strict=True) if is_good}
    tuner = _Tuner(shape, compiled)
    single_tokens = few_tokens = 0
    tiles: list[Tiles] = []
    grouped: list[Tiles] = []
    for num_tokens in _TOKENS:
        cases = [tuner.weights.case(num_tokens) for _ in range(_ROUTINGS)]
        touched = sum(int((case.routing.counts_E > 0).sum()) for case in cases) / len(cases)
        print(f"{num_tokens} tokens, {touched:.0f} experts touched", flush=True)
        single = tuner.time("one by one", cases, _Weights.run_single)
        few = tuner.best_pair("", cases)
        many_tiles = tuner.best_pair("grouped_", cases) if shape.fp8 and num_tokens >= _LEAST_GROUPED else None
        many = tuner.time("grouped, all", cases, partial(_Weights.run_many, tiles=many_tiles and many_tiles[1]))
        if single < few[0] and num_tokens <= _MOST_SINGLE:
            single_tokens = num_tokens
        if few[0] < many:
            few_tokens = num_tokens
            tiles.append(few[1])
        if many_tiles:
            grouped.append(many_tiles[1])
    tuned = Tuned(
        command=f"python -m common.kernels.triton.tune {' '.join(argv)}",
        hardware=f"{torch.cuda.get_device_name()}, torch {torch.__version__}",
        single_tokens=single_tokens,
        few_tokens=few_tokens,
        tiles=tiles,
        grouped=[each for each in grouped if each.tokens > few_tokens] or grouped[-1:],
    )
    path = config_path(shape)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(tuned)) + b"\n")
    print(f"written to {path}")
    return 0


class _Case(NamedTuple):
    hidden: torch.Tensor
    routing: Routing
    inner: torch.Tensor


class _Weights:
    """One layer's experts, and steps with uniform routing."""

    def __init__(self, shape: ExpertShape) -> None:
        self.shape = shape
        self.gate_up = _random_experts(shape.experts, 2 * shape.width, shape.hidden, fp8=shape.fp8)
        self.down = _random_experts(shape.experts, shape.hidden, shape.width, fp8=shape.fp8)

    def case(self, num_tokens: int) -> _Case:
        """A step of `num_tokens` tokens."""
        shape = self.shape
        ids_TK = torch.empty((num_tokens, shape.top_k), dtype=torch.int32, device="cuda")
        counts_E = torch.zeros(shape.experts, dtype=torch.int32, device="cuda")
        routing = route(_random(num_tokens, shape.experts), ids_TK, counts_E, norm_topk_prob=True)
        return _Case(_random(num_tokens, shape.hidden), routing, _random(num_tokens * shape.top_k, shape.width))

    def run(self, case: _Case, *, which: str, tile: Tile) -> None:
        """Launch one kernel; of the grouped ones, with what makes their input, which is the same for all tiles."""
        match which:
            case "gate_up":
                experts.gate_up(case.hidden, case.routing, self.gate_up, tile)
            case "down":
                experts.down(case.inner, case.routing, self.down, tile)
            case "grouped_gate_up":
                order = grouped_fp8.make_order(case.routing, tile.m)
                x = grouped_fp8.scatter(case.hidden, case.routing, order)
                grouped_fp8.gate_up(x, order, self.gate_up, tile, case.hidden.dtype)
            case _:
                order = grouped_fp8.make_order(case.routing, tile.m)
                inner = grouped_fp8.empty(len(case.inner), self.shape.width, case.inner.device)
                grouped_fp8.down(inner, order, self.down, tile, case.hidden.dtype)

    def run_single(self, case: _Case) -> None:
        """Launch all of the way for a token or two."""
        single_experts.single_tokens(case.hidden, case.routing, self.gate_up, self.down)

    def run_many(self, case: _Case, *, tiles: Tiles | None) -> None:
        """Launch all of the way for many tokens."""
        if tiles is not None:
            grouped_fp8.in_tiles(case.hidden, case.routing, self.gate_up, self.down, tiles)
        elif self.shape.fp8:
            grouped_fp8.many_tokens(case.hidden, case.routing, self.gate_up, self.down)
        else:
            grouped_experts.many_tokens(case.hidden, case.routing, self.gate_up, self.down)


class _Tuner:
    """Times tiles, and prints what it finds."""

    def __init__(self, shape: ExpertShape, compiled: set[tuple[str, Tile]]) -> None:
        self.weights, self._compiled = _Weights(shape), compiled

    def time(self, what: str, cases: list[_Case], run: Callable[..., object]) -> float:
        """Microseconds of one run."""
        microseconds = _time([partial(run, self.weights, case) for case in cases])
        print(f"    {what}: {microseconds:.1f} us", flush=True)
        return microseconds

    def best_pair(self, prefix: str, cases: list[_Case]) -> tuple[float, Tiles]:
        """The fastest tiles for both products, and the microseconds of both; grouped ones have the same `m`."""
        gate_up, down = (self._times(prefix + which, cases) for which in ("gate_up", "down"))
        if prefix:
            pairs = [
                (min(t for t in gate_up if t[1].m == m), min(t for t in down if t[1].m == m))
                for m in {tile.m for _, tile in gate_up} & {tile.m for _, tile in down}
            ]
            best = min(pairs, key=lambda pair: pair[0][0] + pair[1][0])
        else:
            best = min(gate_up), min(down)
        for which, (microseconds, tile) in zip(("gate_up", "down"), best, strict=True):
            print(f"    {prefix}{which}: {microseconds:.1f} us, {tile}", flush=True)
        (first, gate_up_tile), (second, down_tile) = best
        return first + second, Tiles(tokens=len(cases[0].hidden), gate_up=gate_up_tile, down=down_tile)

    def _times(self, which: str, cases: list[_Case]) -> list[Timed]:
        tiles = _candidates(self.weights.shape, which, [len(cases[0].hidden)])
        return [
            (_time([partial(self.weights.run, case, which=which, tile=tile) for case in cases]), tile)
            for tile in tiles
            if (which, tile) in self._compiled
        ]


def _random(*sizes: int) -> torch.Tensor:
    return torch.randn(sizes, dtype=torch.bfloat16, device="cuda").div_(sizes[-1] ** 0.5)


def _random_experts(*sizes: int, fp8: bool) -> ExpertMatrices:
    if not fp8:
        return ExpertMatrices(_random(*sizes))
    num, rows, columns = sizes
    scale = torch.full((num, rows // FP8_BLOCK, columns // FP8_BLOCK), 2.0**-6, device="cuda")
    return ExpertMatrices((_random(*sizes) * 64).to(torch.float8_e4m3fn), scale)


def _candidates(shape: ExpertShape, which: str, token_counts: Iterable[int]) -> list[Tile]:
    if which.startswith("grouped"):
        return _grouped_candidates(which) if shape.fp8 else []
    # Of float8 weights every program quantises its tokens: with many, the grouped products are for them.
    large = (64,) if shape.fp8 else (64, 128)
    ms = {m for num in token_counts for m in ((16,) if num <= 64 else (16, 32, 64) if num <= 512 else large)}
    ks, weight_bytes = ((FP8_BLOCK,), 1) if shape.fp8 else ((64, 128), 2)
    found = []
    for m, n, k, warps, stages in itertools.product(sorted(ms), (64, 128), ks, (4, 8), (2, 3, 4, 5, 6)):
        tile = Tile(m=m, n=n, k=k, warps=warps, stages=stages)
        products = 2 if which == "gate_up" else 1
        staged_bytes = stages * k * (weight_bytes * products * n + 2 * m)
        # Accumulators are held in registers: more than this spills.
        registers = products * m * n // (32 * warps)
        if 24_000 <= staged_bytes <= _SHARED_BYTES and registers <= 128:
            found.append(tile)
    return found


def _grouped_candidates(which: str) -> list[Tile]:
    is_gate_up = which == "grouped_gate_up"
    ns = (FP8_BLOCK,) if is_gate_up else (64, 128)
    found = []
    for m, n, warps, stages in itertools.product((64, 128), ns, (4, 8), (2, 3, 4, 5)):
        products = 2 if is_gate_up else 1
        staged_bytes = stages * FP8_BLOCK * (products * n + m)
        # A product of its own stands beside the accumulators.
        if staged_bytes <= _SHARED_BYTES and (products + 1) * m * n // (32 * warps) <= 192:
            found.append(Tile(m=m, n=n, k=FP8_BLOCK, warps=warps, stages=stages))
    return found


def _compile(job: tuple[ExpertShape, str, Tile]) -> bool:
    """Compile one tile in a worker process, into the cache that all processes share; False if it cannot be."""
    shape, which, tile = job
    try:
        small = _Weights(shape._replace(experts=1, top_k=1))
        small.run(small.case(16), which=which, tile=tile)
        torch.cuda.synchronize()
    except Exception:  # noqa: BLE001  whatever is wrong with a tile, another one is taken
        return False
    return True


def _time(runs: list[Callable[[], object]]) -> float:
    """Microseconds of one run, from the median replay of a graph of all of them."""
    for run in runs:
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    graph.replay()
    times: list[float] = []
    for _ in range(_TIMINGS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / len(runs))
    return median(times)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
