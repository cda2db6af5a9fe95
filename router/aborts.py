"""Telling workers to end legs that nobody waits for any more, in the background.

Closing a leg's connection says the same, but not to a worker that is stopped, or behind a proxy. Nobody waits for the
answers. Neighbours: `attempts` (says which legs), `app` (closes this).
"""

import asyncio
from contextlib import suppress

import aiohttp

from router.membership import Worker


class Aborts:
    """Sends POST /abort_request for single legs."""

    def __init__(self, session: aiohttp.ClientSession, *, deadline_s: float) -> None:
        self._session = session
        self._timeout = aiohttp.ClientTimeout(total=deadline_s)
        # The event loop itself keeps no task alive.
        self._sending: set[asyncio.Task[None]] = set()

    def send(self, worker: Worker, rid: str) -> None:
        """Have a worker end a leg."""
        task = asyncio.create_task(self._send(worker, rid))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def close(self) -> None:
        """Give up what has not been sent yet."""
        for task in self._sending:
            task.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)

    async def _send(self, worker: Worker, rid: str) -> None:
        url = f"{worker.url}/abort_request"
        with suppress(aiohttp.ClientError, OSError, TimeoutError):
            async with self._session.post(url, json={"rid": rid}, timeout=self._timeout):
                pass
