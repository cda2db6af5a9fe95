"""The router over stub workers: what it answers, what it refuses, and whom it lets go."""

import asyncio
import json

import aiohttp
import msgspec
import numpy as np
import pytest

from common.config import ServerOptions
from common.errors import UsageError
from common.routed_experts.codec import rows_from_reply
from router.config import RouterConfig, RouterOptions, parse_router_config
from router.membership import Membership
from tests.support import stub_workers as stubs
from tests.support.prompts import sample
from tests.support.rows import SPEC
from tests.support.stub_workers import CACHED_TOKENS, ROWS, stack

PROMPT = list(range(10, 17))
P = len(PROMPT)


def body(**fields):
    sampling = {"max_new_tokens": 4, "sampling_seed": 100} | fields.pop("sampling_params", {})
    return {"input_ids": PROMPT, "rid": "mine", "return_routed_experts": True, "sampling_params": sampling} | fields


async def ask(running, request_body, **headers):
    async with running.client.post("/generate", json=request_body, headers=headers) as response:
        return response.status, await response.json()


async def events_of(running, request_body):
    """All events of a stream, and whether it ended with [DONE]."""
    async with running.client.post("/generate", json=request_body | {"stream": True}) as response:
        assert response.status == 200, await response.text()
        data = [line[6:] for line in (await response.text()).split("\n\n") if line]
    return [json.loads(item) for item in data if item != "[DONE]"], data[-1] == "[DONE]"


def moe_rows(meta):
    rows = rows_from_reply(meta)
    return rows[:, list(SPEC.layer_ids)] if meta["routed_experts_dtype"] == "int32" else rows


# ------------------------------------------------------------------------------------------------ good answers


@pytest.mark.parametrize("form", ["int32", "auto"])
@pytest.mark.parametrize("start", [0, 3, P])
@pytest.mark.parametrize("max_new_tokens", [1, 4])
async def test_one_sample(form, start, max_new_tokens):
    async with stack() as running:
        status, reply = await ask(
            running,
            body(
                routed_experts_start_len=start,
                routed_experts_dtype=form,
                return_logprob=True,
                sampling_params={"max_new_tokens": max_new_tokens},
            ),
        )
    assert status == 200
    meta = reply["meta_info"]
    tokens = [100, 101, 102, 103][:max_new_tokens]
    assert reply["output_ids"] == tokens
    assert reply["text"] == "".join(f"<{token}>" for token in tokens)
    assert "leg" not in reply
    assert (meta["id"], meta["prompt_tokens"], meta["completion_tokens"]) == ("mine", P, max_new_tokens)
    assert meta["cached_tokens"] == CACHED_TOKENS
    assert meta["finish_reason"] == {"type": "length", "length": max_new_tokens}
    assert meta["output_token_logprobs"] == [[-float(token), token, None] for token in tokens]
    assert (meta["pd_prefill_forward_duration"], meta["pd_transfer_duration"]) == (0.5, 0.5)
    assert meta["routed_experts_start_len"] == start
    np.testing.assert_array_equal(moe_rows(meta), ROWS[start : P + max_new_tokens - 1])


async def test_both_legs_get_one_room_one_seed_and_rids_of_one_length():
    async with stack() as running:
        await ask(running, {"text": "hello", "rid": "r"})
        await ask(running, {"text": "hello", "rid": "a much longer rid"})
        prefill, decode = running.prefill.samples, running.decode.samples
    for ours, theirs in zip(prefill, decode, strict=True):
        assert ours == theirs
        assert ours.bootstrap is not None
        assert (ours.bootstrap.host, ours.bootstrap.port) == ("127.0.0.1", 8998)
        assert len(ours.rid) == 32
    assert prefill[0].bootstrap.room != prefill[1].bootstrap.room
    assert prefill[0].options.sampling.seed != prefill[1].options.sampling.seed
    assert running.prefill.accepts == running.decode.accepts == ["application/msgpack"] * 2


async def test_a_list_is_answered_in_order():
    prompts = [[1] * 3, [2] * 9, [3] * 5]
    async with stack() as running:
        status, replies = await ask(
            running,
            body(
                input_ids=prompts,
                rid=["a", "b", "c"],
                sampling_params={},
            )
            | {"sampling_params": [{"max_new_tokens": n, "sampling_seed": n} for n in (2, 3, 4)]},
        )
        rooms = {sample.bootstrap.room for sample in running.prefill.samples}
    assert status == 200
    assert len(rooms) == 3
    for reply, rid, prompt, count in zip(replies, "abc", prompts, (2, 3, 4), strict=True):
        assert reply["meta_info"]["id"] == rid
        assert reply["output_ids"] == [count + i for i in range(count)]
        np.testing.assert_array_equal(moe_rows(reply["meta_info"]), ROWS[: len(prompt) + count - 1])


async def test_a_list_of_one_is_a_list():
    async with stack() as running:
        _, replies = await ask(running, {"text": ["a"]})
    assert [reply["text"] for reply in replies] == [replies[0]["text"]]
    assert "routed_experts" not in replies[0]["meta_info"]


@pytest.mark.parametrize("is_list", [False, True])
async def test_a_client_may_have_msgpack(is_list):
    request = body(input_ids=[PROMPT, PROMPT] if is_list else PROMPT)
    async with (
        stack() as running,
        running.client.post("/generate", json=request, headers={"Accept": "application/msgpack"}) as response,
    ):
        assert response.content_type == "application/msgpack"
        reply = msgspec.msgpack.decode(await response.read())
    for one in reply if is_list else [reply]:
        assert isinstance(one["meta_info"]["routed_experts"], bytes)
        np.testing.assert_array_equal(moe_rows(one["meta_info"]), ROWS[: P + 3])


async def test_scoring_asks_the_prefill_leg_alone():
    async with stack(decode=stubs.hang) as running:
        request = body(sampling_params={"max_new_tokens": 0}, routed_experts_start_len=2)
        status, reply = await ask(running, request)
        events, done = await events_of(running, request | {"routed_experts_start_len": P})
        assert running.decode.samples == []
        assert running.prefill.samples[0].bootstrap is None
    assert (status, reply["output_ids"], reply["text"]) == (200, [], "")
    np.testing.assert_array_equal(moe_rows(reply["meta_info"]), ROWS[2 : P - 1])
    assert done
    assert [event["meta_info"]["routed_experts"] for event in events] == [""]


async def test_large_replies_are_written_in_slices_and_whole():
    prompts = [[1] * 250] * 300
    async with stack() as running:
        status, replies = await ask(running, {"input_ids": prompts, "return_routed_experts": True})
        assert status == 200
        expected = ROWS[:250]
        for reply in replies:
            np.testing.assert_array_equal(moe_rows(reply["meta_info"])[:250], expected)


async def test_many_at_once():
    async with stack() as running:
        answers = await asyncio.gather(
            *(ask(running, body(rid=f"r{i}", sampling_params={"sampling_seed": i})) for i in range(100))
        )
    for i, (status, reply) in enumerate(answers):
        assert (status, reply["meta_info"]["id"], reply["output_ids"][0]) == (200, f"r{i}", i)


# ------------------------------------------------------------------------------------------------ streams


async def test_a_stream_relays_events_and_ends_with_the_rows():
    async with stack() as running:
        events, done = await events_of(running, body(return_logprob=True))
        assert running.prefill.accepts == ["application/msgpack"]
        assert (running.prefill.samples[0].options.stream, running.decode.samples[0].options.stream) == (False, True)
    assert done
    assert [event["output_ids"] for event in events] == [[100], [100, 101], [100, 101, 102], [100, 101, 102, 103]]
    assert {event["meta_info"]["id"] for event in events} == {"mine"}
    assert all("index" not in event for event in events)
    assert all("routed_experts" not in event["meta_info"] for event in events[:-1])
    last = events[-1]["meta_info"]
    np.testing.assert_array_equal(moe_rows(last), ROWS[: P + 3])
    assert (last["cached_tokens"], last["finish_reason"]["type"]) == (CACHED_TOKENS, "length")


async def test_a_list_streams_with_indices():
    async with stack() as running:
        events, done = await events_of(running, body(input_ids=[[1] * 3, [2] * 8], rid=["a", "b"]))
    assert done
    for index, (rid, num_tokens) in enumerate([("a", 3), ("b", 8)]):
        mine = [event for event in events if event["index"] == index]
        assert {event["meta_info"]["id"] for event in mine} == {rid}
        assert len(mine) == 4
        np.testing.assert_array_equal(moe_rows(mine[-1]["meta_info"]), ROWS[: num_tokens + 3])


async def test_the_last_event_waits_for_the_prefill_leg():
    async with (
        stack(prefill=stubs.after_release) as running,
        running.client.post("/generate", json=body(stream=True)) as response,
    ):
        seen = b""
        while seen.count(b"\n\n") < 3:
            seen += await response.content.readany()
        assert b"[100,101,102]" in seen
        assert b"[100,101,102,103]" not in seen
        running.prefill.release.set()
        assert b"[100,101,102,103]" in await response.content.read()


async def test_a_stream_uses_its_connection_again():
    async with stack() as running:
        for _ in range(3):
            await events_of(running, body())
        async with running.client.get("/workers") as response:
            workers = (await response.json())["workers"]
    assert [worker["outstanding_requests"] for worker in workers] == [0, 0]


# ------------------------------------------------------------------------------------------------ failing legs


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("behaviour", "status", "code", "message"),
    [
        (stubs.refuse(400, "id 5000 is outside [0, 1000)"), 400, "invalid_request", "input_ids: id 5000"),
        (stubs.refuse(429, "full"), 429, "internal", "full"),
        (stubs.refuse(500, "lost a page", "routed_experts_missing"), 502, "routed_experts_missing", "lost a page"),
        (stubs.refuse(504, "no transfer", "deadline_exceeded"), 504, "deadline_exceeded", "no transfer"),
        (stubs.reset, 502, "leg_failed", "connection lost"),
        (stubs.garbage, 502, "leg_failed", "leg on http"),
    ],
)
@pytest.mark.parametrize("leg", ["prefill", "decode"])
async def test_one_failing_leg_ends_the_other(leg, behaviour, status, code, message, stream):
    other = "decode" if leg == "prefill" else "prefill"
    async with stack(**{leg: behaviour, other: stubs.hang}) as running:
        answered, reply = await ask(running, body(stream=stream))
        survivor = getattr(running, other)
        if survivor.arrived.is_set():
            await survivor.cancelled.wait()
    error = reply["error"]
    assert (answered, error["code"], error["leg"], error["rid"]) == (status, code, leg, "mine")
    assert message in error["message"]
    if status >= 500:
        assert getattr(running, leg).url in error["message"]
        assert error["stage"]


@pytest.mark.parametrize("leg", ["prefill", "decode"])
async def test_a_worker_that_is_not_there(leg):
    async with stack() as running:
        url = getattr(running, leg).url
        gone = url.rsplit(":", 1)[0] + ":1"
        options = {"prefill": ((running.prefill.url, 8998),), "decode": (running.decode.url,)}
        options[leg] = ((gone, 8998),) if leg == "prefill" else (gone,)
        app = await stubs.create_app(RouterConfig(router=RouterOptions(**options, max_retries=0)))
        async with stubs.serving(app) as router, running.client.post(f"{router}/generate", json=body()) as response:
            error = (await response.json())["error"]
            assert (response.status, error["leg"], error["stage"]) == (502, leg, "connect")
            assert gone in error["message"]


@pytest.mark.parametrize("behaviour", [stubs.die_mid_stream, stubs.end_without_last_event, stubs.error_event])
async def test_a_stream_that_breaks_ends_with_an_error_event(behaviour):
    async with (
        stack(decode=behaviour, prefill=stubs.hang) as running,
        running.client.post("/generate", json=body(stream=True)) as response,
    ):
        assert response.status == 200
        await response.content.readuntil(b"\n\n")
        running.decode.release.set()
        rest = [item for item in (await response.text()).split("\n\n") if item]
        await running.prefill.cancelled.wait()
    error = json.loads(rest[-1].removeprefix("data: "))["error"]
    assert (error["leg"], error["rid"]) == ("decode", "mine")
    assert running.decode.url in error["message"]


async def test_a_prefill_failure_mid_stream_ends_it():
    async def fail_late(stub, request, sample):
        await stub.release.wait()
        return await stubs.refuse(500)(stub, request, sample)

    async with (
        stack(decode=stubs.stream_and_hang, prefill=fail_late) as running,
        running.client.post("/generate", json=body(stream=True)) as response,
    ):
        await response.content.readuntil(b"\n\n")
        running.prefill.release.set()
        rest = await response.text()
        await running.decode.cancelled.wait()
    assert '"leg":"prefill"' in rest
    assert "[DONE]" not in rest


async def test_one_failing_sample_ends_its_list():
    async def fail_the_second(stub, request, sample):
        return await (stubs.refuse(400) if sample.input_ids == (2,) else stubs.hang)(stub, request, sample)

    async with stack(decode=fail_the_second) as running:
        status, reply = await ask(running, body(input_ids=[[1], [2]], rid=["a", "b"]))
    assert (status, reply["error"]["rid"]) == (400, "b")


@pytest.mark.parametrize("stream", [False, True])
async def test_the_deadline_names_who_was_waited_for(stream):
    async with stack(decode=stubs.hang, deadline_s=0.2) as running:
        status, reply = await ask(running, body(stream=stream))
        await running.decode.cancelled.wait()
    assert (status, reply["error"]["code"], reply["error"]["leg"]) == (504, "deadline_exceeded", "decode")
    assert running.decode.url in reply["error"]["message"]


# ------------------------------------------------------------------------------------------------ rows and disagreements


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("leg", "fault", "status", "code"),
    [
        ("decode", {"shift_rows": 1}, 500, "routed_experts_missing"),
        ("decode", {"shift_rows": -1}, 500, "routed_experts_mismatch"),
        ("prefill", {"shift_rows": 1}, 500, "routed_experts_missing"),
        ("prefill", {"drop_rows": True}, 500, "routed_experts_missing"),
        ("decode", {"drop_rows": True}, 500, "routed_experts_missing"),
        ("decode", {"prompt_offset": 1}, 502, "leg_failed"),
        ("prefill", {"first_token_offset": 1}, 502, "leg_failed"),
    ],
)
async def test_legs_that_do_not_fit_are_an_error(leg, fault, status, code, stream):
    async with stack() as running:
        for name, value in fault.items():
            setattr(getattr(running, leg), name, value)
        if stream:
            events, done = await events_of(running, body())
            assert not done
            error = events[-1]["error"]
        else:
            answered, reply = await ask(running, body())
            assert answered == status
            error = reply["error"]
    assert (error["code"], error["rid"]) == (code, "mine")


async def test_bad_rows_do_not_leave():
    async def repeat_an_expert(stub, request, sample):
        reply = stub.reply(sample, binary=True)
        reply["meta_info"]["routed_experts"] = bytes(len(reply["meta_info"]["routed_experts"]))
        return stubs.web.Response(body=msgspec.msgpack.encode(reply))

    async with stack(decode=repeat_an_expert) as running:
        status, reply = await ask(running, body())
    assert (status, reply["error"]["code"]) == (500, "routed_experts_bad")
    assert f"position {P}" in reply["error"]["message"]


# ------------------------------------------------------------------------------------------------ several samples


def tokens_of(seed, index, count=4):
    return [seed + index + i for i in range(count)]


@pytest.mark.parametrize("accept", ["application/json", "application/msgpack"])
@pytest.mark.parametrize("start", [0, P])
async def test_n_samples_share_one_prefill(start, accept):
    request = body(sampling_params={"n": 3}, routed_experts_start_len=start, return_logprob=True)
    async with (
        stack() as running,
        running.client.post("/generate", json=request, headers={"Accept": accept}) as response,
    ):
        assert response.content_type == accept
        decode = json.loads if accept == "application/json" else msgspec.msgpack.decode
        replies = decode(await response.read())
        (prefill,), (decode_leg,) = running.prefill.samples, running.decode.samples
    assert prefill == decode_leg
    assert prefill.bootstrap is not None
    assert len(set(prefill.bootstrap.rooms)) == prefill.options.sampling.n == 3
    assert len(replies) == 3
    for index, reply in enumerate(replies):
        assert reply["output_ids"] == tokens_of(100, index)
        assert [token for _, token, _ in reply["meta_info"]["output_token_logprobs"]] == tokens_of(100, index)
        assert (reply["meta_info"]["id"], reply["meta_info"]["cached_tokens"]) == ("mine", CACHED_TOKENS)
        np.testing.assert_array_equal(moe_rows(reply["meta_info"]), ROWS[start : P + 3])


@pytest.mark.parametrize("stream", [False, True])
async def test_samples_of_several_prompts_are_numbered_through(stream):
    request = body(input_ids=[[1] * 3, [2] * 8, [3]], rid=["a", "b", "c"]) | {
        "sampling_params": [{"n": n, "max_new_tokens": 3, "sampling_seed": 10 * n} for n in (2, 1, 3)]
    }
    expected = [("a", 3, 20, 0), ("a", 3, 20, 1), ("b", 8, 10, 0), ("c", 1, 30, 0), ("c", 1, 30, 1), ("c", 1, 30, 2)]
    async with stack() as running:
        if stream:
            events, done = await events_of(running, request)
            assert done
            replies = [[event for event in events if event["index"] == index][-1] for index in range(6)]
            assert len(events) == 6 * 3
        else:
            _, replies = await ask(running, request)
    assert len(replies) == 6
    for reply, (rid, num_prompt, seed, index) in zip(replies, expected, strict=True):
        assert (reply["meta_info"]["id"], reply["output_ids"]) == (rid, tokens_of(seed, index, 3))
        np.testing.assert_array_equal(moe_rows(reply["meta_info"]), ROWS[: num_prompt + 2])


async def test_a_sample_that_ends_early_is_told_early():
    async def end_the_first(stub, request, sample):
        response = await stubs.begin_stream(request)
        await response.write(stubs.sse_event(stub.reply(sample, 0, binary=False) | {"index": 0}))
        await stub.release.wait()
        await response.write(stubs.sse_event(stub.reply(sample, 1, binary=False) | {"index": 1}))
        await response.write(stubs.SSE_DONE)
        return response

    request = body(stream=True, sampling_params={"n": 2})
    async with (
        stack(decode=end_the_first) as running,
        running.client.post("/generate", json=request) as response,
    ):
        first = json.loads((await response.content.readuntil(b"\n\n"))[6:])
        assert (first["index"], first["meta_info"]["finish_reason"]["type"]) == (0, "length")
        np.testing.assert_array_equal(moe_rows(first["meta_info"]), ROWS[: P + 3])
        running.decode.release.set()
        assert (await response.text()).endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_sample_too_few_or_twice_is_an_error(stream):
    async def answer_one(stub, request, sample):
        if not stream:
            return stubs.web.Response(body=stubs.encode_msgpack([stub.reply(sample, binary=True)]))
        response = await stubs.begin_stream(request)
        for _ in range(2):
            await response.write(stubs.sse_event(stub.reply(sample, binary=False) | {"index": 0}))
        return response

    async with stack(decode=answer_one) as running:
        if stream:
            events, done = await events_of(running, body(sampling_params={"n": 2}))
            assert not done
            error = events[-1]["error"]
        else:
            _, reply = await ask(running, body(sampling_params={"n": 2}))
            error = reply["error"]
    assert (error["code"], error["leg"]) == ("leg_failed", "decode")


# ------------------------------------------------------------------------------------------------ logprobs


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("with_text", [False, True])
async def test_logprobs_come_from_the_leg_that_knows_them(with_text, stream):
    request = body(
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=2,
        return_text_in_logprobs=with_text,
        sampling_params={"max_new_tokens": 2},
    )
    async with stack() as running:
        if stream:
            events, _ = await events_of(running, request)
            assert "input_token_logprobs" not in events[0]["meta_info"]
            assert len(events[0]["meta_info"]["output_token_logprobs"]) == 1
            meta = events[-1]["meta_info"]
        else:
            _, reply = await ask(running, request)
            meta = reply["meta_info"]

    def item(token):
        return [-float(token), token, f"<{token}>" if with_text else None]

    first = [None, PROMPT[0], f"<{PROMPT[0]}>" if with_text else None]
    assert meta["input_token_logprobs"] == [first, *(item(token) for token in PROMPT[1:])]
    assert meta["input_top_logprobs"] == [None, *([item(token), item(token + 1)] for token in PROMPT[1:])]
    assert meta["output_token_logprobs"] == [item(100), item(101)]
    assert meta["output_top_logprobs"] == [[item(100), item(101)], [item(101), item(102)]]


async def test_a_scored_prompt_has_its_logprobs():
    async with stack() as running:
        request = body(return_logprob=True, logprob_start_len=2, sampling_params={"max_new_tokens": 0})
        _, reply = await ask(running, request)
    meta = reply["meta_info"]
    assert [token for _, token, _ in meta["input_token_logprobs"]] == PROMPT[2:]
    assert meta["output_token_logprobs"] == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("leg", ["prefill", "decode"])
async def test_logprobs_that_are_not_whole_are_an_error(leg, stream):
    async with stack() as running:
        getattr(running, leg).drop_logprobs = True
        request = body(return_logprob=True, logprob_start_len=0)
        if stream:
            events, done = await events_of(running, request)
            assert not done
            error = events[-1]["error"]
        else:
            status, reply = await ask(running, request)
            assert status == 502
            error = reply["error"]
    assert (error["code"], error["leg"], error["rid"]) == ("leg_failed", leg, "mine")


# ------------------------------------------------------------------------------------------------ aborts


async def abort(running, **fields):
    async with running.client.post("/abort_request", json=fields) as response:
        return response.status, await response.json()


async def both_arrived(running):
    await running.prefill.arrived.wait()
    await running.decode.arrived.wait()


async def ask_and_abort(running, request, **fields):
    asking = asyncio.create_task((events_of if request.get("stream") else ask)(running, request))
    await both_arrived(running)
    status, reports = await abort(running, **fields)
    assert status == 200, reports
    return await asking, reports


def last_reply(answer, request):
    first, second = answer
    if not request.get("stream"):
        assert first == 200
        return second
    assert second, "the stream ended without [DONE]"
    return first[-1]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("selector", [{"rid": "mi"}, {"abort_all": True}])
async def test_an_aborted_request_ends_with_what_it_has(selector, stream):
    request = body(stream=stream, return_logprob=True)
    async with stack(decode=stubs.when_aborted(2)) as running:
        answer, reports = await ask_and_abort(running, request, **selector)
        (prefill,), (decode,) = running.prefill.samples, running.decode.samples
    assert running.prefill.aborts == running.decode.aborts == [{"rid": prefill.rid}]
    assert prefill.rid == decode.rid
    assert reports["aborted"] == 1
    assert [(one["worker_type"], one["status"]) for one in reports["workers"]] == [("prefill", 200), ("decode", 200)]
    reply = last_reply(answer, request)
    meta = reply["meta_info"]
    assert (reply["output_ids"], reply["text"]) == ([100, 101], "<100><101>")
    assert (meta["finish_reason"]["type"], meta["finish_reason"]["cause"]) == ("abort", "requested")
    np.testing.assert_array_equal(moe_rows(meta), ROWS[: P + 1])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        (stubs.when_aborted(0), stubs.when_aborted(0)),
        (stubs.when_aborted(0), stubs.hang),
        (stubs.when_aborted(0), stubs.fail_when_aborted),
        (stubs.fail_when_aborted, stubs.when_aborted(0)),
        (stubs.good, stubs.when_aborted(0)),
    ],
)
async def test_a_request_aborted_before_its_first_token_has_no_rows(prefill, decode, n, stream):
    request = body(stream=stream, return_logprob=True, sampling_params={"n": n})
    async with stack(prefill=prefill, decode=decode) as running:
        answer, _ = await ask_and_abort(running, request, rid="mine")
    if stream:
        replies, done = answer
        assert done
    else:
        status, reply = answer
        assert status == 200
        replies = reply if n > 1 else [reply]
    assert len(replies) == n
    for reply in replies:
        assert (reply["output_ids"], reply["text"]) == ([], "")
        assert reply["meta_info"]["finish_reason"]["type"] == "abort"
        assert reply["meta_info"]["output_token_logprobs"] == []
        assert not any(name.startswith("routed_experts") for name in reply["meta_info"])


async def test_a_scored_prompt_can_be_aborted():
    async with stack(prefill=stubs.when_aborted(0)) as running:
        asking = asyncio.create_task(ask(running, body(sampling_params={"max_new_tokens": 0})))
        await running.prefill.arrived.wait()
        await abort(running, rid="mine")
        status, reply = await asking
    assert (status, reply["output_ids"]) == (200, [])
    assert "routed_experts" not in reply["meta_info"]


async def test_an_abort_reaches_no_other_request():
    async with stack(decode=stubs.after_release) as running:
        asking = asyncio.create_task(ask(running, body()))
        await both_arrived(running)
        assert (await abort(running, rid="other"))[1]["aborted"] == 0
        assert (await abort(running, rid=""))[0] == (await abort(running))[0] == 400
        assert running.decode.aborts == []
        running.decode.release.set()
        status, reply = await asking
    assert (status, reply["output_ids"]) == (200, tokens_of(100, 0))
    async with stack() as running:
        await ask(running, body())
        assert (await abort(running, abort_all=True))[1]["aborted"] == 0


@pytest.mark.parametrize("leg", ["prefill", "decode"])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_abort_that_nobody_asked_for_is_a_failure(leg, stream):
    async def lose(stub, request, sample):
        reply = stub.reply(sample, binary=not sample.options.stream, num_tokens=1)
        reply["meta_info"]["finish_reason"] = {"type": "abort", "message": "lost a page", "cause": "preempted"}
        if not sample.options.stream:
            return stubs.web.Response(body=stubs.encode_msgpack(reply))
        response = await stubs.begin_stream(request)
        await response.write(stubs.sse_event(reply))
        return response

    async with stack(**{leg: lose}) as running:
        if stream:
            async with running.client.post("/generate", json=body(stream=True)) as response:
                text = await response.text()
            error = json.loads(text.removeprefix("data: ").split("\n\ndata: ")[-1])["error"]
        else:
            status, reply = await ask(running, body())
            assert status == 502
            error = reply["error"]
    assert (error["code"], error["leg"]) == ("leg_failed", leg)
    assert "lost a page" in error["message"]


# ------------------------------------------------------------------------------------------------ clients


@pytest.mark.parametrize("is_list", [False, True])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_frees_both_legs(stream, is_list):
    async with stack(prefill=stubs.hang, decode=stubs.stream_and_hang if stream else stubs.hang) as running:
        request = body(stream=stream, input_ids=[PROMPT] if is_list else PROMPT)
        asking = asyncio.create_task(running.client.post("/generate", json=request))
        if stream:
            response = await asking
            await response.content.readuntil(b"\n\n")
        await running.prefill.arrived.wait()
        await running.decode.arrived.wait()
        if stream:
            response.close()
        else:
            asking.cancel()
        await running.prefill.cancelled.wait()
        await running.decode.cancelled.wait()
        async with running.client.get("/metrics") as response:
            text = await response.text()
    assert 'tandem_router_requests_total{status="499"} 1.0' in text
    assert "tandem_router_running_requests 0.0" in text


@pytest.mark.parametrize(
    ("request_body", "headers", "field"),
    [
        ({"text": ""}, {}, "text"),
        ({"text": "a", "stream": True}, {"Accept": "application/msgpack"}, "stream"),
        ({"text": "a", "sampling_params": {"n": 0}}, {}, "sampling_params.n"),
    ],
)
async def test_a_wrong_request_reaches_no_worker(request_body, headers, field):
    async with stack() as running:
        status, reply = await ask(running, request_body, **headers)
        assert running.prefill.samples == running.decode.samples == []
    assert status == 400
    assert reply["error"]["type"] == "invalid_request_error"
    assert reply["error"]["message"].startswith(f"{field}: ")


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
async def test_places_are_given_back(path):
    async with stack(server={"max_open_requests": 2}) as running:
        for _ in range(3):
            async with running.client.post(path, json=body(prompt=PROMPT, sampling_params={"n": 2})) as response:
                assert response.status == 200
        async with running.client.post(path, json=body(prompt=PROMPT, n=3, sampling_params={"n": 3})) as response:
            assert (response.status, "Retry-After" in response.headers) == (429, True)
            assert (await response.json())["error"]["type"] == "rate_limit_error"


async def test_bodies_too_large_and_paths_unknown_have_error_bodies():
    async with stack() as running:
        app = await stubs.create_app(
            RouterConfig(router=RouterOptions(prefill=(), decode=()), server=ServerOptions(max_body_bytes=1024))
        )
        async with stubs.serving(app) as router:
            async with running.client.post(f"{router}/generate", json={"text": "a" * 2000}) as response:
                assert (response.status, "error" in await response.json()) == (413, True)
            async with running.client.post(f"{router}/generate", json={"text": "a"}) as response:
                assert (response.status, (await response.json())["error"]["code"]) == (503, "no_healthy_pair")
            async with running.client.get(f"{router}/nothing") as response:
                assert (response.status, (await response.json())["error"]["code"]) == (404, "not_found")


# ------------------------------------------------------------------------------------------------ control


async def test_health_and_information():
    async with stack() as running:
        for path in ("/health", "/health_generate", "/server_info", "/get_server_info", "/workers"):
            async with running.client.get(path) as response:
                assert response.status == 200, path
                answer = await response.json()
        assert [worker["worker_type"] for worker in answer["workers"]] == ["prefill", "decode"]
        (probe,) = running.decode.samples
        assert (probe.input_ids, probe.options.sampling.max_new_tokens) == ((0,), 1)
        async with running.client.get("/server_info") as response:
            workers = (await response.json())["workers"]
    assert [worker["info"]["role"] for worker in workers] == ["prefill", "decode"]


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(("theirs", "ours"), [(200, 200), (400, 400), (500, 502)])
async def test_a_flush_is_done_when_all_have_done_it(method, theirs, ours):
    async with stack() as running:
        running.decode.flush_status = theirs
        async with running.client.request(method, "/flush_cache") as response:
            assert response.status == ours
            workers = (await response.json())["workers"]
    assert [worker["status"] for worker in workers] == [200, theirs]


async def test_every_worker_is_asked_about_the_model_and_its_load():
    async with stack() as running:
        for path in ("/model_info", "/get_model_info", "/v1/loads"):
            async with running.client.get(path) as response:
                answer = await response.json()
            assert [worker["info"]["role"] for worker in answer["workers"]] == ["prefill", "decode"], path


async def test_a_worker_that_is_gone_is_told_of():
    async with stack() as running:
        app = await stubs.create_app(
            RouterConfig(router=RouterOptions(prefill=((running.prefill.url, 1),), decode=("http://127.0.0.1:1",)))
        )
        async with stubs.serving(app) as router:
            async with running.client.post(f"{router}/flush_cache") as response:
                assert response.status == 502
                assert [one["status"] for one in (await response.json())["workers"]] == [200, "unreachable"]
            async with running.client.get(f"{router}/v1/models") as response:
                assert (await response.json())["data"][0]["id"] == "stub/model"


async def test_health_generate_tells_of_a_broken_pair():
    async with stack(decode=stubs.refuse(500)) as running:
        async with running.client.get("/health_generate") as response:
            assert (response.status, (await response.json())["error"]["leg"]) == (502, "decode")
        async with running.client.get("/health") as response:
            assert response.status == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_an_aggregated_worker_that_is_gone_is_named_without_a_leg(stream: bool):
    app = await stubs.create_app(RouterConfig(router=RouterOptions(worker=("http://127.0.0.1:1",))))
    async with (
        stubs.serving(app) as url,
        aiohttp.ClientSession(url) as client,
        client.post("/generate", json=body(stream=stream)) as response,
    ):
        error = (await response.json())["error"]
    assert (response.status, error["leg"], error["stage"]) == (502, None, "connect")
    assert error["message"].startswith("aggregated worker on http://127.0.0.1:1: no connection")


def test_flags():
    config = parse_router_config(
        ["--prefill", "http://a:1", "8998", "--prefill", "http://b:2", "8999", "--decode", "http://c:3", "--port=9000"]
    )
    assert config.router.prefill == (("http://a:1", 8998), ("http://b:2", 8999))
    assert (config.router.decode, config.server.port) == (("http://c:3",), 9000)
    assert parse_router_config(["--worker", "http://w:4"]).router.worker == ("http://w:4",)


@pytest.mark.parametrize(
    "argv",
    [
        ["--decode", "http://c:3"],
        ["--prefill", "http://a:1", "8998"],
        ["--decode", "http://c:3", "--worker", "http://w:4"],
        ["--prefill", "http://a:1", "8998", "--decode", "http://c:3", "--worker", "http://w:4"],
        ["--worker", "w:4"],
        ["--prefill", "http://a:1", "x", "--decode", "http://c:3"],
        ["--prefill", "http://a:1", "0", "--decode", "http://c:3"],
        ["--prefill", "a:1", "8998", "--decode", "http://c:3"],
        ["--prefill", "http://a:1", "8998", "--decode", "http://c:notaport"],
    ],
)
def test_flags_that_cannot_be_used(argv):
    with pytest.raises(UsageError, match=r"--(prefill|decode|worker)"):
        parse_router_config(argv)


def test_an_ipv6_worker_has_a_bare_host():
    membership = Membership(RouterOptions(prefill=(("http://[::1]:7000/", 1),), decode=("http://b:1",)))
    prefill = membership.pick("prefill", sample())
    assert (prefill.host, prefill.url) == ("::1", "http://[::1]:7000")
