"""`python -m deploy.soak`: two prefill and two decode workers under load, while their processes are killed and stopped.

Every answer is compared with transformers' own model, bit for bit; every failure must name its leg and its stage; at the
end every page must have come back. Exit code 0 only if all of that holds and most requests were answered; 1 otherwise, 2
for a usage error.

Neighbours, in this order: `setting` (the stack), `cases` (what is right), `load` (requests), `faults` (blows), `workers`
(pages), `report`.
"""

import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import aiohttp
import torch
from msgspec import Struct
from rich.console import Console
from rich.markup import escape
from transformers.utils.logging import disable_progress_bar

from common.config import option, parse_config
from common.observability.logging import configure_logging
from deploy.demo import demo_checkpoint
from deploy.launch_options import split_flags
from deploy.soak.cases import Case, draw_cases
from deploy.soak.faults import RECOVERY_DEADLINE_S, Faults
from deploy.soak.load import Load
from deploy.soak.report import Summary, as_table, problem_lines, summarize, write_json
from deploy.soak.setting import FLAGS, QUIET_DEADLINE_S
from deploy.soak.workers import Workers
from deploy.stack import Stack, StackError, make_stack

_LEAST_WIDTH = 120


class SoakOptions(Struct, frozen=True, kw_only=True):
    """How long, how hard, and with which model."""

    minutes: Annotated[float, option("how long requests are sent and faults strike", unit="minutes", gt=0)] = 10.0
    seed: Annotated[int, option("of prompts, load and faults")] = 0
    fault_every_s: Annotated[float, option("pause between two faults", unit="s", gt=0)] = 5.0
    concurrency: Annotated[int, option("requests under way at a time", unit="requests", ge=1)] = 12
    prompts: Annotated[int, option("different prompts to draw from", unit="prompts", ge=2)] = 48
    client_deadline_s: Annotated[
        float, option("a request that has not ended by then counts as hung", unit="s", gt=0)
    ] = 60.0
    model: Annotated[str, option("a small checkpoint; default: the demo's", metavar="FOLDER")] = ""
    json: Annotated[str, option("write the report there too", metavar="FILE.json")] = ""
    log: Annotated[str, option("write the output of all processes there; default: stderr", metavar="FILE")] = ""


class SoakConfig(Struct, frozen=True):
    """The command's config."""

    soak: SoakOptions


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    own, flags = split_flags(argv)
    options = parse_config(
        SoakConfig,
        own,
        prog="python -m deploy.soak",
        description="Kills and stops processes under load, and checks all. Flags of deploy.up may follow behind `--`.",
    ).soak
    configure_logging("soak", "info")
    disable_progress_bar()
    # More would fight over the cores that the stack keeps busy.
    torch.set_num_threads(1)
    try:
        summary = asyncio.run(soak(options, flags))
    except StackError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return conclude(summary, options.json)


def conclude(summary: Summary, json: str = "") -> int:
    """Print the report on stdout, and to a file if one is named; returns the exit code."""
    console = Console()
    # Where there is no terminal, its assumed 80 columns would break the longer lines.
    console.width = max(console.width, _LEAST_WIDTH)
    console.print(as_table(summary))
    for problem in problem_lines(summary):
        console.print(escape(problem), soft_wrap=True)
    if json:
        write_json(summary, Path(json))
    return 0 if summary.is_good else 1


async def soak(options: SoakOptions, flags: Sequence[str] = ()) -> Summary:
    """Start a stack, with these flags besides the soak's own, soak it, and sum up.

    Raises UsageError, and StackError if the stack cannot start or go on.
    """
    checkpoint = Path(options.model) if options.model else demo_checkpoint()
    cases = draw_cases(checkpoint, options.seed, options.prompts)
    log_file = Path(options.log) if options.log else None
    async with make_stack([f"--model={checkpoint}", *FLAGS, *flags], log_file=log_file) as stack:
        soaking = asyncio.create_task(_soak(stack, cases, options))
        watching = asyncio.create_task(stack.wait())
        try:
            await asyncio.wait((soaking, watching), return_when=asyncio.FIRST_COMPLETED)
            # Nothing can be said of the rest of a stack.
            return watching.result() if watching.done() else soaking.result()
        finally:
            watching.cancel()
            soaking.cancel()
            await asyncio.wait((soaking, watching))


async def _soak(stack: Stack, cases: list[Case], options: SoakOptions) -> Summary:
    load = Load(
        stack.url,
        cases,
        seed=options.seed,
        concurrency=options.concurrency,
        deadline_s=options.client_deadline_s,
    )
    async with aiohttp.ClientSession() as session:
        workers = Workers(session, stack)
        faults = Faults(stack, workers, seed=options.seed, every_s=options.fault_every_s)
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            group.create_task(load.run())
            group.create_task(faults.run(options.minutes * 60))
            await asyncio.sleep(options.minutes * 60)
            load.stop()
        wall_s = time.monotonic() - began
        await workers.until_healthy({*stack.names("prefill"), *stack.names("decode")}, RECOVERY_DEADLINE_S)
        leftovers = await workers.leftovers(QUIET_DEADLINE_S)
    return summarize(
        load.verdicts,
        faults.dealt,
        leftovers,
        events=stack.events,
        skipped_faults=faults.num_skipped,
        wall_s=wall_s,
    )
