"""The gate that every attempt of a prompt passes: closed while generation is paused, and nothing is sent to workers then.

Whoever waits here holds no worker. A wait ends when the gate opens, when somebody wants no more of the prompt, or with the
request's deadline. Neighbours: `pause_api` (closes and opens it), `attempts` (waits here), `registry` (who wants what to end).
"""

import asyncio

from common.errors import DeadlineExceeded
from router.registry import OpenSample


class Gate:
    """Open at first."""

    def __init__(self) -> None:
        self._opened = asyncio.Event()
        self._opened.set()

    @property
    def is_closed(self) -> bool:
        """Whether whoever comes has to wait."""
        return not self._opened.is_set()

    def close(self) -> None:
        """Let nobody through."""
        self._opened.clear()

    def open(self) -> None:
        """Let everybody through."""
        self._opened.set()

    async def wait(self, entry: OpenSample, deadline: float) -> None:
        """Wait until the gate is open or the prompt is aborted.

        `deadline` is in the event loop's time; raises DeadlineExceeded with the stage `paused`.
        """
        while self.is_closed and not entry.is_aborted:
            waits = [asyncio.create_task(event.wait()) for event in (self._opened, entry.aborted)]
            try:
                async with asyncio.timeout_at(deadline):
                    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            except TimeoutError as error:
                message = "the request's deadline passed while generation was paused"
                raise DeadlineExceeded(message, stage="paused") from error
            finally:
                for wait in waits:
                    wait.cancel()
