"""The report of a replay: sums over the verdicts, as a table for people and as JSON for programs.

`Summary.is_good` is the exit code: nothing failed, no row is bad, nothing differs from the reference except ties.
Rows in another order than the reference's are shown but harmless: routing weights are looked up by expert id.

It knows no HTTP and no rows, only the verdicts of `deploy.replay.judge`.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct
from rich.table import Table

from common.errors import UsageError
from deploy.replay.check import RowCounts
from deploy.replay.judge import Verdict

MAX_PROBLEMS_SHOWN = 10


class ReferenceSummary(Struct, frozen=True, kw_only=True):
    """What the reference says of all requests together."""

    rows_compared: int
    rows_differ: int
    rows_reordered: int
    tokens_compared: int
    tokens_differ: int
    requests_excused_as_ties: int


class Summary(Struct, frozen=True, kw_only=True):
    """One replay in numbers. `rows` and `reference` are None if they were not asked for."""

    requests: int
    failed_requests: int
    prompt_tokens: int
    output_tokens: int
    rows: RowCounts | None
    bad_rows: int
    range_checked: bool
    reference: ReferenceSummary | None
    latency_p50_s: float
    latency_p90_s: float
    latency_p99_s: float
    wall_s: float
    output_tokens_per_s: float
    problems: list[str]

    @property
    def is_good(self) -> bool:
        """Nothing is bad."""
        differ = 0 if self.reference is None else self.reference.rows_differ + self.reference.tokens_differ
        return self.failed_requests == 0 and self.bad_rows == 0 and differ == 0


def summarize(
    verdicts: Sequence[Verdict], wall_s: float, *, rows: bool, range_checked: bool, reference: bool
) -> Summary:
    """Add the verdicts up; there is at least one."""
    counts = sum((verdict.counts for verdict in verdicts), RowCounts())
    output_tokens = sum(verdict.output_tokens for verdict in verdicts)
    p50, p90, p99 = (float(p) for p in np.percentile([verdict.latency_s for verdict in verdicts], [50, 90, 99]))
    return Summary(
        requests=len(verdicts),
        failed_requests=sum(verdict.failure is not None for verdict in verdicts),
        prompt_tokens=sum(verdict.prompt_tokens for verdict in verdicts),
        output_tokens=output_tokens,
        rows=counts if rows else None,
        bad_rows=counts.bad,
        range_checked=range_checked,
        reference=_sum_reference(verdicts) if reference else None,
        latency_p50_s=p50,
        latency_p90_s=p90,
        latency_p99_s=p99,
        wall_s=wall_s,
        output_tokens_per_s=output_tokens / wall_s,
        problems=[f"line {verdict.line}: {problem}" for verdict in verdicts for problem in _problems_of(verdict)],
    )


def write_json(summary: Summary, path: Path) -> None:
    """Write the summary with `is_good`; raises UsageError if the file cannot be written."""
    content = msgspec.to_builtins(summary) | {"is_good": summary.is_good}
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error


def as_table(summary: Summary) -> Table:
    """The report as a table of two columns."""
    table = Table(title="Replay", show_header=False, title_justify="left")
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_row("requests", f"{summary.requests}")
    table.add_row("  failed", _count(summary.failed_requests))
    table.add_row("total tokens", f"{summary.prompt_tokens + summary.output_tokens}")
    table.add_row("  output tokens", f"{summary.output_tokens}")
    if summary.rows is not None:
        table.add_section()
        table.add_row("(token, layer) rows", f"{summary.rows.rows}")
        table.add_row("bad rows", _count(summary.bad_rows))
        table.add_row("  all-zero", _count(summary.rows.all_zero))
        table.add_row("  duplicated", _count(summary.rows.duplicated))
        table.add_row("  out of range", _count(summary.rows.out_of_range) if summary.range_checked else "not checked")
        table.add_row("  missing", _count(summary.rows.missing))
        if summary.rows.surplus:
            table.add_row("  too many", _count(summary.rows.surplus))
    if (reference := summary.reference) is not None:
        table.add_section()
        table.add_row("rows compared with the reference", f"{reference.rows_compared}")
        table.add_row("  differ as sets", _count(reference.rows_differ))
        table.add_row("  differ in order only", f"{reference.rows_reordered}")
        table.add_row("greedy tokens compared", f"{reference.tokens_compared}")
        table.add_row("  differ", _count(reference.tokens_differ))
        table.add_row("requests excused as ties", f"{reference.requests_excused_as_ties}")
    table.add_section()
    for name, value_s in (("50", summary.latency_p50_s), ("90", summary.latency_p90_s), ("99", summary.latency_p99_s)):
        table.add_row(f"latency p{name}", f"{value_s * 1000:.0f} ms")
    table.add_row("output tokens/s", f"{summary.output_tokens_per_s:.1f}")
    return table


def problem_lines(summary: Summary) -> list[str]:
    """The first problems in words, and how many more there are."""
    more = len(summary.problems) - MAX_PROBLEMS_SHOWN
    return summary.problems[:MAX_PROBLEMS_SHOWN] + ([f"and {more} more problems"] if more > 0 else [])


def _sum_reference(verdicts: Sequence[Verdict]) -> ReferenceSummary:
    return ReferenceSummary(
        rows_compared=sum(verdict.rows_compared for verdict in verdicts),
        rows_differ=sum(verdict.rows_differ for verdict in verdicts),
        rows_reordered=sum(verdict.rows_reordered for verdict in verdicts),
        tokens_compared=sum(verdict.tokens_compared for verdict in verdicts),
        tokens_differ=sum(verdict.tokens_differ for verdict in verdicts),
        requests_excused_as_ties=sum(verdict.is_tie for verdict in verdicts),
    )


def _problems_of(verdict: Verdict) -> list[str]:
    problems = [verdict.failure] if verdict.failure else []
    if verdict.counts.bad:
        problems.append(f"{verdict.counts.bad} bad rows")
    if verdict.rows_differ:
        problems.append(f"{verdict.rows_differ} rows differ from the reference")
    if verdict.tokens_differ:
        problems.append(f"{verdict.tokens_differ} tokens differ from the reference")
    return problems


def _count(number: int) -> str:
    """A number that should be 0."""
    return f"[bold red]{number}[/]" if number else "[green]0[/]"
