"""One worker's circuit breaker: after too many failures in a row it gets no legs for a while, and then a single one.

    CLOSED --failures in a row--> OPEN --pause over--> HALF_OPEN (one leg, the trial) --success--> CLOSED
                                   ^                       |
                                   '-- failure, or let go -'

It knows no worker and no HTTP, and asks its caller for the time. Neighbours: `membership` (each worker has one), `leg_run`
(tells it how a leg went).
"""

import time
from collections.abc import Callable
from enum import Enum


class BreakerState(Enum):
    """Whether legs get through."""

    CLOSED = "closed"
    """All do."""
    OPEN = "open"
    """None does until the pause is over."""
    HALF_OPEN = "half_open"
    """One is there, the trial, and no other gets through."""


_LEGAL: dict[BreakerState, frozenset[BreakerState]] = {
    BreakerState.CLOSED: frozenset({BreakerState.OPEN}),
    BreakerState.OPEN: frozenset({BreakerState.HALF_OPEN}),
    BreakerState.HALF_OPEN: frozenset({BreakerState.CLOSED, BreakerState.OPEN}),
}


class Breaker:
    """Counts failures in a row. Legs that began before it opened say nothing about the worker as it is now."""

    def __init__(self, *, max_failures: int, pause_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.state = BreakerState.CLOSED
        self._max_failures = max_failures
        self._pause_s = pause_s
        self._clock = clock
        self._num_failures = 0
        self._pause_ends = 0.0

    @property
    def lets_through(self) -> bool:
        """Whether a leg may begin now."""
        is_trial_due = self.state is BreakerState.OPEN and self._clock() >= self._pause_ends
        return self.state is BreakerState.CLOSED or is_trial_due

    def begin(self) -> bool:
        """Begin a leg, which must get through; says whether it is the trial."""
        assert self.lets_through
        is_trial = self.state is BreakerState.OPEN
        if is_trial:
            self._advance(BreakerState.HALF_OPEN)
        return is_trial

    def succeeded(self, *, is_trial: bool) -> None:
        """Note that a leg has ended well."""
        if is_trial:
            self._advance(BreakerState.CLOSED)
        if self.state is BreakerState.CLOSED:
            self._num_failures = 0

    def failed(self, *, is_trial: bool) -> None:
        """Note that a leg has failed through its worker's fault."""
        if self.state is BreakerState.CLOSED:
            self._num_failures += 1
        if is_trial or (self.state is BreakerState.CLOSED and self._num_failures >= self._max_failures):
            self._advance(BreakerState.OPEN)
            self._pause_ends = self._clock() + self._pause_s

    def let_go(self, *, is_trial: bool) -> None:
        """Note that a leg ended and says nothing of its worker; the next one is then the trial, without another pause."""
        if is_trial:
            self._advance(BreakerState.OPEN)

    def _advance(self, state: BreakerState) -> None:
        assert state in _LEGAL[self.state], f"{self.state} -> {state}"
        self.state = state
