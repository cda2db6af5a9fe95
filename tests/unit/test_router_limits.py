"""What bounds a leg: a deadline for each stage, and sizes of what a worker may send; over stub workers."""

import aiohttp
import pytest

from router.config import RouterConfig, RouterOptions
from tests.support import stub_workers as stubs
from tests.support.asking import LEGS, ask, blamed, body, check_answer, check_nothing_is_left, last_event
from tests.support.stub_workers import stack

SHORT_S, LONG_S = 0.1, 3600.0
STAGES = ("prefill", "first_token", "idle")


def deadlines(*short):
    """Options by which only these stages end soon, and whoever is late is blamed."""
    return {f"{stage}_deadline_s": SHORT_S if stage in short else LONG_S for stage in STAGES} | {"breaker_failures": 1}


async def check_late(running, request, leg, stage):
    """Ask, and have an error that names the leg and the stage that was too slow."""
    status, reply = await ask(running, request)
    error, worker = reply["error"], getattr(running, leg)
    assert (error["code"], error["leg"], error["stage"]) == ("deadline_exceeded", leg, stage)
    assert error["message"] == f"{leg} leg on {worker.url}: the {stage} deadline of 0.1 s passed"
    assert await blamed(running) == [worker.url]
    await worker.cancelled.wait()
    await worker.abort_arrived.wait()
    await check_nothing_is_left(running)
    return status


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_new_tokens", [0, 4])
async def test_the_prefill_leg_has_a_deadline(stream, max_new_tokens):
    # The decode leg waits for the prefill leg: its own deadline, however short, has not begun.
    router = deadlines("prefill") | {"first_token_deadline_s": SHORT_S / 10}
    async with stack(prefill=stubs.hang, decode=stubs.hang, router=router) as running:
        request = body(stream=stream, sampling_params={"max_new_tokens": max_new_tokens})
        assert await check_late(running, request, "prefill", "prefill") == 504


async def test_the_first_token_has_a_deadline_from_the_prefill_legs_reply_on():
    async with stack(decode=stubs.hang, router=deadlines("first_token", "idle")) as running:
        assert await check_late(running, body(stream=True), "decode", "first_token") == 504


@pytest.mark.parametrize("prefill", [stubs.good, stubs.hang])
async def test_events_have_deadlines_from_the_first_one_on(prefill):
    router = deadlines("idle")
    async with stack(prefill=prefill, decode=stubs.stream_and_hang, router=router) as running:
        assert await check_late(running, body(stream=True), "decode", "idle") == 200


async def test_a_prefill_leg_that_replies_late_gives_the_events_no_more_time():
    async with stack(prefill=stubs.after_release, decode=stubs.stream_and_hang, router=deadlines("idle")) as running:
        async with running.client.post("/generate", json=body(stream=True)) as response:
            await response.content.readuntil(b"\n\n")
            running.prefill.release.set()
            error = last_event(await response.text())["error"]
        assert (error["leg"], error["stage"]) == ("decode", "idle")


@pytest.mark.parametrize(
    ("behaviour", "stage"), [(stubs.hang, "first_token"), (stubs.stream_and_hang, "idle")], ids=["hang", "idle"]
)
async def test_an_aggregated_workers_stream_has_deadlines(behaviour, stage):
    async with stack(decode=behaviour) as running:
        app = await stubs.create_app(
            RouterConfig(router=RouterOptions(worker=(running.decode.url,), max_retries=0, **deadlines(stage)))
        )
        async with stubs.serving(app) as url, aiohttp.ClientSession(url) as running.client:
            _, reply = await ask(running, body(stream=True, return_routed_experts=False))
            assert (reply["error"]["leg"], reply["error"]["stage"]) == (None, stage)
            assert running.decode.url in reply["error"]["message"]
            await running.decode.abort_arrived.wait()


async def test_late_legs_are_tried_elsewhere():
    router = deadlines("first_token") | {"max_retries": 1}
    async with stack(decode=stubs.hang, num_pairs=2, router=router) as running:
        check_answer(*await ask(running, body(stream=True)))


# ------------------------------------------------------------------------------------------------ sizes


async def send_too_much(stub, request, sample):
    """Send one reply, or one event, that does not end."""
    response = stubs.web.StreamResponse()
    await response.prepare(request)
    await response.write(b"data: ")
    for _ in range(2**10):
        await response.write(b"x" * 2**10)
    return await stubs.hang(stub, request, sample)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("leg", LEGS)
async def test_a_reply_that_is_too_large_is_a_failure_of_its_leg(leg, stream):
    router = {"max_reply_bytes": 2**16, "breaker_failures": 1}
    async with stack(**{leg: send_too_much}, router=router) as running:
        _, reply = await ask(running, body(stream=stream))
        assert await blamed(running) == [getattr(running, leg).url]
        await getattr(running, leg).cancelled.wait()
        await check_nothing_is_left(running)
    error = reply["error"]
    assert (error["leg"], error["stage"], error["code"]) == (leg, "reply", "leg_failed")
    assert error["message"].endswith("its reply is larger than 65536 bytes")


@pytest.mark.parametrize("stream", [False, True])
async def test_events_are_bounded_each_for_itself(stream):
    """A stream may be longer than its largest event."""
    router = {"max_reply_bytes": 2**16}
    async with stack(router=router) as running:
        request = body(stream=stream, return_routed_experts=False, sampling_params={"max_new_tokens": 300})
        status, reply = await ask(running, request)
    assert (status, len(reply["output_ids"])) == (200, 300)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("leg", LEGS)
async def test_of_an_error_only_the_beginning_is_read(leg, stream):
    async def complain(stub, request, sample):
        response = stubs.web.StreamResponse(status=500)
        await response.prepare(request)
        for _ in range(2**8):
            await response.write(b"alas " * 2**10)
        return await stubs.hang(stub, request, sample)

    async with stack(**{leg: complain}) as running:
        status, reply = await ask(running, body(stream=stream))
        await getattr(running, leg).cancelled.wait()
        await check_nothing_is_left(running)
    assert (status, reply["error"]["leg"]) == (502, leg)
    assert len(reply["error"]["message"]) < 400
