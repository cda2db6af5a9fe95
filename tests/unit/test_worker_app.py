"""A worker's HTTP side over an engine that the test plays: n samples, stops, aborts, limits, and rows small and large."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp import web
from msgspec.structs import replace

from common.messages import (
    Abort,
    CacheFlushed,
    ErrorReport,
    Failed,
    FinishNow,
    FinishReason,
    FlushCache,
    FrontendToEngine,
    GetStats,
    PromptLogprobs,
    StopAt,
)
from common.routed_experts.codec import rows_from_reply
from common.server.bodies import Body
from common.server.http import EventStream
from tests.support.rows import SPEC
from tests.support.scripted_worker import ROOM, ROWS, STATS, TOKENIZER, Worker, logprob, scripted_worker
from tests.support.stub_workers import serving

ROWS_AUTO: dict[str, Any] = {"return_routed_experts": True, "routed_experts_dtype": "auto"}
PROMPT = [10, 11, 12]
WORDS = TOKENIZER.encode("The river was wide.")
ABORTED = FinishReason(type="abort", message="asked for", cause="requested")


def asked(**fields: Any) -> dict[str, Any]:
    """A request's body, with a room for its one sample."""
    return {"input_ids": PROMPT, **ROOM, "bootstrap_room": 7, **fields}


def text_of(token_ids: list[int]) -> str:
    return TOKENIZER.decode(token_ids, skip_special_tokens=True)


def started(coroutine: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
    return asyncio.create_task(coroutine)


def check_rows(reply: dict[str, Any], start: int, stop: int) -> None:
    np.testing.assert_array_equal(rows_from_reply(reply["meta_info"]), ROWS[start:stop])
    assert reply["meta_info"]["routed_experts_start_len"] == start


async def test_samples_of_one_prompt_are_a_list_in_order():
    async with scripted_worker() as worker:
        body = asked(sampling_params={"n": 2}, bootstrap_room=[7, 8], return_logprob=True, **ROWS_AUTO)
        request = started(worker.post(**body))
        message = await worker.engine.next_generate()
        assert message.options.sampling.n == 2
        assert message.bootstrap is not None
        assert message.bootstrap.rooms == (7, 8)
        worker.engine.finish(message, WORDS[:3], index=1)
        worker.engine.finish(message, WORDS[:5], index=0)
        status, replies = await request
    assert status == 200
    assert [reply["output_ids"] for reply in replies] == [WORDS[:5], WORDS[:3]]
    for reply, count in zip(replies, (5, 3), strict=True):
        assert reply["text"] == text_of(WORDS[:count])
        assert reply["meta_info"]["output_token_logprobs"] == [[logprob(i), WORDS[i], None] for i in range(count)]
        check_rows(reply, 3, 3 + count - 1)


async def test_a_list_of_prompts_has_the_samples_of_a_prompt_together():
    async with scripted_worker() as worker:
        body = asked(
            input_ids=[[1], [2]],
            rid=["a", "b"],
            sampling_params=[{"n": 2}, {"n": 1}],
            bootstrap_room=[[7, 8], 9],
        )
        request = started(worker.post(**body))
        first, second = await worker.engine.next_generate(), await worker.engine.next_generate()
        if first.input_ids == [2]:
            first, second = second, first
        worker.engine.finish(second, [30])
        worker.engine.finish(first, [20], index=1)
        worker.engine.finish(first, [10], index=0)
        _, replies = await request
    assert [(r["meta_info"]["id"], r["output_ids"]) for r in replies] == [("a", [10]), ("a", [20]), ("b", [30])]


async def test_a_prefill_leg_answers_once_for_all_samples():
    async with scripted_worker("prefill") as worker:
        body = asked(
            sampling_params={"n": 2},
            bootstrap_room=[7, 8],
            return_logprob=True,
            logprob_start_len=0,
            top_logprobs_num=2,
            return_text_in_logprobs=True,
            **ROWS_AUTO,
        )
        request = started(worker.post(**body))
        message = await worker.engine.next_generate()
        prompt = PromptLogprobs([None, -1.0, -2.0], PROMPT, [None, [(-1.0, 4)], [(-2.0, 5)]])
        worker.engine.finish(message, [40, 41], start=0, prompt_logprobs=prompt)
        _, reply = await request
    meta = reply["meta_info"]
    assert (reply["output_ids"], reply["text"], meta["completion_tokens"]) == ([40, 41], "", 2)
    words = [TOKENIZER.text_of(token_id) for token_id in range(50)]
    assert meta["input_token_logprobs"] == [[None, 10, words[10]], [-1.0, 11, words[11]], [-2.0, 12, words[12]]]
    assert meta["input_top_logprobs"] == [None, [[-1.0, 4, words[4]]], [[-2.0, 5, words[5]]]]
    assert [item[1:] for item in meta["output_token_logprobs"]] == [[40, words[40]], [41, words[41]]]
    assert len(meta["output_top_logprobs"]) == 2


async def test_a_stream_tells_its_samples_apart():
    async with scripted_worker() as worker:
        body = asked(sampling_params={"n": 2}, bootstrap_room=[7, 8], **ROWS_AUTO)
        request = started(worker.stream(**body))
        message = await worker.engine.next_generate()
        worker.engine.tokens(message, WORDS[:1], index=1)
        worker.engine.tokens(message, WORDS[:2], index=0)
        worker.engine.finish(message, WORDS[:2], index=0)
        worker.engine.tokens(message, WORDS[1:3], index=1, first=1)
        worker.engine.finish(message, WORDS[:3], index=1)
        *events, done = await request
    assert done == "[DONE]"
    assert [(event["index"], event["output_ids"]) for event in events] == [
        (1, WORDS[:1]),
        (0, WORDS[:2]),
        (0, WORDS[:2]),
        (1, WORDS[:3]),
        (1, WORDS[:3]),
    ]
    assert ["routed_experts" in event["meta_info"] for event in events] == [False, False, True, False, True]
    check_rows(events[2], 3, 4)
    check_rows(events[4], 3, 5)


async def test_a_stream_of_one_prompt_has_no_index_and_of_a_list_has():
    async with scripted_worker() as worker:
        request = started(worker.stream(**asked()))
        worker.engine.finish(await worker.engine.next_generate(), WORDS)
        [event, _] = await request
        assert "index" not in event
        body = asked(
            input_ids=[[1], [2]], sampling_params=[{"n": 2}, {"n": 1}], bootstrap_room=[[7, 8], 9], rid=["a", "b"]
        )
        request = started(worker.stream(**body))
        messages = [await worker.engine.next_generate() for _ in range(2)]
        for message in messages:
            for index in range(message.options.sampling.n):
                worker.engine.finish(message, WORDS, index=index)
        *events, _ = await request
    assert sorted((event["index"], event["meta_info"]["id"]) for event in events) == [(0, "a"), (1, "a"), (2, "b")]


# ------------------------------------------------------------------------------------------------ stop strings


@pytest.mark.parametrize("no_stop_trim", [False, True])
async def test_a_stop_string_over_tokens_is_told_to_the_engine(no_stop_trim: bool):
    stop = "ver w"
    count = next(n for n in range(len(WORDS) + 1) if stop in text_of(WORDS[:n]))
    async with scripted_worker() as worker:
        params = {"stop": ["nowhere", stop], "no_stop_trim": no_stop_trim, "n": 2}
        request = started(worker.post(**asked(sampling_params=params, bootstrap_room=[7, 8], **ROWS_AUTO)))
        message = await worker.engine.next_generate()
        for position in range(count):
            worker.engine.tokens(message, [WORDS[position]], index=1, first=position)
        worker.engine.finish(message, WORDS[:2], index=0)
        told = await worker.engine.next()
        assert told == StopAt(rid=message.rid, index=1, num_tokens=count, matched=stop)
        worker.engine.finish(message, WORDS[:count], index=1, reason=FinishReason(type="stop", matched=stop))
        _, (other, reply) = await request
    assert other["meta_info"]["finish_reason"] == {"type": "length", "length": 2}
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert reply["output_ids"] == WORDS[:count]
    text = text_of(WORDS[:count])
    assert reply["text"] == (text if no_stop_trim else text[: text.index(stop)])
    check_rows(reply, 3, 3 + count - 1)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("reports_tokens", [False, True])
@pytest.mark.parametrize("stop", ["ver", "The"])
async def test_an_end_that_crosses_the_stop_is_cut(stop: str, reports_tokens: bool, streams: bool):
    count = next(n for n in range(len(WORDS) + 1) if stop in text_of(WORDS[:n]))
    async with scripted_worker() as worker:
        body = asked(sampling_params={"stop": stop}, return_logprob=True, top_logprobs_num=2, **ROWS_AUTO)
        request = started(worker.stream(**body) if streams else worker.post(**body))
        message = await worker.engine.next_generate()
        if reports_tokens:
            worker.engine.tokens(message, WORDS)
        worker.engine.finish(message, WORDS)
        result = await request
        reply = result[-2] if streams else result[1]
        if reports_tokens:
            assert await worker.engine.next() == StopAt(rid=message.rid, index=0, num_tokens=count, matched=stop)
        await no_more_messages(worker)
    meta = reply["meta_info"]
    assert reply["output_ids"] == WORDS[:count]
    assert reply["text"] == text_of(WORDS[:count]).split(stop)[0]
    assert meta["finish_reason"] == {"type": "stop", "matched": stop}
    assert meta["completion_tokens"] == count
    assert meta["output_token_logprobs"] == [[logprob(i), WORDS[i], None] for i in range(count)]
    assert len(meta["output_top_logprobs"]) == count
    check_rows(reply, 3, 3 + count - 1)
    assert meta["weight_versions"] == ([[3, 3 + count - 1, "w1"]] if count > 1 else [])
    if count == 1:
        assert meta["routed_experts"] == ""
    if streams and reports_tokens:
        assert result[0]["output_ids"] == WORDS[:count]


async def no_more_messages(worker: Worker) -> None:
    """Check that the engine was told nothing else: its next message is an answer to this question."""
    worker.engine.on_message = lambda message: answer_control(worker, message)
    await worker.get("/v1/loads")
    assert isinstance(await worker.engine.next(), GetStats)


def answer_control(worker: Worker, message: FrontendToEngine, refusal: str | None = None) -> None:
    if isinstance(message, GetStats):
        worker.engine.answer(replace(STATS, serial=message.serial))
    elif isinstance(message, FlushCache):
        worker.engine.answer(CacheFlushed(message.serial, refusal))


async def test_streamed_text_never_shows_what_a_stop_string_takes_away():
    async with scripted_worker() as worker:
        request = started(worker.stream(**asked(sampling_params={"stop": "wide!"})))
        message = await worker.engine.next_generate()
        for position, token_id in enumerate(WORDS):
            worker.engine.tokens(message, [token_id], first=position)
        worker.engine.finish(message, WORDS)
        *events, _ = await request
    texts = [event["text"] for event in events]
    assert texts[-1] == "The river was wide."
    assert all(texts[-1].startswith(text) for text in texts)
    assert not any(text.endswith(("w", "wi", "wid", "wide")) for text in texts)


async def test_the_stop_token_is_not_in_the_text():
    async with scripted_worker() as worker:
        for streams in (False, True):
            for no_stop_trim in (False, True):
                params = {"stop_token_ids": [WORDS[-1]], "no_stop_trim": no_stop_trim}
                body = asked(sampling_params=params)
                request = started(worker.stream(**body) if streams else worker.post(**body))
                message = await worker.engine.next_generate()
                if streams:
                    worker.engine.tokens(message, WORDS)
                worker.engine.finish(message, WORDS, reason=FinishReason(type="stop", matched=WORDS[-1]))
                result = await request
                reply = result[-2] if streams else result[1]
                assert reply["output_ids"] == WORDS
                assert reply["text"] == text_of(WORDS if no_stop_trim else WORDS[:-1])


async def test_tokens_that_get_lost_are_a_failure():
    async with scripted_worker() as worker:
        request = started(worker.post(**asked(sampling_params={"stop": "wide"})))
        message = await worker.engine.next_generate()
        worker.engine.tokens(message, WORDS)
        worker.engine.finish(message, WORDS[:2])
        status, body = await request
    assert (status, body["error"]["stage"]) == (500, "engine")


# ------------------------------------------------------------------------------------------------ ends of other kinds


async def test_rows_that_are_missing_are_a_failure_unless_it_was_an_abort():
    async with scripted_worker() as worker:
        request = started(worker.post(**asked(**ROWS_AUTO)))
        worker.engine.finish(await worker.engine.next_generate(), [5], without_rows=True)
        status, body = await request
        assert (status, body["error"]["code"]) == (500, "routed_experts_missing")
        request = started(worker.post(**asked(**ROWS_AUTO, return_logprob=True)))
        worker.engine.finish(await worker.engine.next_generate(), [], without_rows=True, reason=ABORTED)
        status, reply = await request
    assert status == 200
    assert reply["meta_info"]["finish_reason"] == {"type": "abort", "message": "asked for", "cause": "requested"}
    assert reply["output_ids"] == reply["meta_info"]["output_token_logprobs"] == []
    assert not [key for key in reply["meta_info"] if key.startswith("routed_experts")]


async def test_aborts_by_the_beginning_of_the_rid():
    async with scripted_worker() as worker:
        requests = {}
        messages = {}
        for rid in ("job-1", "job-2", "other"):
            requests[rid] = started(worker.post(**asked(rid=rid, **ROWS_AUTO)))
            messages[rid] = await worker.engine.next_generate()
        status, aborted = await worker.post("/abort_request", rid="job-")
        assert status == 200
        assert sorted(aborted["aborted"]) == ["job-1", "job-2"]
        told = [await worker.engine.next(), await worker.engine.next()]
        assert sorted(told, key=str) == [FinishNow(messages["job-1"].rid), FinishNow(messages["job-2"].rid)]
        for rid in ("job-1", "job-2"):
            worker.engine.finish(messages[rid], WORDS[:2], reason=ABORTED)
            _, reply = await requests[rid]
            assert reply["output_ids"] == WORDS[:2]
            check_rows(reply, 3, 4)
        assert not requests["other"].done()
        await worker.post("/abort_request", abort_all=True)
        assert await worker.engine.next() == FinishNow(messages["other"].rid)
        worker.engine.finish(messages["other"], WORDS, reason=ABORTED)
        assert (await requests["other"])[0] == 200
        for body in ({}, {"rid": ""}, {"rid": 3}, {"abort_all": 1}):
            status, _ = await worker.post("/abort_request", **body)
            assert status == 400
        assert (await worker.post("/abort_request", rid="nobody"))[1] == {"aborted": []}


async def test_a_failure_in_a_stream_is_an_event():
    async with scripted_worker() as worker:
        request = started(worker.stream(**asked()))
        message = await worker.engine.next_generate()
        worker.engine.tokens(message, WORDS[:1])
        report = ErrorReport(status=502, message="lost", code="leg_failed", stage="transfer")
        worker.engine.answer(Failed(message.rid, report))
        events = await request
    assert events[0]["output_ids"] == WORDS[:1]
    assert events[1]["error"]["message"] == "lost"
    assert len(events) == 2


@pytest.mark.parametrize("streams", [False, True])
async def test_a_client_that_leaves_aborts_its_request(streams: bool):
    async with scripted_worker() as worker:
        request = started(worker.post(**asked(stream=streams, sampling_params={"n": 2}, bootstrap_room=[7, 8])))
        message = await worker.engine.next_generate()
        if streams:
            worker.engine.tokens(message, WORDS[:1])
        worker.engine.finish(message, WORDS[:1], index=1)
        request.cancel()
        assert await worker.engine.next() == Abort(message.rid)
        worker.engine.on_message = lambda message: answer_control(worker, message)
        assert (await worker.get("/v1/loads"))[1]["open_requests"] == 0


async def test_a_conversation_is_rendered_here():
    async with scripted_worker() as worker:
        chat = {"messages": [{"role": "user", "content": "hi"}], **ROOM, "bootstrap_room": 7}
        request = started(worker.post(**chat))
        message = await worker.engine.next_generate()
        assert message.input_ids == TOKENIZER.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
        worker.engine.finish(message, WORDS)
        assert (await request)[0] == 200


# ------------------------------------------------------------------------------------------------ admission


async def test_too_many_requests_are_told_to_come_back():
    async with scripted_worker(max_open_requests=5) as worker:
        two = {"sampling_params": {"n": 2}, "bootstrap_room": [7, 8]}
        first = started(worker.post(**asked(**two)))
        message = await worker.engine.next_generate()
        second = started(worker.post(**asked(**two)))
        other = await worker.engine.next_generate()
        async with worker.client.post("/generate", json=asked(**two)) as response:
            assert response.status == 429
            assert response.headers["Retry-After"] == "1"
            assert (await response.json())["error"]["type"] == "rate_limit_error"
        third = started(worker.post(**asked()))
        worker.engine.finish(await worker.engine.next_generate(), WORDS)
        assert (await third)[0] == 200, "there was room for one"
        for request, its in ((first, message), (second, other)):
            for index in range(2):
                worker.engine.finish(its, WORDS, index=index)
            assert (await request)[0] == 200
        fourth = started(worker.post(**asked(**two)))
        again = await worker.engine.next_generate()
        for index in range(2):
            worker.engine.finish(again, WORDS, index=index)
        assert (await fourth)[0] == 200


async def test_the_key_is_asked_for_everywhere_but_for_health_and_metrics():
    async with scripted_worker(api_key="s€cret") as worker:
        worker.engine.on_message = lambda message: answer_control(worker, message)
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "s€cret"},
            {"Authorization": "Bearer"},
        ):
            for path in ("/v1/loads", "/server_info", "/model_info", "/nowhere"):
                async with worker.client.get(path, headers=headers) as response:
                    assert response.status == 401
                    assert (await response.json())["error"]["type"] == "authentication_error"
        async with worker.client.post("/generate", json=asked()) as response:
            assert response.status == 401
        for path in ("/health", "/metrics"):
            assert (await worker.get(path))[0] == 200
        async with worker.client.get("/v1/loads", headers={"Authorization": "bearer s€cret"}) as response:
            assert response.status == 200


async def test_a_body_that_is_too_large_is_refused():
    async with scripted_worker(max_body_bytes=2048) as worker:
        status, body = await worker.post(**asked(text="x" * 4096))
        assert (status, body["error"]["type"]) == (413, "invalid_request_error")


@pytest.mark.parametrize("streams", [False, True])
async def test_a_request_has_a_deadline(streams: bool):
    async with scripted_worker(request_deadline_s=0.05) as worker:
        status, body = await worker.post(**asked(stream=streams))
        assert (status, body["error"]["code"], body["error"]["stage"]) == (504, "deadline_exceeded", "decode")
        message = await worker.engine.next_generate()
        assert await worker.engine.next() == Abort(message.rid)
        assert (await worker.get("/v1/loads"))[0] == 504, "an engine that does not answer holds nobody up"


async def test_the_cache_is_flushed_or_the_refusal_told():
    async with scripted_worker() as worker:
        worker.engine.on_message = lambda message: answer_control(worker, message)
        assert (await worker.get("/flush_cache"))[0] == 200
        assert (await worker.post("/flush_cache"))[0] == 200
        worker.engine.on_message = lambda message: answer_control(worker, message, "2 requests run")
        status, body = await worker.get("/flush_cache")
        assert (status, body["error"]["message"]) == (400, "2 requests run")


async def test_what_a_worker_says_of_itself():
    async with scripted_worker() as worker:
        worker.engine.on_message = lambda message: answer_control(worker, message)
        load = {"num_running_reqs": 2, "num_waiting_reqs": 1, "num_used_tokens": 16, "max_total_num_tokens": 36}
        assert (await worker.get("/v1/loads"))[1] == {
            "paused": False,
            "loads": [{"dp_rank": 0, **load}],
            "open_requests": 0,
            "queued_requests": 1,
            "running_requests": 2,
            "free_pages": 5,
            "cached_pages": 3,
            "total_pages": 9,
        }
        for path in ("/model_info", "/get_model_info"):
            info = (await worker.get(path))[1]
            assert (info["model_path"], info["weight_version"], info["num_experts"]) == ("demo", "w1", SPEC.num_experts)
        assert (await worker.get("/server_info"))[1]["disaggregation_mode"] == "decode"


async def test_an_aggregated_worker_takes_whole_requests_alone():
    async with scripted_worker("aggregated", request_deadline_s=0.2) as worker:
        status, body = await worker.post(**asked())
        assert (status, body["error"]["leg"]) == (400, None)
        assert "bootstrap_room" in body["error"]["message"]
        status, body = await worker.post(input_ids=PROMPT)
        assert (status, body["error"]["leg"], body["error"]["stage"]) == (504, None, "generate")
        worker.engine.on_message = lambda message: answer_control(worker, message)
        assert (await worker.get("/server_info"))[1]["disaggregation_mode"] == "null"


# ------------------------------------------------------------------------------------------------ large rows


@pytest.mark.parametrize("form", ["int32", "auto"])
async def test_large_rows_arrive_whole(form: str):
    """Far more than is encoded in one go, in all the ways that rows go out."""
    prompt, output = [3], [4] * 29_000
    async with scripted_worker() as worker:
        body = asked(
            input_ids=prompt,
            return_routed_experts=True,
            routed_experts_dtype=form,
            sampling_params={"max_new_tokens": 29_000},
        )
        for way in ("json", "msgpack", "stream"):
            call = worker.stream(**body) if way == "stream" else worker.post(**body, msgpack=way == "msgpack")
            request = started(call)
            worker.engine.finish(await worker.engine.next_generate(), output)
            result = await request
            reply = result[0] if way == "stream" else result[1]
            rows = rows_from_reply(reply["meta_info"])
            if rows.dtype == np.int32:
                rows = rows[:, list(SPEC.layer_ids)]
            np.testing.assert_array_equal(rows, ROWS[1:29_000])


async def test_a_list_mixes_large_and_small_rows():
    async with scripted_worker() as worker:
        body = asked(
            input_ids=[[1], [2]], bootstrap_room=[7, 8], sampling_params={"max_new_tokens": 29_000}, **ROWS_AUTO
        )
        request = started(worker.post(**body))
        for _ in range(2):
            message = await worker.engine.next_generate()
            worker.engine.finish(message, [4] * (29_000 if message.input_ids == [1] else 1))
        _, (large, small) = await request
    check_rows(large, 1, 29_000)
    assert small["meta_info"]["routed_experts"] == ""


async def test_a_client_that_leaves_in_the_middle_of_large_rows_harms_nobody():
    async with scripted_worker() as worker:
        body = asked(input_ids=[3], sampling_params={"max_new_tokens": 29_000}, return_routed_experts=True)
        for streams in (False, True):
            request = started(begun(worker, {**body, "stream": streams}))
            worker.engine.finish(await worker.engine.next_generate(), [4] * 29_000)
            response = await request
            await response.content.readany()
            response.close()
        request = started(worker.post(**asked()))
        worker.engine.finish(await worker.engine.next_generate(), WORDS)
        assert (await request)[0] == 200


async def begun(worker: Worker, body: dict[str, Any]) -> aiohttp.ClientResponse:
    """Send a request; returns when the headers of the answer are here."""
    return await worker.client.post("/generate", json=body)


async def test_an_event_that_was_cut_short_does_not_swallow_the_next_one():
    """Another sample's failure may cancel whoever is writing large rows."""
    has_begun = asyncio.Event()

    class Endless(Body, frozen=True):
        async def written(self) -> AsyncIterator[bytes]:
            yield b'data: {"half'
            has_begun.set()
            await asyncio.Event().wait()

    async def handle(request: web.Request) -> web.StreamResponse:
        client = EventStream(request)
        writing = asyncio.create_task(client.send_body(Endless([], [])))
        await has_begun.wait()
        writing.cancel()
        await asyncio.wait([writing])
        await client.end(b'data: {"error": {}}\n\n')
        return client.response

    app = web.Application()
    app.router.add_get("/", handle)
    async with asyncio.timeout(20), serving(app) as url, aiohttp.ClientSession(url) as session, session.get("/") as got:
        assert (await got.text()).split("\n\n") == ['data: {"half', 'data: {"error": {}}', ""]
