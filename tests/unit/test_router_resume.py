"""What the router makes of legs that are retracted: the answers are those of runs that nobody interrupted; over stub workers."""

import asyncio
import json
from urllib.parse import quote

import aiohttp
import numpy as np
import pytest

from common.routed_experts.codec import rows_from_reply
from router.config import RouterConfig, RouterOptions
from tests.support import stub_workers as stubs
from tests.support.asking import (
    LEGS,
    OTHER,
    PROMPT,
    P,
    ask,
    blamed,
    body,
    check_answer,
    check_nothing_is_left,
    metrics_of,
    workers_of,
)
from tests.support.rows import SPEC
from tests.support.stub_workers import ROWS, stack

MIXING = {"allow_mixed_versions": True}
G = 4


def wanted(**fields):
    """A request whose answer has all that an answer may have."""
    return body(return_logprob=True, logprob_start_len=2, top_logprobs_num=2, **fields)


def whole(replies):
    """What must not differ between two answers."""
    metas = [reply["meta_info"] for reply in replies]
    for meta in metas:
        del meta["e2e_latency"]
    return replies


async def events_of(running, request):
    async with running.client.post("/generate", json=request | {"stream": True}) as response:
        text = await response.text()
    events = [item.removeprefix("data: ") for item in text.split("\n\n") if item]
    assert events.pop() == "[DONE]", text
    return [json.loads(event) for event in events]


async def answers_of(running, request):
    """The answer of each sample, in order; of a stream its last events, once the others have been checked against them."""
    if not request.get("stream"):
        status, reply = await ask(running, request)
        assert status == 200, reply
        return whole(reply if isinstance(reply, list) else [reply])
    events = await events_of(running, request)
    ends = sorted((e for e in events if e["meta_info"]["finish_reason"]), key=lambda e: e.get("index", 0))
    seen: dict[int, int] = {}
    for event in events:
        if event["meta_info"]["finish_reason"]:
            continue
        index, meta, end = event.get("index", 0), event["meta_info"], ends[event.get("index", 0)]
        ids = event["output_ids"]
        assert len(ids) > seen.get(index, 0), "what a stream has told is never taken back"
        seen[index] = len(ids)
        assert ids == end["output_ids"][: len(ids)]
        assert event["text"] == end["text"][: len(event["text"])]
        assert (meta["prompt_tokens"], meta["completion_tokens"]) == (P, len(ids))
        for name in ("output_token_logprobs", "output_top_logprobs"):
            if name in end["meta_info"]:
                assert meta[name] == end["meta_info"][name][: len(ids)]
    return whole(ends)


async def undisturbed(request):
    async with stack() as running:
        return await answers_of(running, request)


# ------------------------------------------------------------------------------------------------ from its tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("start", [0, 3, P])
@pytest.mark.parametrize("num_tokens", [1, 3])
async def test_a_retracted_sample_goes_on_from_its_tokens(num_tokens, start, stream):
    request = wanted(stream=stream, routed_experts_start_len=start, sampling_params={"min_new_tokens": 2}) | MIXING
    async with stack(decode=stubs.retract(num_tokens)) as running:
        assert await answers_of(running, request) == await undisturbed(request)
        assert await blamed(running) == []
        assert "retries_total{" not in await metrics_of(running)
        await check_nothing_is_left(running)
        first, second = running.decode.samples
        prefills = running.prefill.samples
    assert prefills == [first, second] or stream
    assert second.input_ids == (*PROMPT, *range(100, 100 + num_tokens))
    options, sampling = second.options, second.options.sampling
    assert (options.resumed_tokens, options.resumed_versions) == (num_tokens, ("w1",))
    assert (sampling.max_new_tokens, sampling.min_new_tokens) == (G - num_tokens, max(0, 2 - num_tokens))
    assert (sampling.seed, sampling.n) == (100, 1)
    assert options.routed_experts_start_len == P + num_tokens - 1
    assert options.logprob_start_len == -1
    assert first.bootstrap.room != second.bootstrap.room


@pytest.mark.parametrize("stream", [False, True])
async def test_it_may_be_retracted_again_and_again(stream):
    async def one_token_at_a_time(stub, request, sample):
        if sample.options.sampling.max_new_tokens == 1:
            return await stubs.good(stub, request, sample)
        return await stub.send(request, sample, num_tokens=1, cause="retracted")

    request = wanted(stream=stream) | MIXING
    async with stack(decode=one_token_at_a_time) as running:
        assert await answers_of(running, request) == await undisturbed(request)
        assert [s.options.resumed_tokens for s in running.decode.samples] == [0, 1, 2, 3]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_text_goes_on_as_the_worker_has_read_it(stream):
    request = wanted(stream=stream, text="abcdefg") | MIXING
    del request["input_ids"]
    async with stack(decode=stubs.retract(2)) as running:
        assert await answers_of(running, request) == await undisturbed(request)
        assert running.decode.samples[1].input_ids == (*range(P), 100, 101)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 1, 0, 3)])
async def test_each_of_several_samples_goes_on_by_itself(order, stream):
    """One has ended, two have tokens, and one has none yet."""
    request = wanted(stream=stream, sampling_params={"n": 4}) | MIXING
    num_tokens = [(None, 2, 0, 3)[index] for index in order]
    async with stack(decode=stubs.retract(*num_tokens)) as running:
        assert await answers_of(running, request) == await undisturbed(request)
        legs = {(s.options.sampling.seed, s.options.sampling.n, s.input_ids) for s in running.decode.samples[1:]}
        await check_nothing_is_left(running)
    assert legs == {
        (100 + index, 1, (*PROMPT, *range(100 + index, 100 + index + count)))
        for index, count in enumerate(num_tokens)
        if count is not None
    }


@pytest.mark.parametrize("stream", [False, True])
async def test_an_aggregated_worker_s_samples_go_on_too(stream):
    request = wanted(stream=stream, sampling_params={"n": 2}) | MIXING

    async def answers(behaviour):
        async with stack(decode=behaviour) as running:
            running.decode.is_alone = True
            options = RouterOptions(worker=(running.decode.url,), max_retries=0)
            app = await stubs.create_app(RouterConfig(router=options))
            async with stubs.serving(app) as url, aiohttp.ClientSession(url) as running.client:
                return await answers_of(running, request)

    assert await answers(stubs.retract(2, 1)) == await answers(stubs.good)


async def test_openai_s_routes_go_on_too():
    request = {"model": "m", "prompt": PROMPT, "max_tokens": G, "seed": 100, "stream": True} | MIXING
    texts = []
    for behaviour in (stubs.good, stubs.retract(2)):
        async with stack(decode=behaviour) as running, running.client.post("/v1/completions", json=request) as response:
            events = [e.removeprefix("data: ") for e in (await response.text()).split("\n\n") if e]
        assert events.pop() == "[DONE]"
        texts.append("".join(json.loads(event)["choices"][0]["text"] for event in events))
    assert texts[0] == texts[1] == "<100><101><102><103>"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_abort_ends_what_goes_on_with_all_its_tokens(stream):
    async def second_leg_waits(stub, request, sample):
        behaviour = stubs.retract(2) if len(stub.samples) == 1 else stubs.when_aborted(1)
        return await behaviour(stub, request, sample)

    async with stack(decode=second_leg_waits) as running:
        asked = asyncio.create_task(answers_of(running, wanted(stream=stream) | MIXING))
        async with asyncio.timeout(10):
            while len(running.decode.samples) < 2:
                running.decode.arrived.clear()
                await running.decode.arrived.wait()
        async with running.client.post("/abort_request", json={"rid": "mi"}) as response:
            assert (await response.json())["aborted"] == 1
        (reply,) = await asked
    assert reply["output_ids"] == [100, 101, 102]
    assert reply["meta_info"]["finish_reason"]["cause"] == "requested"
    np.testing.assert_array_equal(rows_from_reply(reply["meta_info"])[:, list(SPEC.layer_ids)], ROWS[: P + 2])


# ------------------------------------------------------------------------------------------------ from the beginning


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("num_tokens", [0, 2])
async def test_what_may_not_mix_weights_starts_again_as_one_prompt(num_tokens, n):
    request = wanted(sampling_params={"n": n})
    async with stack(decode=stubs.retract(*[num_tokens] * n)) as running:
        assert await answers_of(running, request) == await undisturbed(request)
        first, second = running.decode.samples
        assert first.options == second.options
        assert "retries_total{" not in await metrics_of(running)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("other", [stubs.hang, stubs.good])
@pytest.mark.parametrize("leg", LEGS)
async def test_a_leg_without_tokens_starts_again_and_costs_no_retry(leg, other, stream):
    """The other leg may wait for it, or have answered; nothing may be tried again here, and still it is."""

    async def first_time(stub, request, sample):
        return await (other if len(stub.samples) == 1 else stubs.good)(stub, request, sample)

    async with stack(**{leg: stubs.retract(0), OTHER[leg]: first_time}) as running:
        check_answer(*await ask(running, body(stream=stream)))
        assert await blamed(running) == []
        assert "retries_total{" not in await metrics_of(running)
        await check_nothing_is_left(running)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("leg", LEGS)
async def test_a_room_that_was_retracted_fails_its_other_leg_and_nobody_is_blamed(leg, stream):
    """The failure arrives first: the leg that was retracted itself says nothing yet."""

    async def failing(stub, request, sample):
        if len(stub.samples) > 1:
            return await stubs.good(stub, request, sample)
        return await stubs.refuse(502, "the room", "retracted", leg=OTHER[leg], stage="transfer")(stub, request, sample)

    async def silent(stub, request, sample):
        return await (stubs.hang if len(stub.samples) == 1 else stubs.good)(stub, request, sample)

    router = {"breaker_failures": 1, "breaker_pause_s": 3600.0}
    async with stack(**{leg: failing, OTHER[leg]: silent}, router=router) as running:
        check_answer(*await ask(running, body(stream=stream)))
        assert await blamed(running) == []
        assert "retries_total{" not in await metrics_of(running)


async def test_a_retracted_leg_without_its_prompt_s_ids_is_a_failed_one():
    async def forgetful(stub, request, sample):
        reply = stub.reply(sample, binary=True, num_tokens=2, cause="retracted")
        reply["leg"]["prompt_ids"] = None
        return stubs.web.Response(body=stubs.encode_msgpack(reply), content_type=stubs.MSGPACK)

    async with stack(decode=forgetful) as running:
        status, reply = await ask(running, body() | MIXING)
    assert (status, reply["error"]["leg"], reply["error"]["rid"]) == (502, "decode", "mine")
    assert "0 ids of 7 prompt tokens" in reply["error"]["message"]


# ------------------------------------------------------------------------------------------------ versions


def after_new_weights(num_tokens):
    """Give a leg back, and answer the next one with other weights."""

    async def behaviour(stub, request, sample):
        try:
            return await stubs.retract(num_tokens)(stub, request, sample)
        finally:
            stub.weight_version = "w2"

    return behaviour


async def test_versions_are_joined_at_the_seam():
    async with stack(decode=after_new_weights(2)) as running:

        async def prefill(stub, request, sample):
            stub.weight_version = "w2" if len(stub.samples) > 1 else "w1"
            return await stubs.good(stub, request, sample)

        running.prefill.behaviour = prefill
        (reply,) = await answers_of(running, body() | MIXING)
        meta = reply["meta_info"]
        # Position P+1 was not computed when the sample was retracted.
        assert meta["weight_versions"] == [[0, P + 1, "w1"], [P + 1, P + G - 1, "w2"]]
        assert meta["weight_version"] == "w2"


async def test_a_stream_that_may_not_mix_weights_fails_when_it_has():
    async with stack(decode=after_new_weights(2)) as running:

        async def prefill(stub, request, sample):
            stub.weight_version = "w2" if len(stub.samples) > 1 else "w1"
            return await stubs.good(stub, request, sample)

        running.prefill.behaviour = prefill
        _, reply = await ask(running, body(stream=True))
        assert (reply["error"]["code"], reply["error"]["rid"]) == ("mixed_versions", "mine")
        assert len(running.decode.samples) == 2
        options = running.decode.samples[1].options
        assert (options.resumed_tokens, options.resumed_versions) == (2, ("w1",))


async def test_a_stream_that_may_not_mix_weights_goes_on_under_the_same():
    request = wanted(stream=True)
    async with stack(decode=stubs.retract(2)) as running:
        assert await answers_of(running, request) == await undisturbed(request)


async def test_what_is_retracted_and_finds_nobody_says_so():
    async def last_words(stub, request, sample):
        leaving = asyncio.create_task(running.client.delete(f"/workers/{quote(stub.url, safe='')}"))
        while not (await workers_of(running))[stub.url]["is_draining"]:
            pass
        left.append(leaving)
        return await stub.send(request, sample, num_tokens=0, cause="retracted")

    left = []
    async with stack(decode=last_words) as running:
        status, reply = await ask(running, body())
        assert (status, reply["error"]["code"]) == (503, "no_healthy_pair")
        assert (await left[0]).status == 200
