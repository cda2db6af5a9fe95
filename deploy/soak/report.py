"""The report of a soak: sums over verdicts, faults and leftovers, as a table for people and as JSON for programs.

`Summary.is_good` is the exit code: most requests were answered, and nothing was unnamed, hung, wrong or left behind.

It knows no HTTP and no process. Neighbours: `judge`, `faults` and `workers`, whose findings it adds up.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct
from rich.table import Table

from common.errors import UsageError
from deploy.soak.faults import Fault
from deploy.soak.judge import Compared, Verdict
from deploy.soak.workers import Leftover
from deploy.stack import StackEvent

LEAST_ANSWERED = 0.7
"""Of the requests that we let be."""
MAX_PROBLEMS_SHOWN = 20


class Summary(Struct, frozen=True, kw_only=True):
    """One soak in numbers. Rows are counted by position and layer, times are in seconds."""

    requests: int
    let_be: int
    """Requests whose end we did not ask for."""
    answered: int
    """Of those."""
    ours: dict[str, int]
    """How the others ended."""
    failed: dict[str, int]
    """Errors by leg, stage and code, of all requests."""
    unnamed: int
    hung: int
    compared: Compared
    leaked_pages: dict[str, int]
    """By worker."""
    unclean_workers: list[str]
    """Those that still hold something, or do not answer."""
    faults: dict[str, int]
    """By kind."""
    skipped_faults: int
    restarts: int
    unexplained_ends: int
    """How often a process ended that no fault had struck; for the reader to judge."""
    ready_s: list[float]
    """From a fault to its worker's `ready`, of those that were started again."""
    serving_s: list[float]
    """From any fault until the router counts its worker among the healthy ones."""
    unrecovered: int
    """Faults that were not got over in time."""
    wall_s: float
    problems: list[str]

    @property
    def answered_part(self) -> float:
        """How many of the requests that we let be were answered, of 1."""
        return self.answered / self.let_be if self.let_be else 0.0

    @property
    def is_good(self) -> bool:
        """The promise held."""
        wrong = self.compared.wrong_rows + self.compared.wrong_tokens
        is_broken = self.unnamed or self.hung or wrong or sum(self.leaked_pages.values())
        is_whole = not self.unclean_workers and not self.unrecovered
        return not is_broken and is_whole and self.answered_part >= LEAST_ANSWERED


def summarize(
    verdicts: Sequence[Verdict],
    faults: Sequence[Fault],
    leftovers: Sequence[Leftover],
    *,
    events: Sequence[StackEvent],
    skipped_faults: int,
    wall_s: float,
) -> Summary:
    """Add everything up; `events` are the stack's."""
    ends = [event for event in events if event.kind == "ended"]
    unexplained = [end for end in ends if not any(fault.explains(end) for fault in faults)]
    let_be = [verdict for verdict in verdicts if not verdict.is_ours]
    ended = Counter(verdict.end for verdict in verdicts)
    return Summary(
        requests=len(verdicts),
        let_be=len(let_be),
        answered=sum(verdict.end == "answered" for verdict in let_be),
        ours=dict(Counter(verdict.end for verdict in verdicts if verdict.is_ours)),
        failed=dict(Counter(verdict.cause for verdict in verdicts if verdict.end == "failed").most_common()),
        unnamed=ended["unnamed"],
        hung=ended["hung"],
        compared=sum((verdict.compared for verdict in verdicts), Compared()),
        leaked_pages={leftover.name: leftover.leaked_pages for leftover in leftovers},
        unclean_workers=[leftover.name for leftover in leftovers if not leftover.is_clean],
        faults=dict(sorted(Counter(fault.kind for fault in faults).items())),
        skipped_faults=skipped_faults,
        restarts=sum(event.kind == "restarted" for event in events),
        unexplained_ends=len(unexplained),
        ready_s=[fault.ready_s for fault in faults if fault.ready_s is not None],
        serving_s=[fault.serving_s for fault in faults if fault.serving_s is not None],
        unrecovered=sum(fault.serving_s is None or (fault.ends_worker and fault.ready_s is None) for fault in faults),
        wall_s=wall_s,
        problems=[
            *_problems_of_requests(verdicts),
            *_problems_of_workers(leftovers),
            *(end.detail for end in unexplained),
        ],
    )


def write_json(summary: Summary, path: Path) -> None:
    """Write the summary with `is_good`; raises UsageError if the file cannot be written."""
    content = msgspec.to_builtins(summary) | {"answered_part": summary.answered_part, "is_good": summary.is_good}
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error


def as_table(summary: Summary) -> Table:
    """The report as a table of two columns."""
    table = Table(title="Soak", show_header=False, title_justify="left")
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_row("requests", f"{summary.requests}")
    table.add_row("  whose end we asked for", _listed(summary.ours))
    colour = "green" if summary.answered_part >= LEAST_ANSWERED else "bold red"
    table.add_row("  answered, of the others", f"[{colour}]{summary.answered_part:.1%}[/]")
    for cause, count in summary.failed.items():
        table.add_row(f"  failed: {cause}", f"{count}")
    table.add_row("unnamed ends", _count(summary.unnamed))
    table.add_row("hung", _count(summary.hung))
    table.add_section()
    table.add_row("(token, layer) rows compared", f"{summary.compared.rows}")
    table.add_row("  wrong", _count(summary.compared.wrong_rows))
    table.add_row("tokens compared", f"{summary.compared.tokens}")
    table.add_row("  wrong", _count(summary.compared.wrong_tokens))
    table.add_section()
    for name, count in summary.leaked_pages.items():
        table.add_row(f"pages leaked by {name}", _count(count))
    table.add_row("workers that still hold something", _count(len(summary.unclean_workers)))
    table.add_section()
    for kind, count in summary.faults.items():
        table.add_row(kind, f"{count}")
    table.add_row("skipped: nobody to strike", f"{summary.skipped_faults}")
    table.add_row("restarts", f"{summary.restarts}")
    table.add_row("  after an end that no fault explains", f"{summary.unexplained_ends}")
    table.add_row("faults not got over", _count(summary.unrecovered))
    table.add_row("fault to ready: median, worst", _median_and_worst(summary.ready_s))
    table.add_row("fault to healthy: median, worst", _median_and_worst(summary.serving_s))
    table.add_row("wall time", f"{summary.wall_s:.0f} s")
    return table


def problem_lines(summary: Summary) -> list[str]:
    """The first problems in words, and how many more there are."""
    more = len(summary.problems) - MAX_PROBLEMS_SHOWN
    return summary.problems[:MAX_PROBLEMS_SHOWN] + ([f"and {more} more problems"] if more > 0 else [])


def _problems_of_requests(verdicts: Sequence[Verdict]) -> list[str]:
    problems = []
    for verdict in verdicts:
        wrong = verdict.compared.wrong_rows, verdict.compared.wrong_tokens
        where = f"{verdict.at_s:.1f} s, {verdict.rid}"
        if any(wrong):
            problems.append(f"{where}: {wrong[0]} wrong rows, {wrong[1]} wrong tokens")
        if verdict.end in ("unnamed", "hung"):
            problems.append(f"{where}: {verdict.end}: {verdict.cause} {verdict.detail}")
    return problems


def _problems_of_workers(leftovers: Sequence[Leftover]) -> list[str]:
    return [f"{leftover}" for leftover in leftovers if not leftover.is_clean]


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def _median_and_worst(times_s: Sequence[float]) -> str:
    return f"{statistics.median(times_s):.1f} s, {max(times_s):.1f} s" if times_s else "none"


def _count(number: int) -> str:
    """A number that should be 0."""
    return f"[bold red]{number}[/]" if number else "[green]0[/]"
