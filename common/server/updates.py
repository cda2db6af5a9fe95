"""What a trainer does to a worker's engine: it pauses generation, and changes the weights or their name.

All groups are held while their weights change, and go on behind it unless the user has paused them. One update runs at a time, and
to its end even if whoever asked for it has left. After a failure in the middle of one the weights are broken: the worker serves
nothing until an update has gone well that leaves no tensor in doubt. It knows no HTTP.
Neighbours: `weights_api` (the routes), `engine_groups` (the engine), `common.orders` (what it is told).
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final, TypeVar

from common.errors import TandemError
from common.messages import EndCause, ErrorReport, Leg, ReportedError
from common.orders import (
    CheckWeights,
    Continue,
    Done,
    JoinWeightGroup,
    LeaveWeightGroup,
    LoadWeights,
    MemoryKind,
    Order,
    Pause,
    PauseMode,
    SetWeightVersion,
    WeightSource,
)
from common.server.engine_groups import EngineGroups

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_ENDS: Final[dict[PauseMode, EndCause | None]] = {"abort": "requested", "retract": "retracted", "in_place": None}
_UNNUMBERED: Final = 0
"""An order's serial is drawn when it is sent."""


class Updates:
    """One worker's pauses and updates. All methods belong to one event loop."""

    def __init__(
        self, engine: EngineGroups, *, weight_version: str, model_path: str, deadline_s: float, leg: Leg | None
    ) -> None:
        self.weight_version = weight_version
        """What the present weights are called."""
        self.model_path = model_path
        """The folder that they were read from last."""
        self.is_paused = False
        """Whether the user has paused generation."""
        self.released: list[MemoryKind] = []
        """What memory is given back, or was to be. `Occupation` sees to it, and that no request comes in meanwhile."""
        self._engine = engine
        self._deadline_s = deadline_s
        self._leg: Leg | None = leg
        self._num_updates = 0
        """Counted alike by all workers that take the same ones, so that weights without a name get the same name everywhere."""
        self._is_reserved = False
        self._is_holding = False
        """An update holds the engine, whatever the user wants; it lets go of it at its end."""
        self._running: asyncio.Task[Any] | None = None

    # -------------------------------------------------------------------------------------------- one at a time

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Let nobody else begin an update. Raises ReportedError with status 409 if somebody has."""
        if self._is_reserved or (self._running is not None and not self._running.done()):
            raise self._error(409, "another update of the weights is under way", "update_in_progress")
        self._is_reserved = True
        try:
            yield
        finally:
            self._is_reserved = False

    async def to_the_end(self, update: Coroutine[Any, Any, Result]) -> Result:
        """Run an update, inside of `reserved`; whoever waits for it may leave, and then it still counts as running."""
        self._running = task = asyncio.create_task(update)
        return await _shielded(task)

    # -------------------------------------------------------------------------------------------- pauses

    async def pause(self, mode: PauseMode) -> int:
        """Plan nothing any more, and end what the mode ends; returns how many requests that were.

        Done when no step is in flight and the engine knows of the ends. Raises as `EngineGroups.stats` does.
        """
        return await _shielded(asyncio.create_task(self._pause(mode)))

    async def resume(self) -> None:
        """Go on, at once or when the update that is under way is done. Raises as `EngineGroups.stats` does."""
        await _shielded(asyncio.create_task(self._resume()))

    async def _pause(self, mode: PauseMode) -> int:
        was_paused, self.is_paused = self.is_paused, True
        try:
            await self._engine.carry_out(Pause(_UNNUMBERED))
            if (cause := _ENDS[mode]) is None:
                return 0
            ended = self._engine.finish_now("", cause)
            await self._engine.carry_out(Pause(_UNNUMBERED))  # which comes behind the ends
        except TandemError:
            self.is_paused = was_paused
            self._let_go()
            raise
        return len(ended)

    async def _resume(self) -> None:
        was_paused, self.is_paused = self.is_paused, False
        if self._is_holding:
            return
        try:
            await self._engine.carry_out(Continue(_UNNUMBERED))
        except TandemError:
            self.is_paused = was_paused
            self._let_go()
            raise

    @asynccontextmanager
    async def _held(self, *, abort_all: bool = False) -> AsyncIterator[None]:
        self._is_holding = True
        try:
            await self._engine.carry_out(Pause(_UNNUMBERED))
            if abort_all:
                self._engine.finish_now("", "requested")
            yield
        finally:
            self._is_holding = False
            self._let_go()

    def _let_go(self) -> None:
        """Have the engine held if somebody wants that, and only then; one that is silent will hear of it when it is back."""
        is_held = self.is_paused or self._is_holding
        self._engine.post(Pause(_UNNUMBERED) if is_held else Continue(_UNNUMBERED))

    # -------------------------------------------------------------------------------------------- updates

    async def load(
        self, source: WeightSource, *, weight_version: str | None, needs_all: bool, abort_all: bool = False
    ) -> str:
        """Check a source on all ranks, then take it; returns what happened, in words. Without a version they get a new name.

        A source that lacks some of the model's tensors is refused with `needs_all`, or if requests may come in between. Raises
        ReportedError: with status 400 nothing has changed, with 503 the weights are broken now.
        """
        version = f"unnamed-{self._num_updates + 1}" if weight_version is None else weight_version
        async with self._held(abort_all=abort_all):
            checked = await self._carry_out(CheckWeights(_UNNUMBERED, source))
            num_missing = max(done.num_left for done in checked)
            self._refuse(checked)
            if num_missing and needs_all:
                raise self._error(400, f"{num_missing} of the model's tensors are missing", "weights_refused")
            if num_missing and not self._takes_parts:
                message = f"{num_missing} of the model's tensors are missing; pause generation to change only some"
                raise self._error(400, message, "weights_refused")
            try:
                loaded = await self._carry_out(LoadWeights(_UNNUMBERED, source, version))
            except TandemError as error:
                self._break_down(f"a weight update has not ended: {error}")
                raise
            num_unsure = max(done.num_left for done in loaded)
            if (failure := _first_error(loaded)) is not None:
                raise ReportedError(self._break_down(f"a weight update has failed while it was written: {failure}"))
            self.weight_version = version
            self._num_updates += 1
            if num_unsure:
                self._break_down(f"{num_unsure} of the model's tensors are in doubt since an update failed")
                return f"the tensors are loaded, and {num_unsure} others are in doubt still"
            self._engine.mend()
        log.info("the weights are %r now", version)
        return "the weights are loaded"

    def check_begin(self) -> None:
        """Raise ReportedError with status 400 unless updates may come in parts now."""
        if "weights" in self.released:
            raise self._error(400, "the weights' memory is released; resume it first", "weights_refused")
        if not self._takes_parts:
            message = "pause generation first, or release memory: between parts no request may come in"
            raise self._error(400, message, "weights_refused")

    def check_end(self) -> None:
        """Raise ReportedError with status 503 if some tensors are in doubt."""
        if self._engine.broken is not None:
            raise ReportedError(self._engine.broken)

    @property
    def _takes_parts(self) -> bool:
        """Whether an update may have only some of the tensors, since nothing computes with a mixture of old and new ones."""
        return self.is_paused or bool(self.released)

    async def rename(self, weight_version: str, *, abort_all: bool) -> str:
        """Call the present weights otherwise."""
        async with self._held(abort_all=abort_all):
            self._refuse(await self._carry_out(SetWeightVersion(_UNNUMBERED, weight_version)))
            self.weight_version = weight_version
        return "the weights have a new name"

    async def join(self, order: JoinWeightGroup) -> str:
        """Have all ranks join a process group; if one cannot, none stays in it."""
        async with self._held():
            joined = await self._carry_out(order)
            if _first_error(joined) is not None:
                await self._carry_out(LeaveWeightGroup(_UNNUMBERED, order.group))
            self._refuse(joined)
        return f"all {self._engine.ranks.tp} ranks have joined the group"

    async def leave(self, group: str) -> str:
        """Have all ranks leave a process group."""
        async with self._held():
            self._refuse(await self._carry_out(LeaveWeightGroup(_UNNUMBERED, group)))
        return "all ranks have left the group"

    async def _carry_out(self, order: Order) -> list[Done]:
        return await self._engine.carry_out(order, patience_s=self._deadline_s)

    def _refuse(self, dones: list[Done]) -> None:
        if (refusal := _first_error(dones)) is not None:
            raise self._error(400, refusal, "weights_refused")

    def _break_down(self, message: str) -> ErrorReport:
        log.error("%s", message)
        report = ErrorReport(status=503, message=message, code="weights_broken", leg=self._leg, stage="weights")
        self._engine.break_down(report)
        return report

    def _error(self, status: int, message: str, code: str) -> ReportedError:
        return ReportedError(ErrorReport(status=status, message=message, code=code, leg=self._leg, stage="weights"))


def _first_error(dones: list[Done]) -> str | None:
    return next((done.error for done in dones if done.error is not None), None)


async def _shielded(task: "asyncio.Task[Result]") -> Result:
    """Wait for a task, which goes on if whoever waits is cancelled."""
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody else may be there to take it
    return await asyncio.shield(task)
