"""Asks every worker's GET /health all the time, and says who is healthy.

    200                       healthy; it says how many attention groups it has
    another status            unhealthy at once, and its legs fail, unless it says that it goes on with them
    no connection             unhealthy at once: the process is gone, or about to be; its legs end by themselves
    no answer for a while     unhealthy, and its legs fail: a stopped process never closes its connections

A worker counts as healthy until it has been asked for the first time, one interval after the start. Neighbours: `membership`
(is told), `app` (runs this).
"""

import asyncio
import json
from typing import Annotated

import aiohttp
import msgspec
from msgspec import Meta, Struct

from common.server.http import TAKES_NO_MORE, together
from router.config import RouterOptions
from router.legs import read_at_most
from router.membership import Membership, Worker

_MAX_ANSWER_BYTES = 2**16
_MAX_REASON_CHARS = 300
_MAX_GROUPS = 4096


class _Healthy(Struct):
    """What is read of a good answer."""

    dp_size: Annotated[int, Meta(ge=1, le=_MAX_GROUPS)] = 1


class HealthChecks:
    """The health checks of all workers; each is asked on its own, so that a slow one delays no other."""

    def __init__(self, session: aiohttp.ClientSession, membership: Membership, options: RouterOptions) -> None:
        self._session = session
        self._membership = membership
        self._options = options

    async def run(self) -> None:
        """Ask for ever."""
        await together([self._watch(worker) for worker in self._membership.workers])

    async def _watch(self, worker: Worker) -> None:
        # Counted in what we meant to wait, so that a pause of our own process passes for nobody's silence.
        options, silent_s = self._options, 0.0
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
            worker.mark_healthy(_dp_size(body))
        else:
            status, reason = _read(response.status, body)
            worker.mark_unhealthy(reason, ends_legs=status not in TAKES_NO_MORE)
        return True


def _dp_size(body: bytearray) -> int:
    """Read how many attention groups a healthy worker has; 1 if it does not say."""
    try:
        return msgspec.json.decode(body, type=_Healthy).dp_size
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return 1


def _read(http_status: int, body: bytearray) -> tuple[object, str]:
    """Read a bad answer: the status in it, and the reason that it gives."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    told = answer if isinstance(answer, dict) else {}
    status = told.get("status")
    reason = told.get("reason") or status or f"HTTP {http_status}"
    return status, f"it says: {str(reason)[:_MAX_REASON_CHARS]}"
