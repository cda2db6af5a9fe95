"""`python -m deploy.bench offline`: the engine alone, workload by workload, in tokens/s.

The engine is built once and runs every workload: one round to warm up, then rounds with and without rows in turn.
Every row that comes back is checked after the clock has stopped. The options are this benchmark's own and all of an
engine's.

    python -m deploy.bench offline --model qwen3-30b-a3b-shape --load-format dummy --workload b1,b64 --rows both

Neighbours: `session` (runs a round), `rows` (checks it), `results` (table and JSON), `profile` (where the time goes).
"""

import gc
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import torch
from msgspec import Struct
from msgspec.structs import replace
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from common.config import EngineOptions, ModelOptions, option, parse_config
from common.engine.build import build_engine
from common.engine.engine import Engine
from common.messages import Generate, RequestOptions, SamplingParams
from common.observability.logging import configure_logging
from deploy.bench.figures import Figure
from deploy.bench.options import BenchError
from deploy.bench.rounds import alternate
from deploy.bench.speed.profile import Profile, make_profile
from deploy.bench.speed.results import (
    Case,
    Round,
    SpeedReport,
    describe_machine,
    make_case,
    make_ratio,
    print_report,
    write_report,
)
from deploy.bench.speed.rows import count_rows, distinct_experts, read_block
from deploy.bench.speed.session import Answered, Session, latencies_of, steps_of
from deploy.bench.speed.shape import resolve_model
from deploy.bench.speed.workloads import (
    INTERFERENCE,
    NO_TARGETS,
    OFFLINE_TARGETS,
    WORKLOADS,
    Targets,
    Workload,
    is_target_shape,
    make_prompts,
    parse_workloads,
    workload_of,
)

_NAME = "offline"


class OfflineOptions(Struct, frozen=True, kw_only=True):
    """What to measure of the engine, and how often."""

    workload: Annotated[str, option("names of the table, or NxPxG", metavar="NAME[,NAME]")] = ",".join(WORKLOADS)
    rows: Annotated[Literal["on", "off", "both"], option("return routed experts")] = "both"
    compare_overlap: Annotated[bool, option("run each round with and without overlap")] = False
    rounds: Annotated[
        int, option("rounds of each kind, after one of each to warm up; 0: only profile", unit="rounds", ge=0)
    ] = 3
    chunked_prefill_tokens: Annotated[int, option("prompt tokens of one step at most", unit="tokens", ge=1)] = 16384
    seed: Annotated[int, option("of the prompts and of the sampling", ge=0)] = 1
    json: Annotated[str, option("write all that was measured there", metavar="FILE")] = ""
    profile: Annotated[
        str, option("write a chrome trace of some steps of the first workload there", metavar="FILE.json[.gz]")
    ] = ""
    profile_steps: Annotated[int, option("steps that are traced", unit="steps", ge=1)] = 30
    profile_phase: Annotated[
        Literal["decode", "prefill"], option("trace from when all requests decode, or from the first step on")
    ] = "decode"


class OfflineConfig(Struct, frozen=True):
    """The command's config."""

    bench: OfflineOptions
    model: ModelOptions
    engine: EngineOptions


class Way(Struct, frozen=True):
    """One way to run a workload."""

    rows: bool
    overlap: bool

    def name(self, *, with_overlap: bool) -> str:
        """Say what it is, the overlap only where there are both."""
        overlap = (", overlap" if self.overlap else ", no overlap") if with_overlap else ""
        return ("rows" if self.rows else "off") + overlap


def main(argv: list[str]) -> int:
    """Run the workloads; returns the exit code, 1 if one could not be run or a row was bad. Raises UsageError."""
    config = parse_config(
        OfflineConfig, argv, prog="python -m deploy.bench offline", description="Measures the engine alone."
    )
    config = replace(config, model=replace(config.model, model=resolve_model(config.model.model)))
    workloads = [workload_of(name) for name in parse_workloads(config.bench.workload) if name != INTERFERENCE]
    configure_logging("bench", "warning")
    progress = Console(stderr=True)
    began_s = time.perf_counter()
    bench = OfflineBench(config)
    progress.print(f"engine built in {time.perf_counter() - began_s:.1f} s", soft_wrap=True)
    report = SpeedReport(
        command=_NAME, options=msgspec.to_builtins(config), machine=describe_machine(), cases=[], ratios=[]
    )
    for workload in workloads:
        progress.print(f"{workload.name}: {workload}", soft_wrap=True)
        try:
            cases, ratios = bench.measure(workload)
        except BenchError as error:
            print(f"error: {workload.name}: {error}", file=sys.stderr)
            report = replace(report, failures=[*report.failures, f"{workload.name}: {error}"])
            continue
        for case in cases:
            progress.print(f"    {case.name}: {case.median:,.1f} {case.unit}, {case.bad_rows} bad rows", soft_wrap=True)
        report = replace(report, cases=report.cases + cases, ratios=report.ratios + ratios)
        # After each one: the time on a rented machine may end before the command does.
        write_report(report, config.bench.json)
    if config.bench.profile and workloads:
        try:
            report = replace(report, profile=bench.profile(workloads[0], Path(config.bench.profile)))
        except BenchError as error:
            print(f"error: {error}", file=sys.stderr)
            report = replace(report, failures=[*report.failures, str(error)])
    report = replace(report, machine=describe_machine())
    write_report(report, config.bench.json)
    print_report(report)
    return 0 if report.is_good else 1


class OfflineBench:
    """An engine and its sessions, ready to be measured."""

    def __init__(self, config: OfflineConfig) -> None:
        self._options = config.bench
        self._engine: Engine = build_engine(
            config.model, config.engine, chunked_prefill_tokens=config.bench.chunked_prefill_tokens
        )
        self._is_cuda = self._engine.kv_pool.pages.device.type == "cuda"
        self._targets: Targets = (
            OFFLINE_TARGETS if self._is_cuda and is_target_shape(self._engine.config) else NO_TARGETS
        )
        overlaps = (True, False) if config.bench.compare_overlap else (config.engine.overlap,)
        self._sessions = {
            overlap: Session(
                self._engine,
                chunked_prefill_tokens=config.bench.chunked_prefill_tokens,
                verify_rows=config.engine.verify_rows,
                overlap=overlap,
            )
            for overlap in overlaps
        }
        self._serials: Iterator[int] = itertools.count()
        # As long as it lives, the engine is no garbage; a scan of it would fall into the middle of a round.
        gc.collect()
        gc.freeze()

    def measure(self, workload: Workload) -> tuple[list[Case], list[Figure]]:
        """Run all rounds of a workload: its cases, and rows over no rows. Raises BenchError."""
        self._refuse_too_long(workload)
        forms = {"on": (True,), "off": (False,), "both": (False, True)}[self._options.rows]
        ways = [Way(rows, overlap) for overlap in self._sessions for rows in forms]
        rounds: dict[Way, list[Round]] = {way: [] for way in ways}

        def measure_one(way: Way) -> float:
            rounds[way].append(self.run_round(workload, way))
            return rounds[way][-1].tokens_per_s

        alternate({way: lambda way=way: measure_one(way) for way in ways}, self._options.rounds)  # type: ignore[misc]
        if not self._options.rounds:
            return [], []
        both = len(self._sessions) > 1
        # The first of each is the one to warm up.
        cases = {
            way: make_case(workload, way.name(with_overlap=both), each[1:], self._targets)
            for way, each in rounds.items()
        }
        least = self._targets.of_rows(workload.name, "rows")
        ratios = [
            make_ratio(_NAME, case, cases[Way(False, way.overlap)], least=least)
            for way, case in cases.items()
            if way.rows and len(forms) > 1
        ]
        return list(cases.values()), ratios

    def run_round(self, workload: Workload, way: Way) -> Round:
        """Run a workload once with prompts of its own, and check its rows. Raises BenchError."""
        messages = self._messages(workload, rows=way.rows)
        gc.collect()
        answered = self._sessions[way.overlap].run(messages)
        for message in messages:
            count = len(answered.finished[message.rid].token_ids)
            if count != workload.output_tokens:
                raise BenchError(f"a request was answered with {count} tokens, not {workload.output_tokens}")
        ttft_ms, itl_ms = latencies_of(answered, workload.output_tokens)
        measured = Round(
            wall_s=answered.wall_s,
            tokens_per_s=workload.tokens_per_s(answered.wall_s),
            ttft_ms=ttft_ms,
            itl_ms=itl_ms,
            steps=steps_of(answered),
        )
        return self._with_rows(measured, workload, answered) if way.rows else measured

    def profile(self, workload: Workload, trace: Path) -> Profile:
        """Trace some steps of a workload, with rows unless they are off, and write the trace. Raises BenchError."""
        options, session = self._options, next(iter(self._sessions.values()))
        session.submit(self._messages(workload, rows=options.rows != "off"))
        while options.profile_phase == "decode" and session.num_open and not session.is_decoding:
            session.turn()
        if not session.num_open:
            raise BenchError(f"--profile: {workload.name} has too few steps in which all requests decode")
        activity = ProfilerActivity.CUDA if self._is_cuda else ProfilerActivity.CPU
        self._synchronize()
        with profile(activities=[activity]) as profiler:
            began = session.num_launched
            while session.num_launched - began < options.profile_steps and session.num_open:
                session.turn()
            num_steps = session.num_launched - began
            self._synchronize()
        session.abandon()
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
        return make_profile(trace, workload=workload.name, phase=options.profile_phase, num_steps=num_steps)

    def _with_rows(self, measured: Round, workload: Workload, answered: Answered) -> Round:
        config = self._engine.config
        rows = [read_block(answered.blocks.get(rid), workload) for rid in answered.finished]
        return replace(
            measured,
            rows=count_rows(rows, workload, num_layers=len(config.moe_layer_ids), num_experts=config.num_experts),
            distinct_experts=distinct_experts(
                [ids for ids in rows if ids is not None], workload, num_experts=config.num_experts
            ),
        )

    def _messages(self, workload: Workload, *, rows: bool) -> list[Generate]:
        serial, seed = next(self._serials), self._options.seed
        prompts = make_prompts(
            workload.requests,
            workload.prompt_tokens,
            vocab_size=self._engine.config.vocab_size,
            seed=seed,
            serial=serial,
        ).tolist()
        return [
            Generate(
                rid=f"bench-{serial}-{index}",
                input_ids=prompt,
                options=RequestOptions(
                    sampling=SamplingParams(
                        max_new_tokens=workload.output_tokens,
                        temperature=1.0,
                        ignore_eos=True,
                        seed=seed * 1_000_000 + serial * 1_000 + index,
                    ),
                    return_routed_experts=rows,
                ),
            )
            for index, prompt in enumerate(prompts)
        ]

    def _refuse_too_long(self, workload: Workload) -> None:
        total_tokens, capacity = workload.prompt_tokens + workload.output_tokens, self._engine.capacity
        for limit, what in ((capacity.context_tokens, "context"), (capacity.kv_pool_tokens, "KV pool")):
            if total_tokens > limit:
                raise BenchError(f"a request of {total_tokens} tokens does not fit the {what} of {limit}")

    def _synchronize(self) -> None:
        if self._is_cuda:
            torch.cuda.synchronize()
