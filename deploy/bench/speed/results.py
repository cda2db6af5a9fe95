"""What the speed benchmarks find: rounds, cases and ratios, set against the targets; as a table and as JSON.

It measures nothing. Times are seconds unless a name says otherwise. Neighbours: `offline` and `online` (fill these),
`deploy.bench.figures` (the ratios).
"""

import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from common.errors import UsageError
from deploy.bench.figures import Figure, Target, make_figure
from deploy.bench.figures import as_table as ratio_table
from deploy.bench.speed.profile import Profile
from deploy.bench.speed.profile import as_table as profile_table
from deploy.bench.speed.workloads import Targets, Workload
from deploy.demo import REPOSITORY
from deploy.replay.check import RowCounts

_TOOL_DEADLINE_S = 30.0
_LEAST_WIDTH = 220


class Spread(Struct, frozen=True, kw_only=True):
    """Percentiles of so many values, in the unit of the field that holds it."""

    p50: float
    p99: float
    count: int


def spread_of(values: Sequence[float]) -> Spread | None:
    """Take the percentiles, interpolated between neighbours; None of no values."""
    if not values:
        return None
    p50, p99 = np.percentile(values, [50, 99])
    return Spread(p50=float(p50), p99=float(p99), count=len(values))


def weighted_median(values: Sequence[float], weights: Sequence[float]) -> float | None:
    """The least value that has half of the weight at or below it; None of no values."""
    pairs = sorted(zip(values, weights, strict=True))
    total, below = sum(weights), 0.0
    for value, weight in pairs:
        below += weight
        if below >= total / 2:
            return value
    return None


class Steps(Struct, frozen=True, kw_only=True):
    """The steps of a round, told apart by what was in them; only seen from inside of the process."""

    count: int
    decode_count: int
    """Of them, those in which every request only decoded."""
    decode_s: float
    """From the settling of the step before to that of a decode step, added up; the rest of the wall time is prefill."""
    decode_ms: Spread | None


class Transfer(Struct, frozen=True, kw_only=True):
    """The hand-overs of a round, from the replies' own timings; None for what they do not tell."""

    gb_s: float | None
    """Median over the bytes."""
    total_mb: float
    exposed_ms: Spread | None
    exposed_part_of_ttft: float | None
    """Median over the requests; needs a stream, or answers of one token."""


class Round(Struct, frozen=True, kw_only=True):
    """One run of a workload. `rows` counts (position, layer) rows; None if none were asked for."""

    wall_s: float
    tokens_per_s: float
    ttft_ms: Spread | None = None
    itl_ms: Spread | None = None
    steps: Steps | None = None
    rows: RowCounts | None = None
    distinct_experts: float | None = None
    """Of a layer, by the tokens of one decode step."""
    reply_mb: float | None = None
    transfer: Transfer | None = None
    timings_ms: dict[str, float] = {}
    """Medians of the durations that the replies tell."""


class Case(Struct, frozen=True, kw_only=True):
    """A workload run in one way, `rounds` times, of which there is at least one; `best` and `median` are in `unit`."""

    workload: Workload
    name: str
    unit: str
    rounds: list[Round]
    best: float
    median: float
    target: float | None
    is_met: bool | None
    """Whether the median reaches the target; None without one."""

    @property
    def bad_rows(self) -> int:
        """Of all rounds."""
        return sum(each.rows.bad for each in self.rounds if each.rows)


class Machine(Struct, frozen=True, kw_only=True):
    """What it was measured on; `commit` is None where there is no repository."""

    platform: str
    cores: int
    gpus: list[str]
    torch: str
    commit: str | None
    load_average_1min: float


class SpeedReport(Struct, frozen=True, kw_only=True):
    """A whole run of one command."""

    command: str
    options: Any
    machine: Machine
    cases: list[Case]
    ratios: list[Figure]
    profile: Profile | None = None
    failures: list[str] = []

    @property
    def is_good(self) -> bool:
        """Everything ran, and no row was bad; whether the targets are met is another matter."""
        return not self.failures and not any(case.bad_rows for case in self.cases)


def make_case(workload: Workload, name: str, rounds: list[Round], targets: Targets) -> Case:
    """Make a case of its rounds."""
    speeds = [each.tokens_per_s for each in rounds]
    median, target = statistics.median(speeds), targets.tokens_per_s.get(workload.name)
    return Case(
        workload=workload,
        name=name,
        unit=workload.unit,
        rounds=rounds,
        best=max(speeds),
        median=median,
        target=target,
        is_met=None if target is None else median >= target,
    )


def make_ratio(command: str, case: Case, over: Case, *, least: float | None) -> Figure:
    """Set one way to run a workload against another one, of the same rounds."""
    return make_figure(
        command,
        case.workload.name,
        case.unit,
        (case.name, [each.tokens_per_s for each in case.rounds]),
        (over.name, [each.tokens_per_s for each in over.rounds]),
        target=None if least is None else Target(of="ratio", bound="at least", limit=least),
    )


# ------------------------------------------------------------------------------------------------ the tables


def print_report(report: SpeedReport) -> None:
    """Print all tables of a report on stdout."""
    console = Console()
    # Where there is no terminal, its assumed 80 columns would break every cell.
    console.width = max(console.width, _LEAST_WIDTH)
    if report.cases:
        console.print(as_table(report.cases))
    if report.ratios:
        console.print(ratio_table(report.ratios))
    if report.profile is not None:
        console.print(profile_table(report.profile))


def as_table(cases: Sequence[Case]) -> Table:
    """The cases for people: medians of the rounds; columns that would be empty are left out."""
    table = Table(title="Speed by workload", title_justify="left")
    columns = [(name, [write(case) for case in cases]) for name, write in _COLUMNS.items()]
    shown = [(name, cells) for name, cells in columns if any(cells)]
    for name, _ in shown:
        table.add_column(name, justify="left" if name in ("workload", "rows", "unit", "target") else "right")
    for number in range(len(cases)):
        if number and cases[number - 1].workload != cases[number].workload:
            table.add_section()
        table.add_row(*(cells[number] for _, cells in shown))
    return table


def _target(case: Case) -> str:
    if case.target is None:
        return ""
    style, verdict = ("green", "met") if case.is_met else ("red", "missed")
    return f"{case.target:,.0f}: [{style}]{verdict}[/]"


def _median(case: Case, value_of: Callable[[Round], float | None], digits: int = 1) -> str:
    values = [value for each in case.rounds if (value := value_of(each)) is not None]
    return f"{statistics.median(values):,.{digits}f}" if values else ""


def _spread(case: Case, spread_in: Callable[[Round], Spread | None]) -> str:
    """Write p50 / p99."""
    p50 = _median(case, lambda each: spread.p50 if (spread := spread_in(each)) else None, 2)
    p99 = _median(case, lambda each: spread.p99 if (spread := spread_in(each)) else None, 2)
    return f"{p50} / {p99}" if p50 else ""


def _rows(case: Case) -> str:
    counts = [each.rows for each in case.rounds if each.rows]
    if not counts:
        return ""
    bad, style = case.bad_rows, "red" if case.bad_rows else "green"
    return f"[{style}]{bad:,}[/] of {sum(each.rows + each.missing for each in counts):,}"


def _all_zero(case: Case) -> str:
    counts = [each.rows for each in case.rounds if each.rows]
    return f"{sum(each.all_zero for each in counts):,}" if counts else ""


def _percent(part: float | None) -> float | None:
    return None if part is None else 100 * part


_COLUMNS: dict[str, Callable[[Case], str]] = {
    "workload": lambda case: case.workload.name,
    "rows": lambda case: case.name,
    "median": lambda case: f"{case.median:,.1f}",
    "best": lambda case: f"{case.best:,.1f}",
    "unit": lambda case: case.unit,
    "target": _target,
    "TTFT p50 ms": lambda case: _median(case, lambda each: each.ttft_ms.p50 if each.ttft_ms else None),
    "ITL p50 / p99 ms": lambda case: _spread(case, lambda each: each.itl_ms),
    "steps": lambda case: _median(case, lambda each: each.steps.count if each.steps else None, 0),
    "decode step p50 / p99 ms": lambda case: _spread(case, lambda each: each.steps.decode_ms if each.steps else None),
    "decode s": lambda case: _median(case, lambda each: each.steps.decode_s if each.steps else None, 2),
    "other s": lambda case: _median(case, lambda each: each.wall_s - each.steps.decode_s if each.steps else None, 2),
    "experts/layer": lambda case: _median(case, lambda each: each.distinct_experts),
    "bad rows": _rows,
    "all zero": _all_zero,
    "reply MB": lambda case: _median(case, lambda each: each.reply_mb, 2),
    "KV GB/s": lambda case: _median(case, lambda each: each.transfer.gb_s if each.transfer else None, 2),
    "exposed ms": lambda case: _spread(case, lambda each: each.transfer.exposed_ms if each.transfer else None),
    "% of TTFT": lambda case: _median(
        case, lambda each: _percent(each.transfer.exposed_part_of_ttft) if each.transfer else None
    ),
}


# ------------------------------------------------------------------------------------------------ JSON


def describe_machine() -> Machine:
    """Say what this machine is, without touching its GPUs."""
    query = _output_of(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    commit = _output_of(["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"])
    return Machine(
        platform=platform.platform(),
        cores=os.cpu_count() or 0,
        gpus=(query or "").splitlines(),
        torch=version("torch"),
        commit=commit or None,
        load_average_1min=os.getloadavg()[0],
    )


def write_report(report: SpeedReport, file: str) -> None:
    """Write the report as JSON, unless `file` is empty. Raises UsageError if it cannot be written."""
    if not file:
        return
    try:
        Path(file).write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    except OSError as error:
        raise UsageError(f"--json {file}: {error.strerror}") from error


def _output_of(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_DEADLINE_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
