"""When a child is killed, and when it is started again: two counts, without a process and without a clock.

Neighbours: `deploy.child` feeds them what it sees and does what they say.
"""

import math
from collections import deque

PROBE_PERIOD_S = 1.0
PROBE_DEADLINE_S = 2.0
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0
RESTART_WINDOW_S = 60.0


class Fence:
    """How long a child has given no good answer, counted from its last one.

    A peer's pages stay in quarantine until the child that may still write them is gone, so one that is silent for too
    long must not stay as it is.
    """

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._silent_s = 0.0

    def is_due(self, *, is_good: bool, passed_s: float) -> bool:
        """Count a question's outcome, `passed_s` after the one before; True if the child is to be killed for it."""
        # More time passes between two only if the launcher itself was stopped or busy. That says nothing of the child.
        waited_s = min(passed_s, PROBE_PERIOD_S + PROBE_DEADLINE_S)
        self._silent_s = 0.0 if is_good else self._silent_s + waited_s
        return self._silent_s >= self._deadline_s


class Restarts:
    """How long to wait before a child is started again, and when not to.

    The ends within the last minute count. It is a minute of the child's life: if the pauses, which grow with every end,
    were part of it, a child that cannot start would be tried for ever.
    """

    def __init__(self, max_restarts: int) -> None:
        self._max_restarts = max_restarts
        self._lives_s: deque[float] = deque()
        """How long each of the counted lives was."""

    def pause_after(self, lived_s: float) -> float | None:
        """Count an end after a life of `lived_s`: the pause before the next start in seconds, None if there were too many."""
        self._lives_s.append(lived_s)
        # What lies between an end and the latest one are the lives after it.
        while math.fsum(self._lives_s) - self._lives_s[0] > RESTART_WINDOW_S:
            self._lives_s.popleft()
        num_ends = len(self._lives_s)
        if num_ends > self._max_restarts:
            return None
        # The exponent is bounded: not every power of two is a float.
        return min(math.ldexp(FIRST_PAUSE_S, min(num_ends - 1, 16)), LONGEST_PAUSE_S)
