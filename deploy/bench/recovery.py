"""recovery: what a failing worker costs those who have nothing to do with it, and for how long it is missing.

On 2P+1D with the demo model. First one prefill engine is stopped (SIGSTOP) under load; once the router sends nothing there any
more, requests go on as if it was not there, and their 99th percentile is compared with that of before. It is continued, then
the other prefill worker is killed: the launcher starts it again, and the first answer that comes through it is waited for.

Neighbours: `deploy.stack` (the processes), `deploy.soak` (the same with random faults, as a check and not as a measurement).
"""

import asyncio
import os
import random
import signal
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from common.errors import TandemError
from deploy.bench.figures import Figure, Target, make_figure
from deploy.bench.options import BenchError, BenchOptions
from deploy.client import TandemClient
from deploy.connection import NO_RETRIES
from deploy.demo import demo_checkpoint
from deploy.stack import Stack, make_stack

_NAME = "recovery"
_NUM_REQUESTS = 300
_CONCURRENCY = 4
_POLL_S = 0.02
_DEADLINE_S = 60.0
# The stopped worker is to be continued by the benchmark, not killed by the launcher.
_FLAGS = ["--prefill=2", "--decode=1", "--restart", "--fence-deadline-s=600", "--device=cpu"]


def run(options: BenchOptions) -> list[Figure]:
    """Start a stack and hurt it. Raises UsageError, StackError or BenchError."""
    return asyncio.run(_run(options))


async def _run(options: BenchOptions) -> list[Figure]:
    model = options.model or str(demo_checkpoint())
    rounds = min(3, options.rounds)
    calm: list[float] = []
    hurt: list[float] = []
    back: list[float] = []
    away: list[float] = []
    async with (
        make_stack([f"--model={model}", *_FLAGS]) as stack,
        _client_of(stack.url) as router,
    ):
        stopped, killed = stack.names("prefill")
        client = _Load(router, stack)
        num_requests = options.scaled(_NUM_REQUESTS, least=20)
        await client.p99_ms(num_requests)  # opens connections, makes handshakes
        for _ in range(rounds):
            calm.append(await client.p99_ms(num_requests))
            pid, *_ = stack.engine_pids(stopped)
            os.kill(pid, signal.SIGSTOP)
            try:
                await client.until_healthy(stopped, False)
                hurt.append(await client.p99_ms(num_requests))
            finally:
                os.kill(pid, signal.SIGCONT)
            await client.until_healthy(stopped, True)
        for _ in range(rounds):
            served_s, missing_s = await _kill(stack, client, killed)
            back.append(served_s)
            away.append(missing_s)
    return [
        make_figure(
            _NAME,
            "p99, one of two prefill engines stopped",
            "ms",
            ("router knows", hurt),
            ("before", calm),
            target=Target(of="ratio", bound="at most", limit=2.0),
        ),
        make_figure(
            _NAME,
            "prefill engine killed",
            "s",
            ("new process ready to first answer", back),
            ("killed to ready", away),
            target=Target(of="A", bound="at most", limit=10.0),
        ),
    ]


async def _kill(stack: Stack, client: "_Load", victim: str) -> tuple[float, float]:
    """Kill a worker's engine; from its being ready again to the first answer through it, and from the kill until then, in s."""
    num_starts = stack.num_starts(victim)
    killed_at = time.monotonic()
    os.kill(stack.engine_pids(victim)[0], signal.SIGKILL)
    await stack.wait_started(victim, num_starts + 1)
    ready_at = next(event.at for event in reversed(stack.events) if (event.name, event.kind) == (victim, "ready"))
    await client.until_used(victim)
    return time.monotonic() - ready_at, ready_at - killed_at


def _client_of(url: str) -> TandemClient:
    """Nothing is tried again: what fails is to be seen."""
    return TandemClient(url, deadline_s=_DEADLINE_S, retries=NO_RETRIES)


class _Load:
    """Sends requests, and watches what the router thinks of its workers."""

    def __init__(self, router: TandemClient, stack: Stack) -> None:
        self._router = router
        self._urls = {command.name: command.url for command in stack.plan.commands}
        self._random = random.Random(0)

    async def p99_ms(self, num_requests: int) -> float:
        """Send requests, some at a time, and give the 99th percentile of their times. Raises BenchError if one fails."""
        gate = asyncio.Semaphore(_CONCURRENCY)

        async def one() -> float:
            async with gate:
                started = time.perf_counter()
                await self._generate()
                return (time.perf_counter() - started) * 1000

        times = await asyncio.gather(*(one() for _ in range(num_requests)))
        return statistics.quantiles(times, n=100)[98]

    async def _generate(self) -> None:
        prompt = [self._random.randrange(3, 200) for _ in range(self._random.randrange(1, 32))]
        try:
            await self._router.generate(
                input_ids=prompt, sampling_params={"max_new_tokens": 16, "ignore_eos": True}, form="int32"
            )
        except TandemError as error:
            raise BenchError(f"a request failed: {error}") from error

    async def until_healthy(self, name: str, is_healthy: bool) -> None:
        """Wait until the router thinks so of a worker. Raises BenchError past the deadline."""
        async with _deadline(f"the router to call {name} {'healthy' if is_healthy else 'unhealthy'}"):
            while True:
                entry = await self._entry(name)
                if entry["healthy"] is is_healthy:
                    return
                await asyncio.sleep(_POLL_S)

    async def until_used(self, name: str) -> None:
        """Send requests until one has gone through a worker. Raises BenchError past the deadline."""
        async with _deadline(f"a request to go through {name}"):
            before = await self._num_kv_bytes(name)
            while await self._num_kv_bytes(name) == before:
                await asyncio.gather(*(self._generate() for _ in range(2)))

    async def _entry(self, name: str) -> dict[str, object]:
        return next(worker for worker in await self._router.workers() if worker["url"] == self._urls[name])

    async def _num_kv_bytes(self, name: str) -> int:
        """How many bytes of KV a worker has sent, which grow with each prompt that goes through it."""
        async with _client_of(self._urls[name]) as worker:
            num_bytes: int = (await worker.server_info())["stats"]["kv_bytes"]
        return num_bytes


@asynccontextmanager
async def _deadline(what: str) -> AsyncIterator[None]:
    """Bound a wait, and say what was waited for."""
    try:
        async with asyncio.timeout(_DEADLINE_S):
            yield
    except TimeoutError as error:
        raise BenchError(f"waited {_DEADLINE_S:g} s for {what}") from error
