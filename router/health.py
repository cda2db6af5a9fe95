"""Asks every worker's GET /health all the time, and says who is healthy.

    200                       healthy; it says how many attention groups it has
    another status            unhealthy at once, and its legs fail, unless it says that it goes on with them
    no connection             unhealthy at once: the process is gone, or about to be; its legs end by themselves
    no answer for a while     unhealthy, and its legs fail: a stopped process never closes its connections

A worker counts as healthy until it has been asked for the first time, one interval after it has come. The legs of one that
says that it is paused get so much more time. Neighbours: `membership` (who there is; its leases' time passes here), `worker`
(is told), `app` (runs this).
"""

import asyncio
import contextlib
import json
from typing import Annotated

import aiohttp
import msgspec
from msgspec import Meta, Struct

from common.server.http import TAKES_NO_MORE
from router.config import RouterOptions
from router.legs import read_at_most
from router.membership import Membership
from router.worker import Worker

_MAX_ANSWER_BYTES = 2**16
_MAX_REASON_CHARS = 300
_MAX_GROUPS = 4096


class _Healthy(Struct):
    """What is read of a good answer."""

    dp_size: Annotated[int, Meta(ge=1, le=_MAX_GROUPS)] = 1
    paused: bool = False
    weight_version: str | None = None
    model_path: str | None = None


class HealthChecks:
    """The health checks of all workers; each is asked on its own, so that a slow one delays no other."""

    def __init__(self, session: aiohttp.ClientSession, membership: Membership, options: RouterOptions) -> None:
        self.ended = asyncio.Event()
        """Nobody is asked any more; a router that was not told to stop must not go on then."""
        self._session = session
        self._membership = membership
        self._options = options
        self._round: asyncio.Task[None] | None = None
        self._next_round: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Ask for ever, all workers that there are at the moment."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._pass_time())
                watches: dict[Worker, asyncio.Task[None]] = {}
                while True:
                    self._membership.changed.clear()
                    workers = set(self._membership.workers)
                    for worker in watches.keys() - workers:
                        watches.pop(worker).cancel()
                    for worker in workers - watches.keys():
                        watches[worker] = tasks.create_task(self._watch(worker))
                    await self._membership.changed.wait()
        finally:
            self.ended.set()

    async def ask_unwell(self) -> None:
        """Ask the workers that are unhealthy once, now; one that does not answer in time is left as it was.

        All who come meanwhile wait for the next round together: what this one asked for may be out of date.
        """
        if self._next_round is None:
            self._next_round = asyncio.create_task(self._ask_round())
        await asyncio.shield(self._next_round)

    async def _ask_round(self) -> None:
        if self._round is not None:
            await asyncio.wait([self._round])
        self._round, self._next_round = self._next_round, None
        unwell = [worker for worker in self._membership.workers if worker.is_unwell]
        await asyncio.gather(*map(self._ask_in_time, unwell))

    async def _ask_in_time(self, worker: Worker) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._options.health_timeout_s):
                await self._ask(worker)

    async def _pass_time(self) -> None:
        # Counted as in `_watch`: nobody could renew a lease while our own process was paused.
        while True:
            await asyncio.sleep(self._options.health_interval_s)
            self._membership.pass_time(self._options.health_interval_s)

    async def _watch(self, worker: Worker) -> None:
        # Counted in what we meant to wait, so that a pause of our own process passes for nobody's silence.
        options, silent_s, loop = self._options, 0.0, asyncio.get_running_loop()
        last_answer = loop.time()
        while True:
            await asyncio.sleep(options.health_interval_s)
            silent_s += options.health_interval_s
            left_s = options.unhealthy_after_s - silent_s
            timeout_s = min(options.health_timeout_s, left_s) if left_s > 0 else options.health_timeout_s
            try:
                async with asyncio.timeout(timeout_s):
                    has_answered = await self._ask(worker)
            except TimeoutError:
                has_answered = False
                silent_s += timeout_s
            if has_answered:
                silent_s = 0.0
                now = loop.time()
                if worker.is_paused:
                    worker.postpone_legs(now - last_answer)
                last_answer = now
            elif silent_s >= options.unhealthy_after_s:
                reason = f"no answer to /health for {options.unhealthy_after_s:g} s"
                worker.mark_unhealthy(reason, ends_legs=True)

    async def _ask(self, worker: Worker) -> bool:
        """Ask once; says whether there was an answer, be it a bad one. Raises TimeoutError if there is no connection in time."""
        try:
            async with self._session.get(f"{worker.url}/health") as response:
                body = await read_at_most(response.content, _MAX_ANSWER_BYTES)
        except aiohttp.ServerTimeoutError:
            raise
        except aiohttp.ClientConnectorError as error:
            worker.mark_unhealthy(f"no connection: {error}", ends_legs=False)
            return True
        except (aiohttp.ClientError, OSError):
            return False
        if response.status == 200:
            said = _read_good(body)
            worker.mark_healthy(
                said.dp_size, is_paused=said.paused, weight_version=said.weight_version, model=said.model_path
            )
        else:
            status, reason = _read_bad(response.status, body)
            worker.mark_unhealthy(reason, ends_legs=status not in TAKES_NO_MORE)
        return True


def _read_good(body: bytearray) -> _Healthy:
    """Read what a healthy worker says of itself; the defaults if that is nothing of use."""
    try:
        return msgspec.json.decode(body, type=_Healthy)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _Healthy()


def _read_bad(http_status: int, body: bytearray) -> tuple[object, str]:
    """Read a bad answer: the status in it, and the reason that it gives."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    told = answer if isinstance(answer, dict) else {}
    status = told.get("status")
    reason = told.get("reason") or status or f"HTTP {http_status}"
    return status, f"it says: {str(reason)[:_MAX_REASON_CHARS]}"
