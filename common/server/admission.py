"""How many answers may be under way in one process: what comes on top is refused at once, with 429.

It knows no engine and no route. Neighbours: `app` (admits each request), `http` (writes the refusal).
"""

from collections.abc import Iterator
from contextlib import contextmanager

from common.messages import ErrorReport, ReportedError


class Admission:
    """Counts the open answers of one event loop; a request with n samples or several prompts has several."""

    def __init__(self, max_open: int) -> None:
        self._max_open = max_open
        self.num_open = 0

    @contextmanager
    def admit(self, num_answers: int) -> Iterator[None]:
        """Hold places for a request's answers, all or none. Raises ReportedError with status 429."""
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
