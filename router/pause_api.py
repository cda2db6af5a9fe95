"""POST /pause_generation and /continue_generation: a trainer stops all generation, and has it go on.

    pause      the gate closes: no prompt is sent to a worker any more
      abort      every open prompt ends with what it has; then the workers are paused
      retract    the workers give their requests back; these wait at the gate, and go on from their tokens
      in_place   the workers keep their requests as they are
    continue   the workers go on, then the gate opens

Neighbours: `gate`, `aborts`, `fanout`, `resume` (what becomes of the prompts).
"""

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web

from common.errors import RequestError
from common.protocol.fields import Fields, decode_object
from router.aborts import Aborts
from router.fanout import Fanout, WorkerAnswer, outcome
from router.gate import Gate
from router.registry import Registry

_MODES = ("abort", "retract", "in_place")


class PauseApi:
    """Handlers of the two routes."""

    def __init__(
        self,
        gate: Gate,
        registry: Registry,
        aborts: Aborts,
        fanout: Fanout,
        look: Callable[[], Awaitable[None]],
        *,
        deadline_s: float,
    ) -> None:
        """`look` sees whether workers that were not well are by now."""
        self._gate = gate
        self._look = look
        self._registry = registry
        self._aborts = aborts
        self._fanout = fanout
        self._deadline_s = deadline_s
        # A worker must not hear of two orders in the other order.
        self._turn = asyncio.Lock()

    def routes(self) -> list[web.RouteDef]:
        """All routes of this class."""
        return [
            web.post("/pause_generation", self.pause_generation),
            web.post("/continue_generation", self.continue_generation),
        ]

    async def pause_generation(self, request: web.Request) -> web.Response:
        """Pause all workers: 200 if all have paused. The gate stays closed in any case, until generation continues."""
        mode = Fields(decode_object(await request.read() or b"{}")).string("mode", "abort")
        if mode not in _MODES:
            raise RequestError("mode", f'must be one of {", ".join(_MODES)}, but is "{mode[:40]}"')
        async with self._turn:
            self._gate.close()
            ended = await self._aborts.end(self._registry.matching("")) if mode == "abort" else []
            told = await self._fanout.tell_all("/pause_generation", {"mode": mode}, self._deadline_s)
        answers = [answer for _, answer in ended] + told
        return outcome(answers, {"mode": mode, "workers": _reports(told)})

    async def continue_generation(self, _: web.Request) -> web.Response:
        """Have all workers go on: 200 if all do. The gate opens in any case: one that is gone must not hold the others."""
        async with self._turn:
            try:
                told = await self._fanout.tell_all("/continue_generation", {}, self._deadline_s)
                await self._look()  # those whose memory was released are back
            finally:
                self._gate.open()  # even if whoever asked has left meanwhile
        return outcome(told, {"workers": _reports(told)})


def _reports(answers: list[WorkerAnswer]) -> list[dict[str, object]]:
    return [{**answer.report(), "message": answer.message, "ended": answer.fields.get("ended")} for answer in answers]
