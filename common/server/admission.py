"""How many answers may be under way in one process: what comes on top is refused at once, with 429, and at its end all.

It knows no engine and no route. Neighbours: `app` (admits each request), `http` (writes the refusal).
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from common.messages import ErrorReport, ReportedError


class Admission:
    """Counts the open answers of one event loop; a request with n samples or several prompts has several."""

    def __init__(self, max_open: int) -> None:
        self._max_open = max_open
        self._all_answered = asyncio.Event()
        self.num_open = 0
        self.is_closed = False

    async def drain(self) -> None:
        """Take no more requests, and wait until the open ones have been answered."""
        self.is_closed = True
        while self.num_open:
            self._all_answered.clear()
            await self._all_answered.wait()

    @contextmanager
    def admit(self, num_answers: int) -> Iterator[None]:
        """Hold places for a request's answers, all or none. Raises ReportedError with status 429, or 503 when draining."""
        if self.is_closed:
            raise ReportedError(ErrorReport(status=503, message="this server is shutting down", code="draining"))
        if self.num_open + num_answers > self._max_open:
            message = (
                f"{num_answers} more would make {self.num_open + num_answers} open requests, "
                f"and this server takes {self._max_open}; try again later"
            )
            raise ReportedError(ErrorReport(status=429, message=message, code="too_many_requests"))
        self.num_open += num_answers
        try:
            yield
        finally:
            self.num_open -= num_answers
            if not self.num_open:
                self._all_answered.set()
