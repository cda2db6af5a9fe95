"""`python -m deploy.bench`: what returning routed experts costs, on the demo model over 1P+1D and the router.

Rounds with rows and rounds without alternate over one running stack, and their medians are compared: a ratio taken in
one run holds on a busy machine too, where tokens/s alone would not. Nothing is checked here; `deploy.replay` does
that.

Neighbours: `deploy.stack` (the processes), `deploy.replay.client` (the requests).
"""

import asyncio
import statistics
import sys
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from common.config import option, parse_config
from common.errors import TandemError, UsageError
from common.observability.logging import configure_logging
from common.process import run_main
from deploy.demo import demo_checkpoint
from deploy.replay.client import RequestSettings, send_all
from deploy.replay.workload import SHIPPED_WORKLOAD, Sample, load_tokenizer, read_workload
from deploy.stack import StackError, running_stack


class BenchOptions(Struct, frozen=True, kw_only=True):
    """What to measure, and on what."""

    model: Annotated[str, option("checkpoint; default: the demo model", metavar="PATH_OR_ID")] = ""
    device: Annotated[Literal["auto", "cpu", "cuda"], option("where the model runs")] = "cpu"
    rounds: Annotated[int, option("rounds of each kind, after one of each to warm up", unit="rounds", ge=1)] = 5
    concurrency: Annotated[int, option("requests under way at a time", unit="requests", ge=1)] = 16
    max_new_tokens: Annotated[int, option("for each prompt of the workload", unit="tokens", ge=1)] = 32
    workload: Annotated[str, option("prompts, one JSON object a line", metavar="FILE.jsonl")] = str(SHIPPED_WORKLOAD)
    json: Annotated[str, option("write the result there too", metavar="FILE")] = ""


class BenchConfig(Struct, frozen=True):
    """The command's config."""

    bench: BenchOptions = BenchOptions()


class BenchError(TandemError):
    """A request of a measured round failed, so the round means nothing."""


class BenchResult(Struct, frozen=True, kw_only=True):
    """Output tokens/s of each round, their medians, and rows on over rows off."""

    rows_on_tokens_per_s: list[float]
    rows_off_tokens_per_s: list[float]
    median_on_tokens_per_s: float
    median_off_tokens_per_s: float
    rows_on_over_off: float


def main(argv: list[str]) -> int:
    """Run the benchmark; returns the exit code."""
    options = parse_config(
        BenchConfig, argv, prog="python -m deploy.bench", description="Measures what routed experts cost."
    ).bench
    configure_logging("bench", "warning")
    disable_progress_bar()
    model = options.model or str(demo_checkpoint())
    tokenizer = load_tokenizer(model)
    samples = read_workload(Path(options.workload), max_new_tokens=options.max_new_tokens, tokenizer=tokenizer)
    try:
        with running_stack([f"--model={model}", f"--device={options.device}"]) as stack:
            result = measure(stack.url, samples, options)
    except (StackError, BenchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    Console().print(as_table(result))
    if options.json:
        _write_json(result, Path(options.json))
    return 0


def measure(url: str, samples: list[Sample], options: BenchOptions) -> BenchResult:
    """Run the rounds against a stack that is up. Raises BenchError if a request fails."""
    speeds: dict[bool, list[float]] = {True: [], False: []}
    for round_number in range(options.rounds + 1):
        # Each kind goes first in every other round: what a round leaves behind favours neither.
        for rows in (True, False) if round_number % 2 else (False, True):
            speed = _run_round(url, samples, options, rows=rows)
            # The first round of each kind fills the prefix cache and opens connections.
            if round_number > 0:
                speeds[rows].append(speed)
    on, off = statistics.median(speeds[True]), statistics.median(speeds[False])
    return BenchResult(
        rows_on_tokens_per_s=speeds[True],
        rows_off_tokens_per_s=speeds[False],
        median_on_tokens_per_s=on,
        median_off_tokens_per_s=off,
        rows_on_over_off=on / off,
    )


def as_table(result: BenchResult) -> Table:
    """The result for people."""
    table = Table(title="Output tokens/s through the router, 1P+1D", title_justify="left")
    table.add_column("")
    for name in ("median", "lowest", "highest"):
        table.add_column(name, justify="right")
    for name, speeds in (("rows on", result.rows_on_tokens_per_s), ("rows off", result.rows_off_tokens_per_s)):
        table.add_row(name, *(f"{pick(speeds):.1f}" for pick in (statistics.median, min, max)))
    table.add_section()
    table.add_row("rows on / off", f"{result.rows_on_over_off:.3f}")
    return table


def _run_round(url: str, samples: list[Sample], options: BenchOptions, *, rows: bool) -> float:
    settings = RequestSettings(url=url, concurrency=options.concurrency, temperature=0.0, rows=rows, deadline_s=600.0)
    run = asyncio.run(send_all(samples, settings, lambda: None))
    failures = [outcome.failure for outcome in run.outcomes if outcome.failure]
    if failures:
        raise BenchError(f"{len(failures)} of {len(samples)} requests failed, the first with: {failures[0]}")
    return sum(len(outcome.reply.output_ids) for outcome in run.outcomes if outcome.reply) / run.wall_s


def _write_json(result: BenchResult, path: Path) -> None:
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error


if __name__ == "__main__":
    run_main(main)
