"""Signs of life: the engine's loop tells the frontend that it turns, and has itself reported if it does not.

A frontend that hears nothing knows that the loop stands still, but not where. So each beat also winds up an alarm of the
interpreter's own (`faulthandler`), which needs neither the loop nor the interpreter's lock: if no beat follows in time, it writes
to stderr where every thread is. Neighbours: `common.engine.loop`, `common.server.engine_client` (listens).
"""

import faulthandler
import time
from collections.abc import Callable
from typing import Final

from common.engine.engine import Engine
from common.engine.reports import count_quarantined
from common.messages import Beat

BEAT_S: Final = 1.0
"""About the time between two beats of a loop that turns."""


class Beats:
    """The beats of one engine; its thread calls `turn` each time that its loop turns."""

    def __init__(
        self,
        engine: Engine,
        send: Callable[[Beat], None],
        *,
        watchdog_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._send = send
        self._watchdog_s = watchdog_s
        self._clock = clock
        self._next_at = clock()

    def turn(self) -> None:
        """Send a beat if it is time for one."""
        now = self._clock()
        if now < self._next_at:
            return
        self._next_at = now + BEAT_S
        engine = self._engine
        self._send(Beat(engine.num_steps, count_quarantined(engine), engine.allocator.num_pages))
        faulthandler.dump_traceback_later(self._watchdog_s)

    def stop(self) -> None:
        """Nothing is watched any more."""
        faulthandler.cancel_dump_traceback_later()
