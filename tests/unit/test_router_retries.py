"""What the router tries again, where, and whom it blames; over stub workers with real sockets."""

import asyncio

import aiohttp
import msgspec
import pytest

from router.config import RouterConfig, RouterOptions
from router.membership import Membership
from tests.support import stub_workers as stubs
from tests.support.asking import (
    LEGS,
    OTHER,
    ask,
    blamed,
    body,
    check_answer,
    check_nothing_is_left,
    metrics_of,
    workers_of,
)
from tests.support.prompts import sample
from tests.support.stub_workers import stack

# One failure is enough to see whom the router blames.
BLAMING = {"max_retries": 2, "breaker_failures": 1, "breaker_pause_s": 3600.0}


# ------------------------------------------------------------------------------------------------ tried again


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "behaviour",
    [
        stubs.refuse(500, "lost a page"),
        stubs.refuse(503, "no more"),
        stubs.refuse(504, "no transfer", "deadline_exceeded"),
        stubs.reset,
        stubs.reset_in_reply,
        stubs.garbage,
    ],
)
@pytest.mark.parametrize("leg", LEGS)
async def test_a_failed_leg_is_answered_by_another_pair(leg, behaviour, stream):
    other = OTHER[leg]
    async with stack(**{leg: behaviour, other: stubs.hang}, num_pairs=2, router=BLAMING) as running:
        check_answer(*await ask(running, body(stream=stream)))
        guilty, bystander = getattr(running, leg), getattr(running, other)
        assert await blamed(running) == [guilty.url]
        # The other leg's worker hears that nobody waits for it any more, also if it was not reached before.
        await bystander.abort_arrived.wait()
        (first,) = guilty.samples
        (second,) = running.pairs[1][LEGS.index(leg)].samples
        assert bystander.aborts == [{"rid": first.rid}]
        assert first.rid != second.rid
        assert len(first.rid) == len(second.rid)
        assert first.bootstrap.room != second.bootstrap.room
        assert first.options == second.options
        assert f'tandem_router_retries_total{{leg="{leg}",stage="' in await metrics_of(running)
        await check_nothing_is_left(running)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("leg", LEGS)
async def test_a_full_worker_is_passed_over_and_not_blamed(leg, stream):
    async with stack(**{leg: stubs.refuse(429, "full")}, num_pairs=2, router=BLAMING) as running:
        check_answer(*await ask(running, body(stream=stream)))
        assert len(getattr(running, leg).samples) == 1
        assert await blamed(running) == []


@pytest.mark.parametrize("stream", [False, True])
async def test_several_failures_go_from_pair_to_pair(stream):
    """Three pairs, of which one decode worker and another pair's prefill worker fail."""
    async with stack(decode=stubs.reset, num_pairs=3, router=BLAMING) as running:
        running.pairs[1][0].behaviour = stubs.refuse(500)
        check_answer(*await ask(running, body(stream=stream)))
        assert set(await blamed(running)) == {running.decode.url, running.pairs[1][0].url}
        assert len({s.bootstrap.room for pair in running.pairs for stub in pair for s in stub.samples}) == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_with_one_pair_it_is_tried_there_again(stream):
    async def fail_once(stub, request, sample):
        behaviour = stubs.refuse(500) if len(stub.samples) == 1 else stubs.good
        return await behaviour(stub, request, sample)

    async with stack(decode=fail_once, router={"max_retries": 2}) as running:
        check_answer(*await ask(running, body(stream=stream)))
        assert len(running.decode.samples) == len(running.prefill.samples) == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_the_last_failure_is_told_with_the_number_of_attempts(stream):
    async with stack(decode=stubs.refuse(500, "lost a page"), router={"max_retries": 2}) as running:
        status, reply = await ask(running, body(stream=stream))
        assert len(running.decode.samples) == 3
        assert 'tandem_router_retries_total{leg="decode",stage="forward"} 2.0' in await metrics_of(running)
        assert 'tandem_router_sample_failures_total{code="internal",leg="decode"} 1.0' in await metrics_of(running)
        await check_nothing_is_left(running)
    error = reply["error"]
    assert (status, error["leg"], error["stage"], error["rid"]) == (502, "decode", "forward", "mine")
    assert error["message"] == f"decode leg on {running.decode.url} failed: lost a page (3 attempts)"


@pytest.mark.parametrize("failing", [stubs.reset, stubs.refuse(429)])
async def test_what_has_failed_a_prompt_is_not_picked_for_it_again(failing):
    router = {"max_retries": 1, "breaker_failures": 10**9, "policy": "random"}
    async with stack(decode=failing, num_pairs=2, router=router) as running:
        for _ in range(20):
            check_answer(*await ask(running, body()))


def test_who_has_failed_last_is_picked_last():
    membership = Membership(RouterOptions(decode=("http://a:1", "http://b:1", "http://c:1"), policy="random"))
    a, b, c = membership.workers
    assert {membership.pick("decode", sample(), failed=[a]) for _ in range(50)} == {b, c}
    assert membership.pick("decode", sample(), failed=[a, b]) is c
    assert membership.pick("decode", sample(), failed=[a, b, c]) is a
    assert membership.pick("decode", sample(), failed=[a, b, c, a]) is b
    b.mark_unhealthy("it is stuck", ends_legs=True)
    assert membership.pick("decode", sample(), failed=[a, b, c, a]) is c


async def test_no_attempt_begins_after_the_deadline():
    router = {"max_retries": 10**9, "breaker_failures": 10**9}
    async with stack(decode=stubs.refuse(500), router=router, deadline_s=0.3) as running:
        _, reply = await ask(running, body())
        assert reply["error"]["leg"] == "decode"
        await check_nothing_is_left(running)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_for_one_worker_alone_is_tried_again(stream):
    async with stack(prefill=stubs.reset, num_pairs=2, router=BLAMING) as running:
        status, reply = await ask(running, body(stream=stream, sampling_params={"max_new_tokens": 0}))
        assert (status, reply["output_ids"]) == (200, [])
        assert await blamed(running) == [running.prefill.url]
        assert running.pairs[1][1].samples == []


@pytest.mark.parametrize("stream", [False, True])
async def test_an_aggregated_worker_that_fails_is_replaced_by_another(stream):
    async with stack(decode=stubs.reset, num_pairs=2) as running:
        running.decode.is_alone = running.pairs[1][1].is_alone = True
        urls = (running.decode.url, running.pairs[1][1].url)
        options = RouterOptions(worker=urls, policy="round_robin", **BLAMING)
        app = await stubs.create_app(RouterConfig(router=options))
        async with stubs.serving(app) as url, aiohttp.ClientSession(url) as running.client:
            status, reply = await ask(running, body(stream=stream, return_routed_experts=False))
            assert (status, reply["output_ids"]) == (200, [100, 101, 102, 103])
            assert await blamed(running) == [running.decode.url]


# ------------------------------------------------------------------------------------------------ not tried again


async def at_once(request, sample, reply):
    """Send a whole answer, of a stream without any event before it."""
    if not sample.options.stream:
        return stubs.web.Response(body=msgspec.msgpack.encode(reply))
    response = await stubs.begin_stream(request)
    await response.write(stubs.sse_event(reply) + stubs.SSE_DONE)
    return response


async def good_at_once(stub, request, sample):
    """Answer well, without anything that the client would hear of before the end."""
    return await at_once(request, sample, stub.reply(sample, binary=not sample.options.stream))


async def repeat_an_expert(stub, request, sample):
    """Answer with rows that no forward pass can have."""
    reply = stub.reply(sample, binary=not sample.options.stream)
    rows = reply["meta_info"]["routed_experts"]
    reply["meta_info"]["routed_experts"] = "A" * len(rows) if sample.options.stream else bytes(len(rows))
    return await at_once(request, sample, reply)


async def disagree(stub, request, sample):
    """Answer as if there had been another prompt."""
    stub.prompt_offset = 1
    return await at_once(request, sample, stub.reply(sample, binary=not sample.options.stream))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize(
    ("behaviour", "code"),
    [
        (stubs.refuse(400, "too long"), "invalid_request"),
        (stubs.refuse(404), "internal"),
        (stubs.refuse(500, "lost", "routed_experts_missing"), "routed_experts_missing"),
        (stubs.refuse(500, "twice", "routed_experts_bad"), "routed_experts_bad"),
        (repeat_an_expert, "routed_experts_bad"),
        (disagree, "leg_failed"),
    ],
)
async def test_what_another_attempt_would_only_hide_is_not_tried_again(behaviour, code, leg, stream):
    async with stack(**{"decode": good_at_once, leg: behaviour}, num_pairs=2, router={"max_retries": 2}) as running:
        _, reply = await ask(running, body(stream=stream))
        assert running.pairs[1][0].samples == running.pairs[1][1].samples == []
        await check_nothing_is_left(running)
    assert reply["error"]["code"] == code
    assert "attempts" not in reply["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_the_requests_own_deadline_is_nobodys_fault_and_final(stream):
    async with stack(decode=stubs.hang, num_pairs=2, deadline_s=0.2, router=BLAMING) as running:
        status, reply = await ask(running, body(stream=stream))
        assert (status, reply["error"]["stage"]) == (504, "request")
        assert running.pairs[1][0].samples == []
        assert await blamed(running) == []
        await running.decode.abort_arrived.wait()
        await check_nothing_is_left(running)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_that_somebody_aborts_is_not_tried_again(stream):
    failing = {"prefill": stubs.fail_when_aborted, "decode": stubs.fail_when_aborted}
    async with stack(**failing, num_pairs=2, router={"max_retries": 2}) as running:
        asking = asyncio.create_task(ask(running, body(stream=stream)))
        await running.prefill.arrived.wait()
        await running.decode.arrived.wait()
        async with running.client.post("/abort_request", json={"rid": "mine"}) as response:
            assert (await response.json())["aborted"] == 1
        _, reply = await asking
        assert reply["error"]["message"].endswith("the room was closed")
        assert running.pairs[1][0].samples == running.pairs[1][1].samples == []


@pytest.mark.parametrize(
    "behaviour", [stubs.die_mid_stream, stubs.end_without_last_event, stubs.error_event, stubs.stream_and_hang]
)
async def test_what_the_client_has_heard_of_is_not_tried_again(behaviour):
    router = BLAMING | {"idle_deadline_s": 0.2}
    async with stack(decode=behaviour, prefill=stubs.hang, num_pairs=2, router=router) as running:
        running.decode.release.set()
        status, reply = await ask(running, body(stream=True))
        assert running.pairs[1][0].samples == running.pairs[1][1].samples == []
        assert await blamed(running) == [running.decode.url]
        await running.prefill.abort_arrived.wait()
        await check_nothing_is_left(running)
    assert (status, reply["error"]["leg"]) == (200, "decode")
    assert reply["error"]["stage"]
    assert running.decode.url in reply["error"]["message"]


# ------------------------------------------------------------------------------------------------ whom to blame


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("guilty", LEGS)
async def test_a_failed_transfer_is_the_fault_of_the_end_that_the_report_names(guilty, stream):
    refusal = stubs.refuse(504, "the peer fell silent", "deadline_exceeded", leg=guilty, stage="transfer")
    async with stack(decode=refusal, num_pairs=1, router=BLAMING) as running:
        _, reply = await ask(running, body(stream=stream))
        assert await blamed(running) == [getattr(running, guilty).url]
    error = reply["error"]
    assert (error["leg"], error["stage"]) == (guilty, "transfer")
    assert getattr(running, guilty).url in error["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_worker_may_name_the_other_leg_for_transfers_alone(stream):
    refusal = stubs.refuse(500, "no", leg="prefill", stage="forward")
    async with stack(decode=refusal, router=BLAMING) as running:
        _, reply = await ask(running, body(stream=stream))
        assert reply["error"]["leg"] == "decode"
        assert await blamed(running) == [running.decode.url]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_is_nobodys_fault(stream):
    decode = stubs.stream_and_hang if stream else stubs.hang
    async with stack(prefill=stubs.hang, decode=decode, router=BLAMING) as running:
        asking = asyncio.create_task(ask(running, body(stream=stream)))
        await running.prefill.arrived.wait()
        await running.decode.arrived.wait()
        asking.cancel()
        await running.prefill.abort_arrived.wait()
        await running.decode.abort_arrived.wait()
        (sample,) = running.prefill.samples
        assert running.prefill.aborts == running.decode.aborts == [{"rid": sample.rid}]
        assert await blamed(running) == []
        await check_nothing_is_left(running)


@pytest.mark.parametrize("status", [400, 404, 429])
async def test_a_refusal_does_not_open_the_breaker(status):
    async with stack(decode=stubs.refuse(status), router=BLAMING | {"max_retries": 0}) as running:
        for _ in range(3):
            assert (await ask(running, body()))[0] == status
        assert await blamed(running) == []


async def test_an_answer_leaves_nothing_to_abort():
    async with stack(router=BLAMING) as running:
        for stream in (False, True):
            check_answer(*await ask(running, body(stream=stream)))
        await check_nothing_is_left(running)
    assert running.prefill.aborts == running.decode.aborts == []


# ------------------------------------------------------------------------------------------------ the breaker


async def test_a_worker_that_keeps_failing_gets_no_more_legs():
    router = {"breaker_failures": 2, "breaker_pause_s": 3600.0}
    async with stack(decode=stubs.refuse(500), router=router) as running:
        assert [(await ask(running, body()))[0] for _ in range(3)] == [502, 502, 503]
        _, reply = await ask(running, body())
        assert len(running.decode.samples) == 2
        assert f'tandem_router_breaker_open{{role="decode",worker="{running.decode.url}"}} 1.0' in (
            await metrics_of(running)
        )
        async with running.client.get("/health_generate") as response:
            assert response.status == 503
    error = reply["error"]
    assert (error["code"], error["leg"], error["stage"]) == ("no_healthy_pair", "decode", "pick")
    assert running.decode.url in error["message"]
    assert "circuit breaker is open" in error["message"]


async def test_one_trial_brings_it_back():
    router = {"breaker_failures": 1, "breaker_pause_s": 0.001}
    async with stack(decode=stubs.refuse(500), router=router) as running:
        await ask(running, body())
        running.decode.behaviour = stubs.after_release
        running.decode.arrived.clear()
        # Until the pause is over there is nobody to ask.
        trial = asyncio.create_task(ask(running, body()))
        while not running.decode.arrived.is_set():
            if trial.done():
                assert trial.result()[0] == 503
                trial = asyncio.create_task(ask(running, body()))
            await asyncio.sleep(0)
        assert (await workers_of(running))[running.decode.url]["breaker"] == "half_open"
        status, reply = await ask(running, body())
        assert (status, "half_open" in reply["error"]["message"]) == (503, True)
        running.decode.release.set()
        check_answer(*await trial)
        assert await blamed(running) == []


async def test_the_failure_is_told_if_there_is_nobody_to_try_it_with_again():
    async with stack(decode=stubs.refuse(500, "lost a page"), router=BLAMING) as running:
        status, reply = await ask(running, body())
        assert (status, reply["error"]["leg"]) == (502, "decode")
        assert "lost a page" in reply["error"]["message"]
        assert (await ask(running, body()))[0] == 503


async def test_health_generate_is_one_attempt():
    async with stack(decode=stubs.refuse(500), num_pairs=2, router={"max_retries": 2}) as running:
        async with running.client.get("/health_generate") as response:
            assert (response.status, (await response.json())["error"]["leg"]) == (502, "decode")
        assert running.pairs[1][1].samples == []
