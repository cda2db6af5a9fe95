"""What happens to the children of a stack: events, and the errors that are its end.

Neighbours: `deploy.child` and `deploy.stack`.
"""

import signal
from typing import Literal

from msgspec import Struct

from common.errors import TandemError

EventKind = Literal["started", "ready", "fenced", "ended", "restarted"]


class StackError(TandemError):
    """The stack could not start, or could not go on."""


class ChildError(StackError):
    """A child ended by itself. `returncode` is negative for a signal."""

    def __init__(self, name: str, returncode: int, message: str | None = None) -> None:
        how = (
            f"was killed by {signal.Signals(-returncode).name}" if returncode < 0 else f"exited with code {returncode}"
        )
        super().__init__(message or f"{name} {how}")
        self.name = name
        self.returncode = returncode


class ChildFenced(ChildError):
    """A child was killed because it stayed silent."""

    def __init__(self, name: str, returncode: int, why: str) -> None:
        super().__init__(name, returncode, f"{name} was fenced: {why}")


class StackEvent(Struct, frozen=True):
    """Something that happened to the child `name`, `at` a time of `time.monotonic()`, in seconds.

    A fenced child's "ended" follows; "ready" is its first good answer after a start.
    """

    at: float
    name: str
    kind: EventKind
    detail: str = ""
