"""`python -m common.kernels.triton.tune`: measure the expert kernels' tiles on this GPU and write the config of one expert shape.

    python -m common.kernels.triton.tune --experts 128 --top-k 8 --hidden 2048 --width 768

Times CUDA graphs of several routings over random weights, random inputs and uniform routing, in turn; the fastest tile of each
kernel and token count is kept. Tiles are compiled by many processes first.
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

from common.kernels.triton import experts, grouped_experts
from common.kernels.triton.routing import Routing, route
from common.kernels.triton.tuning import Tile, Tiles, Tuned, config_path

_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_KERNELS = ("gate_up", "down")
_MOST_SINGLE = 8  # with more, tokens share experts, and reading one twice costs more than it gains
_ROUTINGS = 4
_SHARED_BYTES = 200_000
_TIMINGS = 5


class Shape(NamedTuple):
    """One shape of expert."""

    experts: int
    top_k: int
    hidden: int
    width: int


def main(argv: list[str]) -> int:
    """Tune and write; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m common.kernels.triton.tune", description=(__doc__ or "").split("\n")[0]
    )
    for name in Shape._fields:
        parser.add_argument("--" + name.replace("_", "-"), type=int, required=True)
    arguments = parser.parse_args(argv)
    shape = Shape(**vars(arguments))
    if not torch.cuda.is_available():
        parser.error("there is no usable GPU on this machine")
    jobs = [(shape, which, tile) for which in _KERNELS for tile in _candidates(which, _TOKENS)]
    with ProcessPoolExecutor(min(16, cpu_count() or 1), mp_context=get_context("spawn")) as executor:
        are_good = executor.map(_compile, jobs, chunksize=8)
        compiled = {(which, tile) for (_, which, tile), is_good in zip(jobs, are_good, strict=True) if is_good}
    weights = _Weights(shape)
    tiles: list[Tiles] = []
    single_tokens = few_tokens = 0
    for num_tokens in _TOKENS:
        cases = [weights.case(num_tokens) for _ in range(_ROUTINGS)]
        tiles_of = {
            which: [t for t in _candidates(which, [num_tokens]) if (which, t) in compiled] for which in _KERNELS
        }
        gate_up = min(
            (_time([partial(weights.run_gate_up, case, t) for case in cases]), t) for t in tiles_of["gate_up"]
        )
        down = min((_time([partial(weights.run_down, case, t) for case in cases]), t) for t in tiles_of["down"])
        single, many = (_time([partial(run, case) for case in cases]) for run in (weights.run_single, weights.run_many))
        touched = sum(int((case.routing.counts_E > 0).sum()) for case in cases) / len(cases)
        print(
            f"{num_tokens} tokens, {touched:.0f} experts touched, one by one {single:.1f} us, grouped {many:.1f} us",
            flush=True,
        )
        for which, (microseconds, tile) in (("gate_up", gate_up), ("down", down)):
            print(f"    {which} {microseconds:.1f} us, {tile}", flush=True)
        if single < gate_up[0] + down[0] and num_tokens <= _MOST_SINGLE:
            single_tokens = num_tokens
        if gate_up[0] + down[0] < many:
            few_tokens = num_tokens
            tiles.append(Tiles(tokens=num_tokens, gate_up=gate_up[1], down=down[1]))
    tuned = Tuned(
        command=f"python -m common.kernels.triton.tune {' '.join(argv)}",
        hardware=f"{torch.cuda.get_device_name()}, torch {torch.__version__}",
        single_tokens=single_tokens,
        few_tokens=few_tokens,
        tiles=tiles,
    )
    path = config_path(num_experts=shape.experts, top_k=shape.top_k, hidden_size=shape.hidden, width=shape.width)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(tuned)) + b"\n")
    print(f"written to {path}")
    return 0


class _Case(NamedTuple):
    hidden: torch.Tensor
    routing: Routing
    inner: torch.Tensor


class _Weights:
    """One layer's experts in bf16, and steps with uniform routing."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self.gate_up = _random(shape.experts, 2 * shape.width, shape.hidden)
        self.down = _random(shape.experts, shape.hidden, shape.width)

    def case(self, num_tokens: int) -> _Case:
        """A step of `num_tokens` tokens."""
        shape = self._shape
        ids_TK = torch.empty((num_tokens, shape.top_k), dtype=torch.int32, device="cuda")
        counts_E = torch.zeros(shape.experts, dtype=torch.int32, device="cuda")
        routing = route(_random(num_tokens, shape.experts), ids_TK, counts_E, norm_topk_prob=True)
        return _Case(_random(num_tokens, shape.hidden), routing, _random(num_tokens * shape.top_k, shape.width))

    def run_gate_up(self, case: _Case, tile: Tile) -> None:
        """Launch the first kernel for few tokens."""
        experts.gate_up(case.hidden, case.routing, self.gate_up, tile)

    def run_down(self, case: _Case, tile: Tile) -> None:
        """Launch the second kernel for few tokens."""
        experts.down(case.inner, case.routing, self.down, tile)

    def run_single(self, case: _Case) -> None:
        """Launch all of the way for a token or two."""
        experts.single_tokens(case.hidden, case.routing, self.gate_up, self.down)

    def run_many(self, case: _Case) -> None:
        """Launch all of the way for many tokens."""
        grouped_experts.many_tokens(case.hidden, case.routing, self.gate_up, self.down)


def _random(*sizes: int) -> torch.Tensor:
    return torch.randn(sizes, dtype=torch.bfloat16, device="cuda").div_(sizes[-1] ** 0.5)


def _candidates(which: str, token_counts: Iterable[int]) -> list[Tile]:
    ms = {
        m for tokens in token_counts for m in ((16,) if tokens <= 64 else (16, 32, 64) if tokens <= 512 else (64, 128))
    }
    found = []
    for m, n, k, warps, stages in itertools.product(sorted(ms), (64, 128), (64, 128), (4, 8), (2, 3, 4, 5, 6)):
        tile = Tile(m=m, n=n, k=k, warps=warps, stages=stages)
        products = 2 if which == "gate_up" else 1
        staged_bytes = 2 * stages * k * (products * n + m)
        # Accumulators are held in registers: more than this spills.
        registers = products * m * n // (32 * warps)
        if 24_000 <= staged_bytes <= _SHARED_BYTES and registers <= 128:
            found.append(tile)
    return found


def _compile(job: tuple[Shape, str, Tile]) -> bool:
    """Compile one tile in a worker process, into the cache that all processes share; False if it cannot be."""
    shape, which, tile = job
    try:
        small = _Weights(Shape(1, 1, shape.hidden, shape.width))
        case = small.case(16)
        (small.run_gate_up if which == "gate_up" else small.run_down)(case, tile)
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
