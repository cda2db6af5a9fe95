"""A worker's device memory, given back while a trainer needs the device, and taken again.

    release   no request comes in any more -> none is open, and no transfer -> all ranks give memory back
    resume    all ranks take memory -> of the last kind: all warm up -> requests come in again

Each step is taken by all ranks before the next begins: to warm up they meet. After a failure in the middle the memory counts as
released, and resuming it again puts everything right. A pause of generation is neither needed nor changed. It knows no HTTP.
Neighbours: `device_api` (the routes), `updates` (knows what is released; it does not run beside them), `engine_groups` (the
engine), `common.orders` (what it is told).
"""

import logging
from collections.abc import Collection
from typing import Final, get_args

from common.errors import MEMORY_RELEASED, TandemError
from common.messages import ErrorReport, Leg, ReportedError
from common.orders import AwaitIdle, MemoryKind, Order, ReleaseMemory, ResumeMemory, WarmUp
from common.server.engine_groups import EngineGroups
from common.server.updates import Updates

log = logging.getLogger(__name__)

ALL_KINDS: Final[tuple[MemoryKind, ...]] = get_args(MemoryKind)

_IDLE_S: Final = 5.0
"""How long requests that were told to end, and their transfers, may take for it."""
_HOW_TO_END_THEM: Final = "pause generation with mode abort or retract"
_UNNUMBERED: Final = 0


class Occupation:
    """One worker's memory. All methods belong to one event loop, and run one at a time, inside of `Updates.reserved`."""

    def __init__(
        self, engine: EngineGroups, updates: Updates, *, is_enabled: bool, deadline_s: float, leg: Leg | None
    ) -> None:
        self._engine = engine
        self._updates = updates
        self._is_enabled = is_enabled
        self._deadline_s = deadline_s
        self._leg: Leg | None = leg

    async def release(self, kinds: Collection[MemoryKind]) -> str:
        """Give memory back, and refuse requests until all is resumed; returns what happened, in words.

        Raises ReportedError: with status 400 nothing was given back, with 503 some of it.
        """
        updates = self._updates
        if not self._is_enabled:
            raise self._refusal("this worker was not started with --enable-memory-saver")
        was_released = updates.released
        held = tuple(kind for kind in ALL_KINDS if kind in kinds and kind not in was_released)
        if not held:
            return "nothing was left to release"
        if self._engine.num_open_samples and not updates.is_paused:  # nobody may have told them to end
            raise self._refusal(f"requests are open; {_HOW_TO_END_THEM}")
        self._set_released([*was_released, *held])
        try:
            if error := await self._carry_out(AwaitIdle(_UNNUMBERED, _IDLE_S)):
                raise self._refusal(f"{error}; {_HOW_TO_END_THEM}")
        except TandemError:
            self._set_released(was_released)
            raise
        if error := await self._carry_out(ReleaseMemory(_UNNUMBERED, held)):
            raise ReportedError(self._report(f"not all memory could be released; resume it: {error}"))
        log.info("memory is released: %s", ", ".join(updates.released))
        return f"released: {', '.join(held)}"

    async def resume(self, kinds: Collection[MemoryKind]) -> str:
        """Take memory again; once none is missing, serve again. Returns what happened, in words.

        Raises ReportedError with status 503 if that has failed: it may be tried again.
        """
        released = self._updates.released
        missing = tuple(kind for kind in released if kind in kinds)
        if not missing:
            return "nothing was released"
        left = [kind for kind in released if kind not in missing]
        error = await self._carry_out(ResumeMemory(_UNNUMBERED, missing))
        if not error and not left:
            error = await self._carry_out(WarmUp(_UNNUMBERED))
        if error:
            raise ReportedError(self._report(f"memory could not be resumed: {error}"))
        self._set_released(left)
        log.info("memory is resumed: %s", ", ".join(missing))
        return f"resumed: {', '.join(missing)}"

    def _set_released(self, kinds: list[MemoryKind]) -> None:
        """Note what is away; as long as that is something, no request comes in."""
        self._updates.released = kinds
        if kinds:
            self._engine.shut(self._report(f"memory is released: {', '.join(kinds)}"))
        else:
            self._engine.open()

    async def _carry_out(self, order: Order) -> str | None:
        """Returns the first error."""
        dones = await self._engine.carry_out(order, patience_s=self._deadline_s)
        return next((done.error for done in dones if done.error is not None), None)

    def _refusal(self, message: str) -> ReportedError:
        return ReportedError(
            ErrorReport(status=400, message=message, code="memory_refused", leg=self._leg, stage="memory")
        )

    def _report(self, message: str) -> ErrorReport:
        return ErrorReport(status=503, message=message, code=MEMORY_RELEASED, leg=self._leg, stage="memory")
