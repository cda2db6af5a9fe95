"""The one loop: plan, launch, settle (R2). Overlap is the depth and nothing else.

With depth 2 the host settles step n-1 while the device runs step n; with depth 1 every step is settled at once, on the same
path. The loop knows no requests: a worker's role decides what to plan and what a result means.

With several attention groups a step is taken by all of them together; one that has nothing to run joins with an empty plan.

A step that cannot be launched or settled fails its own requests, and the engine goes on; of several ranks none knows where the
others are then, so their process ends. What a role does with its requests is plain bookkeeping: an exception there is a defect
after which no count could be trusted, and ends the process too.
"""

import gc
import logging
import time
from collections import deque
from typing import Final, Protocol

from common.engine.beats import Beats
from common.engine.build import Follower
from common.engine.engine import Engine
from common.engine.reports import describe
from common.engine.step import Launched, StepResult
from common.errors import RequestFailed
from common.messages import (
    Abort,
    EngineToFrontend,
    FinishNow,
    FlushCache,
    FrontendToEngine,
    Generate,
    GetStats,
    Shutdown,
    Stats,
    StopAt,
)
from common.scheduling.step_plan import StepPlan

log = logging.getLogger(__name__)

_ENDING_WAIT_S: Final = 0.1
_NOTHING: Final = StepPlan(())
IDLE_WAIT_S: Final = 1.0
"""Longest sleep of an idle engine; messages and transfer events end it at once."""
MAX_FAILED_STEPS: Final = 3
"""So many failed steps without a good one between them end the process: what can compute nothing must not seem healthy."""


class Reply(Protocol):
    """Sends a message to the frontend, with its extra frames."""

    def __call__(self, message: EngineToFrontend, /, *frames: bytes | memoryview) -> None:
        """Queue it; never blocks."""


RoleMessage = Generate | Abort | FinishNow | StopAt | FlushCache
"""What a role handles of the frontend's messages."""


class Role(Protocol):
    """What prefill and decode workers give the loop."""

    def handle(self, message: RoleMessage) -> None:
        """Take a request in, end one, or flush."""

    def poll(self) -> None:
        """Take what other threads have done: the transfer's and the row collector's."""

    def stats(self, serial: int) -> Stats:
        """Report gauges and counters."""

    @property
    def is_needed(self) -> bool:
        """Whether another worker still waits for something of this one, all of whose requests may have been answered."""

    def plan(self) -> StepPlan | None:
        """Decide the next step, or None if nothing can run now."""

    def on_settled(self, result: StepResult) -> None:
        """Take a settled step's tokens; its rows are in the host cache already."""

    def on_failed(self, plan: StepPlan, error: RequestFailed) -> None:
        """Fail the requests of a step that has no results; nothing of what was launched before is pending any more."""


class Loop:
    """Drives one engine for one role. One thread calls `turn`, and nothing else touches engine or role meanwhile."""

    def __init__(self, engine: Engine, role: Role, *, overlap: bool) -> None:
        self._engine = engine
        self._role = role
        self._depth = 2 if overlap else 1
        self._in_flight: deque[tuple[StepPlan, Launched]] = deque()
        self._num_failed_in_a_row = 0

    def turn(self) -> bool:
        """Launch a step if there is one, settle the eldest if it is due; False if there was nothing to do.

        Raises what broke a step if the device is broken, or if too many steps have failed in a row.
        """
        plan = self._role.plan()
        if plan is None and self._engine.is_called:
            plan = _NOTHING
        if plan is not None:
            self._launch(plan)
        if len(self._in_flight) >= self._depth or (plan is None and self._awaits_results):
            self._settle(*self._in_flight.popleft())
            return True
        return plan is not None

    @property
    def _awaits_results(self) -> bool:
        """Whether a step in flight is anybody's.

        One for other groups' sake must not be waited for: they may be calling for the next.
        """
        return any(plan.entries for plan, _ in self._in_flight)

    def _launch(self, plan: StepPlan) -> None:
        try:
            self._in_flight.append((plan, self._engine.launch(plan)))
        except Exception as error:
            log.exception("a step could not be launched")
            self._fail(plan, error)

    def _settle(self, plan: StepPlan, launched: Launched) -> None:
        try:
            result = launched.settle()
        except Exception as error:
            log.exception("a step could not be settled")
            self._fail(plan, error)
            return
        self._num_failed_in_a_row = 0
        self._role.on_settled(result)

    def _fail(self, plan: StepPlan, error: Exception) -> None:
        self._engine.num_failed_steps += 1
        self._num_failed_in_a_row += 1
        # After a failed step the other ranks may be anywhere in it.
        if self._engine.rank.of.tp > 1 or self._num_failed_in_a_row == MAX_FAILED_STEPS:
            raise error
        # Nothing may be pending on pages that others are about to get (R11), nor on memory that the error's traceback holds.
        self._engine.synchronize()
        message = f"a step of the engine failed: {type(error).__name__}: {error}"
        self._role.on_failed(plan, RequestFailed(message, stage="step"))


class Channel(Protocol):
    """The engine's way to its frontend; `common.wire.EngineChannel` is the real one."""

    def receive(self) -> list[FrontendToEngine]:
        """All messages that are here."""

    def send(self, message: EngineToFrontend, *frames: bytes | memoryview) -> None:
        """Queue a message."""

    def wait(self, timeout_s: float) -> None:
        """Sleep until there is a message or a wake."""

    def close(self) -> None:
        """Send what is queued, and end."""


class Background(Protocol):
    """What runs beside the loop on a thread of its own: the transfer."""

    def start(self) -> None:
        """Begin."""

    def check(self) -> None:
        """Raise what has ended the thread, if anything has."""

    def stop(self, timeout_s: float) -> None:
        """End."""


def serve(
    channel: Channel,
    engine: Engine,
    role: Role,
    background: Background,
    *,
    overlap: bool,
    watchdog_s: float,
    shutdown_deadline_s: float,
) -> None:
    """Run an engine process's main thread: say that the engine is ready, drive it until `Shutdown`, and close the channel.

    A turn that takes longer than `watchdog_s` is reported on stderr, with what every thread is doing. Told to end, it goes on
    while it is needed, for half of the shutdown's deadline at most.
    """
    # Model, tables and modules stay for good: the collector need not look at them again, in the middle of a step.
    gc.collect()
    gc.freeze()
    loop = Loop(engine, role, overlap=overlap)
    beats = Beats(engine, channel.send, watchdog_s=watchdog_s)

    def turn(longest_wait_s: float) -> None:
        beats.turn()
        role.poll()
        background.check()
        if not loop.turn():
            channel.wait(longest_wait_s)

    background.start()
    try:
        channel.send(describe(engine))
        while _take_messages(channel, role):
            turn(IDLE_WAIT_S)
        deadline = time.monotonic() + shutdown_deadline_s / 2
        while role.is_needed and time.monotonic() < deadline:
            turn(_ENDING_WAIT_S)
            _take_messages(channel, role)
    finally:
        beats.stop()
        background.stop(shutdown_deadline_s)
        engine.close()
        channel.close()


def serve_follower(follower: Follower, background: Background, *, shutdown_deadline_s: float) -> None:
    """Run a follower process's main thread until its leader ends."""
    gc.collect()
    gc.freeze()
    background.start()
    try:
        follower.run(background.check)
    finally:
        background.stop(shutdown_deadline_s)


def _take_messages(channel: Channel, role: Role) -> bool:
    """Handle what the frontend has sent; False once that is `Shutdown`."""
    for message in channel.receive():
        match message:
            case GetStats():
                channel.send(role.stats(message.serial))
            case Shutdown():
                return False
            case _:
                role.handle(message)
    return True
