"""The one loop: plan, launch, settle (R2). Overlap is the depth and nothing else.

With depth 2 the host settles step n-1 while the device runs step n; with depth 1 every step is settled at once, on the same
path. The loop knows no requests: a worker's role decides what to plan and what a result means.

With several attention groups a step is taken by all of them together; one that has nothing to run joins with an empty plan.

The frontend's orders are carried out between steps, when none is in flight. While the loop is held, by an order, because weights
were taken in part, or because memory is given back, it plans nothing of its own.

A step that cannot be launched or settled fails its own requests, and the engine goes on; of several ranks none knows where the
others are then, so their process ends. What a role does with its requests is plain bookkeeping: an exception there is a defect
after which no count could be trusted, and ends the process too.
"""

import gc
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from common.engine.background import Background, NoBackground, carry_out_beside
from common.engine.beats import Beats
from common.engine.build import Follower
from common.engine.engine import Engine
from common.engine.reports import describe
from common.engine.step import Launched, StepResult
from common.errors import RequestFailed, UsageError
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
from common.orders import AwaitIdle, Continue, Done, LoadWeights, Order, Pause, ReleaseMemory, SetWeightVersion
from common.scheduling.step_plan import StepPlan

log = logging.getLogger(__name__)

_ENDING_WAIT_S: Final = 0.1
_NOTHING: Final = StepPlan(())
IDLE_WAIT_S: Final = 1.0
"""Longest sleep of an idle engine; messages and transfer events end it at once."""
_BUSY: Final = "requests are open, or their KV pages are still in use"
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

    @property
    def is_idle(self) -> bool:
        """Whether no request is open, and no page has an owner but a prefix cache."""

    def plan(self) -> StepPlan | None:
        """Decide the next step, or None if nothing can run now."""

    def rest(self) -> None:
        """Called in place of `plan` while nothing may be planned: do what others must not wait for."""

    def on_weights_changed(self) -> None:
        """The engine has other weights now, or calls them otherwise; no step is in flight."""

    def on_kv_lost(self) -> None:
        """What the KV pool held is gone, while this was idle."""

    def on_settled(self, result: StepResult) -> None:
        """Take a settled step's tokens; its rows are in the host cache already."""

    def on_failed(self, plan: StepPlan, error: RequestFailed) -> None:
        """Fail the requests of a step that has no results; nothing of what was launched before is pending any more."""


Answer = Callable[[Done], None]


class Loop:
    """Drives one engine for one role. One thread calls `turn`, and nothing else touches engine or role meanwhile."""

    def __init__(self, engine: Engine, role: Role, *, overlap: bool, background: Background | None = None) -> None:
        self._engine = engine
        self._role = role
        self._background = background or NoBackground()
        self._depth = 2 if overlap else 1
        self._in_flight: deque[tuple[StepPlan, Launched]] = deque()
        self._num_failed_in_a_row = 0
        self._orders: deque[tuple[Order, Answer]] = deque()
        self._waits: list[tuple[int, float, Answer]] = []
        """Who waits until there is nothing to do: serial, deadline and answer."""
        self._is_paused = False

    @property
    def is_held(self) -> bool:
        """Whether no step of this group may be planned."""
        return self._is_paused or self._engine.num_unsure_weights > 0 or self._engine.is_released

    @property
    def has_orders(self) -> bool:
        """Whether the next turn carries out orders, which may take long."""
        return bool(self._orders)

    def order(self, order: Order, answer: Answer) -> None:
        """Have an order carried out in the next turn, behind those that came before it."""
        if isinstance(order, AwaitIdle):
            self._waits.append((order.serial, time.monotonic() + order.deadline_s, answer))
        else:
            self._orders.append((order, answer))

    def turn(self) -> bool:
        """Carry out orders; or launch a step if there is one, and settle the eldest if it is due.

        False if there was nothing to do. Raises what broke a step if the device is broken, or if too many steps have failed in a
        row.
        """
        if self._waits:
            self._answer_waits()
        if self._orders:
            self._carry_out_orders()
            return True
        plan = None
        if self.is_held:
            self._role.rest()
        else:
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

    def _carry_out_orders(self) -> None:
        while self._in_flight:
            self._settle(*self._in_flight.popleft())
        while self._orders:
            order, answer = self._orders.popleft()
            done = self._carry_out(order)
            match order:
                case Pause():
                    self._is_paused = True
                case Continue():
                    self._is_paused = False
                case LoadWeights() | SetWeightVersion() if done.error is None:
                    self._role.on_weights_changed()
            answer(done)

    def _carry_out(self, order: Order) -> Done:
        if isinstance(order, ReleaseMemory):
            if not self._role.is_idle:
                return Done(serial=order.serial, error=_BUSY)
            if "kv_cache" in order.kinds:
                self._role.on_kv_lost()
        try:
            return carry_out_beside(self._background, order, self._engine.carry_out)
        except UsageError as error:
            if self._engine.rank.of.tp > 1:
                raise  # the other ranks have begun already
            return Done(serial=order.serial, error=str(error))

    def _answer_waits(self) -> None:
        now = time.monotonic()
        is_idle = self._role.is_idle
        for wait in list(self._waits):
            serial, deadline, answer = wait
            if is_idle or now >= deadline:
                self._waits.remove(wait)
                answer(Done(serial=serial, error=None if is_idle else _BUSY))

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
    loop = Loop(engine, role, overlap=overlap, background=background)
    beats = Beats(engine, channel.send, watchdog_s=watchdog_s)

    def turn(longest_wait_s: float) -> None:
        beats.turn()
        role.poll()
        background.check()
        if loop.has_orders:
            beats.stop()  # nobody waits for the loop but whoever has given the order, and he has a deadline of his own
        if not loop.turn():
            channel.wait(longest_wait_s)

    background.start()
    try:
        channel.send(describe(engine))
        while _take_messages(channel, role, loop):
            turn(IDLE_WAIT_S)
        deadline = time.monotonic() + shutdown_deadline_s / 2
        while role.is_needed and time.monotonic() < deadline:
            turn(_ENDING_WAIT_S)
            _take_messages(channel, role, loop)
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
        follower.run(background)
    finally:
        background.stop(shutdown_deadline_s)


def _take_messages(channel: Channel, role: Role, loop: Loop) -> bool:
    """Handle what the frontend has sent; False once that is `Shutdown`."""
    for message in channel.receive():
        match message:
            case GetStats():
                channel.send(role.stats(message.serial))
            case Shutdown():
                return False
            case Generate() | Abort() | FinishNow() | StopAt() | FlushCache():
                role.handle(message)
            case _:
                loop.order(message, channel.send)
    return True
