"""The router over stub workers: what it answers, what it refuses, and whom it lets go."""

import asyncio
import json

import msgspec
import numpy as np
import pytest

from common.config import ServerOptions
from common.errors import UsageError
from common.routed_experts.codec import rows_from_reply
from router.config import RouterConfig, RouterOptions, parse_router_config
from router.membership import Membership, Worker
from router.policy import make_policy
from tests.support import stub_workers as stubs
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
        app = await stubs.create_app(RouterConfig(router=RouterOptions(**options)))
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
        ({"text": "a", "sampling_params": {"n": 2}}, {}, "sampling_params.n"),
    ],
)
async def test_a_wrong_request_reaches_no_worker(request_body, headers, field):
    async with stack() as running:
        status, reply = await ask(running, request_body, **headers)
        assert running.prefill.samples == running.decode.samples == []
    assert status == 400
    assert reply["error"]["type"] == "invalid_request_error"
    assert reply["error"]["message"].startswith(f"{field}: ")


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
    assert [worker["info"] for worker in workers] == [{"role": "prefill"}, {"role": "decode"}]


async def test_health_generate_tells_of_a_broken_pair():
    async with stack(decode=stubs.refuse(500)) as running:
        async with running.client.get("/health_generate") as response:
            assert (response.status, (await response.json())["error"]["leg"]) == (502, "decode")
        async with running.client.get("/health") as response:
            assert response.status == 200


def test_flags():
    config = parse_router_config(
        ["--prefill", "http://a:1", "8998", "--prefill", "http://b:2", "8999", "--decode", "http://c:3", "--port=9000"]
    )
    assert config.router.prefill == (("http://a:1", 8998), ("http://b:2", 8999))
    assert (config.router.decode, config.server.port) == (("http://c:3",), 9000)


@pytest.mark.parametrize(
    "argv",
    [
        ["--decode", "http://c:3"],
        ["--prefill", "http://a:1", "x", "--decode", "http://c:3"],
        ["--prefill", "http://a:1", "0", "--decode", "http://c:3"],
        ["--prefill", "a:1", "8998", "--decode", "http://c:3"],
        ["--prefill", "http://a:1", "8998", "--decode", "http://c:notaport"],
    ],
)
def test_flags_that_cannot_be_used(argv):
    with pytest.raises(UsageError, match=r"--(prefill|decode)"):
        parse_router_config(argv)


def test_policies():
    workers = [Worker("http://a:1", "decode"), Worker("http://b:1", "decode"), Worker("http://c:1", "decode")]
    round_robin = make_policy("round_robin")
    assert [round_robin(workers) for _ in range(4)] == [*workers, workers[0]]
    least_loaded = make_policy("least_loaded")
    with workers[0].busy(), workers[0].busy(), workers[1].busy():
        assert least_loaded(workers) is workers[2]
    assert {least_loaded(workers).url for _ in range(3)} == {worker.url for worker in workers}
    assert make_policy("random")(workers) in workers


def test_an_ipv6_worker_has_a_bare_host():
    membership = Membership(RouterOptions(prefill=(("http://[::1]:7000/", 1),), decode=("http://b:1",)))
    assert (membership.prefill[0].host, membership.prefill[0].url) == ("::1", "http://[::1]:7000")
