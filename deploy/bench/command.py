"""`python -m deploy.bench`: what things cost, each as a ratio of two things that are measured in one run.

    rows_on_off    output tokens/s with routed experts over without, 1P+1D and the router, demo model
    start_len      collecting 64 rows of a long request, over collecting all of them
    reply_format   making and reading a reply full of rows: msgpack over int32 JSON
    router_rate    requests/s through the router, over a worker asked directly and over the least that a proxy can do
    loop_stall     how long making a long reply blocks an event loop, over how long it blocks when idle
    recovery       p99 with one of two prefill workers stopped, over before; how long a killed one is missing

The two sides' rounds alternate, so a ratio holds on a busy machine too, where absolute times would not. Nothing is
checked here; `deploy.replay` does that. Neighbours: `registry` (one file a benchmark), `figures` (table and JSON).

A first word makes it another command with options of its own, `deploy.bench.speed`'s: tokens/s by workload, on a GPU.

    offline        the engine alone, in this process
    online         a whole stack, or any OpenAI-compatible server, over HTTP
    shape FOLDER   write a checkpoint without weights, of the shape that the targets are about
"""

import sys
from pathlib import Path

from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from common.config import parse_config
from common.errors import UsageError
from common.observability.logging import configure_logging
from deploy.bench.figures import Figure, as_table, make_report, write_json
from deploy.bench.options import BenchConfig, BenchError
from deploy.bench.registry import BENCHMARKS, Benchmark
from deploy.bench.speed import offline, online, shape
from deploy.stack import StackError

_LEAST_WIDTH = 150

COMMANDS = {"offline": offline.main, "online": online.main, "shape": shape.main}
"""By the first word of the command line; without one, the ratios."""


def main(argv: list[str]) -> int:
    """Run the benchmarks that are asked for; returns the exit code, 1 if one of them could not be run."""
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    options = parse_config(
        BenchConfig,
        argv,
        prog="python -m deploy.bench",
        description="Measures ratios on this machine, on the CPU. `offline`, `online` and `shape` as the first word are"
        " commands of their own, about speed on a GPU: see their --help.",
    ).bench
    chosen = choose(options.only)
    configure_logging("bench", "warning")
    disable_progress_bar()
    progress = Console(stderr=True)
    figures: list[Figure] = []
    failed = False
    for benchmark in chosen:
        progress.print(f"{benchmark.name}: {benchmark.description}", soft_wrap=True)
        try:
            figures += benchmark.run(options)
        except (StackError, BenchError) as error:
            print(f"error: {benchmark.name}: {error}", file=sys.stderr)
            failed = True
    console = Console()
    # Where there is no terminal, its assumed 80 columns would break every cell.
    console.width = max(console.width, _LEAST_WIDTH)
    console.print(as_table(figures))
    if options.json:
        write_json(make_report(figures, options), Path(options.json))
    return 1 if failed else 0


def choose(only: str) -> list[Benchmark]:
    """Find the benchmarks of a comma-separated list of names, all of them for "". Raises UsageError."""
    names = [name.strip() for name in only.split(",") if name.strip()]
    for name in names:
        if name not in BENCHMARKS:
            raise UsageError(f"--only {name}: no such benchmark; there are {', '.join(BENCHMARKS)}")
    return [benchmark for name, benchmark in BENCHMARKS.items() if name in names or not names]
