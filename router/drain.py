"""The router's orderly end: what runs may end, and nothing new begins.

Neighbours: `intake` (counts every request here), `process` (begins the end), `workers_api` (tells of it).
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from common.messages import ErrorReport, ReportedError


class Drain:
    """The requests that run at the moment, and whether the router is about to stop."""

    def __init__(self) -> None:
        self.is_draining = False
        self._running: set[asyncio.Task[Any]] = set()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Count the current task as a request as long as it lasts. Raises ReportedError (503) while draining."""
        if self.is_draining:
            raise ReportedError(ErrorReport(status=503, message="the router is shutting down", code="draining"))
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            yield
        finally:
            self._running.remove(task)

    async def finish(self, deadline_s: float) -> None:
        """Let no request in any more, wait until those that run have ended, and cancel those that have not in time."""
        self.is_draining = True
        if self._running:
            _, late = await asyncio.wait(self._running, timeout=deadline_s)
            for task in late:
                task.cancel()
