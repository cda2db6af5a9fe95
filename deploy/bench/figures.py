"""Figures: two things measured in one run, A over B, with what is aimed at; for people as a table, for programs as JSON.

It measures nothing. Neighbours: `rounds` (where the values come from), `command` (prints these).
"""

import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct
from rich.table import Table

from common.errors import UsageError
from deploy.bench.options import BenchOptions

Statistic = Literal["median", "worst"]


class Target(Struct, frozen=True, kw_only=True):
    """What A or the ratio should be; the source is the project's targets or an issue."""

    of: Literal["A", "ratio"]
    bound: Literal["at least", "at most"]
    limit: float


class Side(Struct, frozen=True):
    """One of the two things: its value of every round, and the one that stands for them all."""

    name: str
    values: list[float]
    value: float


class Figure(Struct, frozen=True, kw_only=True):
    """One line of the result; `ratio` is `a.value / b.value`, and all values are in `unit`."""

    benchmark: str
    case: str
    unit: str
    statistic: Statistic
    a: Side
    b: Side
    ratio: float
    target: Target | None
    is_met: bool | None
    """None without a target."""


class Report(Struct, frozen=True, kw_only=True):
    """All figures of a run, and what they were measured on."""

    platform: str
    cores: int
    load_average_1min: float
    """After the run, which is a part of it."""
    scale: float
    rounds: int
    figures: list[Figure]


def make_figure(
    benchmark: str,
    case: str,
    unit: str,
    a: tuple[str, Sequence[float]],
    b: tuple[str, Sequence[float]],
    *,
    statistic: Statistic = "median",
    target: Target | None = None,
) -> Figure:
    """Make a figure of two names with their rounds' values, of which neither is empty."""
    sides = [Side(name, list(values), _pick(values, statistic)) for name, values in (a, b)]
    # An idle event loop may be blocked for 0 ms, as far as can be measured.
    ratio = sides[0].value / sides[1].value if sides[1].value else float("inf")
    return Figure(
        benchmark=benchmark,
        case=case,
        unit=unit,
        statistic=statistic,
        a=sides[0],
        b=sides[1],
        ratio=ratio,
        target=target,
        is_met=None if target is None else _is_met(target, sides[0].value, ratio),
    )


def make_report(figures: list[Figure], options: BenchOptions) -> Report:
    """Put the figures beside what they were measured on."""
    return Report(
        platform=platform.platform(),
        cores=os.cpu_count() or 0,
        load_average_1min=os.getloadavg()[0],
        scale=options.scale,
        rounds=options.rounds,
        figures=figures,
    )


def as_table(figures: Sequence[Figure]) -> Table:
    """The result for people: medians (or the worst), lowest and highest round in brackets."""
    table = Table(title="A over B, measured in one run, rounds alternating", title_justify="left")
    for name in ("benchmark", "A / B"):
        table.add_column(name)
    for name in ("A", "B", "ratio"):
        table.add_column(name, justify="right")
    for name in ("unit", "target"):
        table.add_column(name)
    for number, figure in enumerate(figures):
        if number and figures[number - 1].benchmark != figure.benchmark:
            table.add_section()
        what = f"{figure.case}: {figure.a.name} / {figure.b.name}"
        unit = figure.unit if figure.statistic == "median" else f"{figure.unit}, {figure.statistic}"
        ratio = _written(figure.ratio)
        table.add_row(figure.benchmark, what, _cell(figure.a), _cell(figure.b), ratio, unit, _aim(figure))
    return table


def write_json(report: Report, path: Path) -> None:
    """Write the report. Raises UsageError if the file cannot be written."""
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    except OSError as error:
        raise UsageError(f"--json {path}: {error.strerror}") from error


def _pick(values: Sequence[float], statistic: Statistic) -> float:
    return statistics.median(values) if statistic == "median" else max(values)


def _is_met(target: Target, a: float, ratio: float) -> bool:
    reached = a if target.of == "A" else ratio
    return reached >= target.limit if target.bound == "at least" else reached <= target.limit


def _cell(side: Side) -> str:
    if len(side.values) == 1:
        return _written(side.value)
    return f"{_written(side.value)} ({_written(min(side.values))} to {_written(max(side.values))})"


def _aim(figure: Figure) -> str:
    if figure.target is None:
        return ""
    target = figure.target
    style, verdict = ("green", "met") if figure.is_met else ("red", "missed")
    return f"{target.of} {target.bound} {target.limit:g}: [{style}]{verdict}[/]"


def _written(value: float) -> str:
    """Write three digits of a small number, and all before the point of a large one."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
