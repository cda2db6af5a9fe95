"""`python -m deploy.replay`: send a workload to a running stack, check every row that comes back, print a report.

Exit code 0 only if nothing is bad: every request answered, every row there and possible and, with `--reference`, the
same as transformers' own model chose. 1 otherwise, 2 for a usage error.

Neighbours: `deploy.replay.workload` -> `client` -> `judge` -> `report`, in this order; `deploy.demo` calls `replay`
too.
"""

import asyncio
from pathlib import Path
from typing import Annotated

from msgspec import Struct
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from transformers.utils.logging import disable_progress_bar

from common.config import option, parse_config
from common.errors import UsageError
from deploy.replay.client import RequestSettings, fetch_num_experts, send_all
from deploy.replay.judge import Judge
from deploy.replay.reference import Reference
from deploy.replay.report import Summary, as_table, problem_lines, summarize, write_json
from deploy.replay.workload import SHIPPED_WORKLOAD, load_tokenizer, read_workload


class ReplayOptions(Struct, frozen=True, kw_only=True):
    """What to send where, and how to judge the answers."""

    url: Annotated[str, option("the router, or a single server", metavar="URL")]
    workload: Annotated[str, option("prompts, one JSON object a line", metavar="FILE.jsonl")] = str(SHIPPED_WORKLOAD)
    concurrency: Annotated[int, option("requests under way at a time", unit="requests", ge=1)] = 16
    max_new_tokens: Annotated[int, option("for prompts that do not say it", unit="tokens", ge=0)] = 32
    temperature: Annotated[float, option("0: greedy", ge=0)] = 0.0
    rows: Annotated[bool, option("ask for routed experts and check them")] = True
    reference: Annotated[str, option("compare with transformers' model of it", metavar="CHECKPOINT")] = ""
    tokenizer: Annotated[str, option("for messages; default: the reference's", metavar="CHECKPOINT")] = ""
    report: Annotated[str, option("write the report there too", metavar="FILE.json")] = ""
    request_deadline_s: Annotated[float, option("longest time that a request may take", unit="s", gt=0)] = 600.0
    api_key: Annotated[str, option("the key that the server asks for", metavar="KEY")] = ""


class ReplayConfig(Struct, frozen=True):
    """The command's config."""

    replay: ReplayOptions


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    options = parse_config(
        ReplayConfig, argv, prog="python -m deploy.replay", description="Replays a workload and checks every row."
    ).replay
    # Its bars would be drawn into log files too; the one bar here is not.
    disable_progress_bar()
    return 0 if replay_and_print(options).is_good else 1


def replay_and_print(options: ReplayOptions) -> Summary:
    """Replay and print the report on stdout, and to a file if asked for."""
    summary = replay(options)
    console = Console()
    console.print(as_table(summary))
    for problem in problem_lines(summary):
        console.print(escape(problem), soft_wrap=True)
    if options.report:
        write_json(summary, Path(options.report))
    return summary


def replay(options: ReplayOptions) -> Summary:
    """Send everything, judge everything. Raises UsageError for a workload, checkpoint or url that cannot be used."""
    url = options.url.rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"--url {options.url}: begins with neither http:// nor https://")
    checkpoint = options.tokenizer or options.reference
    tokenizer = load_tokenizer(checkpoint) if checkpoint else None
    samples = read_workload(Path(options.workload), max_new_tokens=options.max_new_tokens, tokenizer=tokenizer)
    reference = _load_reference(options.reference) if options.reference else None
    settings = RequestSettings(
        url=url,
        concurrency=options.concurrency,
        temperature=options.temperature,
        rows=options.rows,
        deadline_s=options.request_deadline_s,
        api_key=options.api_key,
    )
    terminal = Console(stderr=True)
    with Progress(console=terminal, disable=not terminal.is_terminal) as progress:
        sending = progress.add_task("requests", total=len(samples))
        run = asyncio.run(send_all(samples, settings, lambda: progress.advance(sending)))
        judge = Judge(
            rows=options.rows,
            greedy=options.temperature == 0,
            num_experts=asyncio.run(fetch_num_experts(url, options.api_key)) if options.rows else None,
            tokenizer=tokenizer,
            reference=reference,
        )
        # After the last reply: on a CPU, the reference would take the time of the requests that are being measured.
        judging = progress.add_task("reference" if reference else "checks", total=len(samples))
        verdicts = []
        for outcome in run.outcomes:
            verdicts.append(judge.judge(outcome))
            progress.advance(judging)
    return summarize(
        verdicts,
        run.wall_s,
        rows=options.rows,
        range_checked=judge.num_experts is not None,
        reference=reference is not None,
    )


def _load_reference(checkpoint: str) -> Reference:
    try:
        return Reference(Path(checkpoint))
    except (OSError, ValueError) as error:
        raise UsageError(f"--reference {checkpoint}: {error}") from error
