"""`python -m deploy.bench online`: a whole server over HTTP, workload by workload, in tokens/s.

The server is one that runs already (`--url`), Tandem's or any OpenAI-compatible one, or a stack that is started for this:
what stands behind `--` are flags of `deploy.up`, such as `--aggregated`. All requests of a workload are sent at once by
several client processes, which keep the raw replies; those are read and every row is checked after the clock has stopped.

    python -m deploy.bench online --model qwen3-30b-a3b-shape --workload b1,b64 --rows all -- --load-format dummy
    python -m deploy.bench online --url http://127.0.0.1:30000 --target openai --vocab-size 151936

Neighbours: `requests` (the bodies), `clients` (send them), `judge` (reads the answers), `interference`, `results`.
"""

import itertools
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

import msgspec
from msgspec import Struct
from msgspec.structs import replace
from rich.console import Console

from common.config import option, parse_config
from common.errors import UsageError
from common.observability.logging import configure_logging
from deploy.bench.figures import Figure
from deploy.bench.options import BenchError
from deploy.bench.rounds import alternate
from deploy.bench.speed.clients import Clients, running_clients
from deploy.bench.speed.interference import Interference, measure_interference
from deploy.bench.speed.judge import judge_all, make_round
from deploy.bench.speed.requests import Load, Server, Target, describe_server, make_job
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
from deploy.bench.speed.shape import resolve_model
from deploy.bench.speed.workloads import (
    INTERFERENCE,
    NO_TARGETS,
    ONLINE_TARGETS,
    WORKLOADS,
    RowsForm,
    Workload,
    parse_workloads,
    workload_of,
)
from deploy.demo import demo_checkpoint
from deploy.launch_options import split_flags
from deploy.stack import StackError, running_stack

_NAME = "online"
_MOST_PROCESSES = 4


class OnlineOptions(Struct, frozen=True, kw_only=True):
    """What to send where, and how often."""

    url: Annotated[str, option("a server that runs; without one, a stack is started", metavar="URL")] = ""
    target: Annotated[Literal["tandem", "openai"], option("what the server speaks")] = "tandem"
    model: Annotated[
        str,
        option(
            "for the stack, or where --url's does not tell its vocabulary; default: the demo model", metavar="MODEL"
        ),
    ] = ""
    workload: Annotated[str, option(f"names of the table, NxPxG, or {INTERFERENCE}", metavar="NAME[,NAME]")] = ",".join(
        WORKLOADS
    )
    rows: Annotated[
        Literal["off", "int32", "msgpack", "all"], option("form of the routed experts; all: each in turn")
    ] = "all"
    stream: Annotated[bool, option("stream, and measure TTFT and ITL of each request; not as msgpack")] = False
    rounds: Annotated[int, option("rounds of each kind, after one of each to warm up", unit="rounds", ge=1)] = 3
    processes: Annotated[
        int, option(f"client processes; 0: half the cores, {_MOST_PROCESSES} at most", unit="processes", ge=0, le=64)
    ] = 0
    vocab_size: Annotated[int, option("prompts are drawn from ids below it; 0: ask", unit="ids", ge=0)] = 0
    seed: Annotated[
        int, option("of the prompts; 0: a new one, so that no run meets the cached prompts of an earlier one", ge=0)
    ] = 0
    request_deadline_s: Annotated[float, option("longest time of a request", unit="s", gt=0)] = 600.0
    api_key: Annotated[str, option("the key that the server asks for", metavar="KEY")] = ""
    json: Annotated[str, option("write all that was measured there", metavar="FILE")] = ""


class OnlineConfig(Struct, frozen=True):
    """The command's config."""

    bench: OnlineOptions = OnlineOptions()


def main(argv: list[str]) -> int:
    """Run the workloads; returns the exit code, 1 if one could not be run or a row was bad. Raises UsageError."""
    own, up = split_flags(argv)
    options = parse_config(
        OnlineConfig,
        own,
        prog="python -m deploy.bench online",
        description="Measures a server over HTTP. Flags of `deploy.up` for a stack of its own stand behind `--`.",
    ).bench
    if options.url and up:
        raise UsageError("--url: the flags behind -- are for a stack that is started here")
    names, forms = parse_workloads(options.workload), forms_of(options)
    options = replace(options, seed=options.seed or time.time_ns() % 2**30)
    configure_logging("bench", "warning")
    report = SpeedReport(
        command=_NAME,
        options=msgspec.to_builtins(replace(options, api_key="")) | {"up": up},
        machine=describe_machine(),
        cases=[],
        ratios=[],
    )
    try:
        with _server(options, up) as server, running_clients(_num_processes(options)) as clients:
            bench = OnlineBench(clients, server, options)
            for name in names:
                report = _measured(bench, name, forms, report)
                # After each one: the time on a rented machine may end before the command does.
                write_report(report, options.json)
    except (StackError, BenchError) as error:
        report = _failed(report, str(error))
    report = replace(report, machine=describe_machine())
    write_report(report, options.json)
    print_report(report)
    return 0 if report.is_good else 1


def forms_of(options: OnlineOptions) -> list[RowsForm]:
    """Which forms of rows to run, no rows first. Raises UsageError for what the server cannot do."""
    if options.target == "openai":
        if options.rows not in ("off", "all"):
            raise UsageError(f"--rows {options.rows}: an OpenAI-compatible server is asked for no rows")
        return ["off"]
    if options.rows == "all":
        return ["off", "int32"] if options.stream else ["off", "int32", "msgpack"]
    if options.stream and options.rows == "msgpack":
        raise UsageError("--rows msgpack: a stream is JSON")
    return [options.rows]


class OnlineBench:
    """A server and the clients that load it, ready to be measured."""

    def __init__(self, clients: Clients, server: Server, options: OnlineOptions) -> None:
        self._clients = clients
        self._server = server
        self._options = options
        self._targets = ONLINE_TARGETS if server.has_target_shape else NO_TARGETS
        self._serials = itertools.count()

    def measure(self, workload: Workload, forms: list[RowsForm]) -> tuple[list[Case], list[Figure]]:
        """Run all rounds of a workload: a case for each form, and rows over no rows. Raises BenchError."""
        rounds: dict[RowsForm, list[Round]] = {form: [] for form in forms}

        def measure_one(form: RowsForm) -> float:
            rounds[form].append(self.run_round(workload, form))
            return rounds[form][-1].tokens_per_s

        alternate({form: lambda form=form: measure_one(form) for form in forms}, self._options.rounds)  # type: ignore[misc]
        # The first of each is the one to warm up.
        cases = {form: make_case(workload, form, each[1:], self._targets) for form, each in rounds.items()}
        ratios = [
            make_ratio(_NAME, case, cases["off"], least=self._targets.of_rows(workload.name, form))
            for form, case in cases.items()
            if form != "off" and "off" in cases
        ]
        return list(cases.values()), ratios

    def run_round(self, workload: Workload, form: RowsForm) -> Round:
        """Run a workload once with prompts of its own, and check its rows. Raises BenchError."""
        options = self._options
        load = Load(
            requests=workload.requests,
            prompt_tokens=workload.prompt_tokens,
            output_tokens=workload.output_tokens,
            form=form,
            stream=options.stream,
            seed=options.seed,
            serial=next(self._serials),
        )
        replies = self._clients.run(make_job(self._server, load, deadline_s=options.request_deadline_s))
        judged = judge_all(
            replies,
            target=self._server.target,
            form=form,
            stream=options.stream,
            prompt_tokens=workload.prompt_tokens,
            num_experts=self._server.num_experts,
        )
        return make_round(judged, workload)

    def interfere(self, interference: Interference) -> tuple[list[Case], list[Figure]]:
        """Measure streams without and with long prompts beside them. Raises BenchError."""
        return measure_interference(
            self._clients,
            self._server,
            interference,
            rounds=self._options.rounds,
            seed=self._options.seed,
            serials=self._serials,
            deadline_s=self._options.request_deadline_s,
        )


def _measured(bench: OnlineBench, name: str, forms: list[RowsForm], report: SpeedReport) -> SpeedReport:
    """Add one workload to the report; its failure does not stop the others."""
    progress = Console(stderr=True)
    progress.print(f"{name}:", soft_wrap=True)
    try:
        is_interference = name == INTERFERENCE
        found = bench.interfere(Interference()) if is_interference else bench.measure(workload_of(name), forms)
    except BenchError as error:
        return _failed(report, f"{name}: {error}")
    cases, ratios = found
    for case in cases:
        progress.print(f"    {case.name}: {case.median:,.1f} {case.unit}, {case.bad_rows} bad rows", soft_wrap=True)
    return replace(report, cases=report.cases + cases, ratios=report.ratios + ratios)


def _failed(report: SpeedReport, failure: str) -> SpeedReport:
    print(f"error: {failure}", file=sys.stderr)
    return replace(report, failures=[*report.failures, failure])


@contextmanager
def _server(options: OnlineOptions, up: list[str]) -> Iterator[Server]:
    """The server at the URL, or a stack of our own for as long as the block lasts."""
    model = resolve_model(options.model) if options.model else ""
    if options.url:
        yield _described(options.url, options, options.target, model)
        return
    # Prompts differ anyway; a cache that fills up would only have to be emptied.
    cache = (
        [] if any(flag.startswith(("--prefix-cache", "--no-prefix-cache")) for flag in up) else ["--no-prefix-cache"]
    )
    key = [f"--api-key={options.api_key}"] if options.api_key else []
    with running_stack([f"--model={model or demo_checkpoint()}", *cache, *key, *up]) as stack:
        yield _described(stack.url, options, options.target, model)


def _described(url: str, options: OnlineOptions, target: Target, model: str) -> Server:
    return describe_server(url, target, api_key=options.api_key, model=model, vocab_size=options.vocab_size)


def _num_processes(options: OnlineOptions) -> int:
    return options.processes or max(1, min(_MOST_PROCESSES, (os.cpu_count() or 1) // 2))
