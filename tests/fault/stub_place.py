"""Plans over the real router and stub workers: what a worker's answer does to a request, to the bit."""

from typing import Any

from aiohttp import web

from common.protocol.generate import Sample
from common.protocol.replies import MSGPACK, encode_msgpack, sse_event
from tests.fault.client import Asked
from tests.fault.plan import Fault, Plan
from tests.fault.runner import Outcome
from tests.support import stub_workers as stubs
from tests.support.asking import LEGS, body, check_answer, check_nothing_is_left
from tests.support.stub_workers import Behaviour, Stack, StubWorker, stack


async def abort_unasked(stub: StubWorker, request: web.Request, sample: Sample) -> web.StreamResponse:
    """Answer that the leg was aborted, for a reason that is nobody's wish."""
    reply = stub.reply(sample, binary=not sample.options.stream, num_tokens=0)
    reply["meta_info"]["finish_reason"] = {"type": "abort", "message": "out of luck"}  # type: ignore[index]
    if not sample.options.stream:
        return web.Response(body=encode_msgpack(reply), content_type=MSGPACK)
    response = await stubs.begin_stream(request)
    await response.write(sse_event(reply))
    return response


async def die(stub: StubWorker, request: web.Request, sample: Sample) -> web.StreamResponse:
    """Lose the connection in the middle of the generation: of a stream after some events, else in the reply."""
    if not sample.options.stream:
        return await stubs.reset_in_reply(stub, request, sample)
    response = await stubs.begin_stream(request)
    await stubs.send_progress(response, sample)
    await stub.release.wait()
    return await stubs.reset(stub, request, sample)


_BEHAVIOURS: dict[Fault, Behaviour] = {
    "http-400": stubs.refuse(400, "too long"),
    "http-429": stubs.refuse(429, "full", stage="admission"),
    "http-500": stubs.refuse(500, "lost a page"),
    "reset-before-reply": stubs.reset,
    "reset-in-reply": stubs.reset_in_reply,
    "abort-not-requested": abort_unasked,
    "SIGKILL frontend": die,
    "silence": stubs.hang,
    "leave": stubs.hang,
}


class StubPlace:
    """A router and two stub workers for each request; half of the requests have a second, good pair to go to."""

    def __init__(self) -> None:
        self._complaints: list[str] = []

    async def strike(self, plan: Plan) -> list[Outcome]:
        """Run each request over workers of its own."""
        streams = [False, True] if plan.stream == "both" else [plan.stream]
        return [await self._one(plan, stream, num_pairs) for stream in streams for num_pairs in (1, 2)]

    async def leftovers(self, plan: Plan) -> list[str]:
        """Say what each router still had when its request had ended."""
        return self._complaints

    async def _one(self, plan: Plan, stream: bool, num_pairs: int) -> Outcome:
        # Whoever is not struck waits, as a worker does whose peer is.
        prefill_does, decode_does = (
            _BEHAVIOURS[plan.fault] if plan.who in (leg, "client") else stubs.hang for leg in LEGS
        )
        router: dict[str, Any] = {"max_retries": 2 * (num_pairs - 1)}
        if plan.fault == "silence":
            router |= {"health_interval_s": 0.05, "unhealthy_after_s": 0.2}
        async with stack(prefill=prefill_does, decode=decode_does, num_pairs=num_pairs, router=router) as running:
            prefill, decode = running.pairs[0]
            if plan.fault == "silence":
                (prefill if plan.who == "prefill" else decode).health = None
            asked = Asked(running.url, body(stream=stream), _differs, has_another_pair=num_pairs > 1)
            if plan.fault == "SIGKILL frontend" and plan.who == "decode" and stream:
                await asked.told()
                decode.release.set()
            if plan.fault == "leave":
                for stub in (prefill, decode):
                    await stub.arrived.wait()
                asked.leave()
                for stub in (prefill, decode):
                    await stub.cancelled.wait()
            outcome = await asked.outcome()
            await self._look(running)
        return outcome

    async def _look(self, running: Stack) -> None:
        try:
            await check_nothing_is_left(running)
        except AssertionError as error:
            self._complaints.append(f"the router still has something: {error}")


def _differs(reply: dict[str, Any]) -> str:
    try:
        check_answer(200, reply)
    except AssertionError as error:
        return str(error) or "not the stubs' answer"
    return ""
