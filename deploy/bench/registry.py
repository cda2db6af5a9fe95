"""Every benchmark by its name, in the order in which they run; a new one is a file and a line here."""

from collections.abc import Callable
from typing import NamedTuple

from deploy.bench import loop_stall, recovery, reply_format, router_rate, rows_on_off, start_len
from deploy.bench.figures import Figure
from deploy.bench.options import BenchOptions


class Benchmark(NamedTuple):
    """A benchmark: `run` raises BenchError or StackError if what it measures fails."""

    name: str
    description: str
    run: Callable[[BenchOptions], list[Figure]]


BENCHMARKS = {
    each.name: each
    for each in (
        Benchmark("start_len", "collecting few rows against collecting all", start_len.run),
        Benchmark("reply_format", "making and reading a reply as msgpack against int32 JSON", reply_format.run),
        Benchmark("loop_stall", "how long a long reply blocks the event loops", loop_stall.run),
        Benchmark("router_rate", "requests/s through the router against less than the router", router_rate.run),
        Benchmark("rows_on_off", "output tokens/s with rows against without, on a whole stack", rows_on_off.run),
        Benchmark("recovery", "what a stopped or killed worker costs, and for how long it is missing", recovery.run),
    )
}
