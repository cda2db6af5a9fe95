"""The client against a stand-in: what is tried again, what failures are called, and that nothing but whole rows comes through."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
from aiohttp.test_utils import TestServer

from common.messages import VersionSpan
from deploy.answers import MalformedReplyError, MalformedRowsError, Progress
from deploy.client import TandemClient
from deploy.connection import DeadlinePassedError, NoAnswerError, Retries, ServerError, cut_events
from deploy.replies import Reply
from tests.support.stub_generator import (
    MOE_LAYERS,
    Move,
    StubGenerator,
    hang_up,
    hang_up_midway,
    refuse,
    rows_of,
    say,
    say_nothing,
    spread,
    token_at,
)

QUICK = Retries(most=4, first_pause_s=0.001, longest_pause_s=0.01)
PROMPT = [11, 12, 13, 14]
SIX: dict[str, Any] = {"max_new_tokens": 6}


@pytest.fixture
async def server() -> StubGenerator:
    return StubGenerator()


@pytest.fixture
async def url(server: StubGenerator) -> AsyncIterator[str]:
    async with TestServer(server.app()) as running:
        yield str(running.make_url("/"))


@pytest.fixture
async def client(url: str) -> AsyncIterator[TandemClient]:
    async with TandemClient(url, api_key="secret", deadline_s=30, retries=QUICK) as opened:
        yield opened


def is_right(reply: Reply, prompt: list[int], num_tokens: int, *, start: int = 0) -> None:
    assert reply.output_ids == [token_at(len(prompt) + i, reply.seed) for i in range(num_tokens)]
    assert reply.rows is not None
    assert np.array_equal(reply.rows, rows_of([*prompt, *reply.output_ids], start))
    assert (reply.start, reply.layer_ids) == (start, MOE_LAYERS)


# ------------------------------------------------------------------------------------------------ replies


async def test_both_forms_bring_the_same_reply(client: TandemClient, server: StubGenerator) -> None:
    sampling = {**SIX, "sampling_seed": 5}
    reply = await client.generate(input_ids=PROMPT, sampling_params=sampling, start_len=2, rid="mine")
    is_right(reply, PROMPT, 6, start=2)
    assert (reply.stop, reply.weight_versions) == (9, (VersionSpan(0, 5, "old"), VersionSpan(5, 9, "new")))
    assert (reply.finish_reason.type, reply.is_partial, reply.meta["id"]) == ("length", False, "r")
    assert "routed_experts" not in reply.meta
    as_json = await client.generate(input_ids=PROMPT, sampling_params=sampling, start_len=2, form="int32")
    assert as_json.rows is not None
    assert as_json.rows.dtype == np.int32
    assert as_json.layer_ids == (0, 1, 2)
    assert np.array_equal(as_json.rows, spread(rows_of([*PROMPT, *reply.output_ids], 2)))
    assert (as_json.text, as_json.output_ids) == (reply.text, reply.output_ids)
    assert server.asked[0]["rid"] == "mine"
    assert server.headers[0]["Authorization"] == "Bearer secret"


async def test_without_rows_there_are_none(client: TandemClient, server: StubGenerator) -> None:
    reply = await client.generate(text="hello", sampling_params=SIX, rows=False)
    assert reply.rows is None
    assert "return_routed_experts" not in server.asked[0]


async def test_samples_have_seeds_of_their_own(client: TandemClient) -> None:
    replies = await client.samples(input_ids=PROMPT, sampling_params={**SIX, "n": 3})
    assert [reply.seed - replies[0].seed for reply in replies] == [0, 1, 2]
    for reply in replies:
        is_right(reply, PROMPT, 6)
    again = await client.generate(input_ids=PROMPT, sampling_params={**SIX, "sampling_seed": replies[2].seed})
    assert again.output_ids == replies[2].output_ids


async def test_what_cannot_be_asked_is_not_sent(client: TandemClient, server: StubGenerator) -> None:
    for wrong in ({}, {"text": "a", "input_ids": [1]}, {"text": "a", "sampling_params": {"n": 2}}):
        with pytest.raises(ValueError, match=r"input_ids or text|one sample"):
            await client.generate(**wrong)
    assert server.asked == []


def changed(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda reply: reply["meta_info"].update({f"routed_experts{name}": value for name, value in fields.items()})


def without_rows(reply: dict[str, Any]) -> None:
    del reply["meta_info"]["routed_experts"]


def one_row_less(reply: dict[str, Any]) -> None:
    meta = reply["meta_info"]
    meta["routed_experts"] = meta["routed_experts"][:-4]
    meta["routed_experts_shape"][0] -= 1


def wide(reply: dict[str, Any]) -> None:
    meta = reply["meta_info"]
    meta["routed_experts"] *= 4
    meta["routed_experts_dtype"] = "int32"


def one_token_less(reply: dict[str, Any]) -> None:
    reply["output_ids"].pop()


SPOILS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no rows": without_rows,
    "one row less": one_row_less,
    "one byte less": lambda reply: reply["meta_info"].update(routed_experts=reply["meta_info"]["routed_experts"][1:]),
    "another start": changed(_start_len=1),
    "another shape": changed(_shape=[9, 4, 1]),
    "no shape": changed(_shape=None),
    "no top-k": changed(_shape=[9, 2, 0], **{"": b""}),
    "another dtype": changed(_dtype="int8"),
    "the other form": wide,
    "a layer too many": changed(_layer_ids=[0, 1, 2]),
    "no layers": changed(_layer_ids=None),
    "a MoE layer elsewhere": changed(_moe_layer_ids=[0, 7]),
    "one token less": one_token_less,
    "another prompt": lambda reply: reply["meta_info"].update(prompt_tokens=5),
    "a gap of versions": lambda reply: reply["meta_info"].update(weight_versions=[[0, 4, "a"], [5, 9, "b"]]),
    "versions too short": lambda reply: reply["meta_info"].update(weight_versions=[[0, 8, "a"]]),
    "no meta_info": lambda reply: reply.pop("meta_info"),
    "no reason": lambda reply: reply["meta_info"].pop("finish_reason"),
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
async def test_a_reply_that_does_not_fit_is_an_error(
    client: TandemClient, server: StubGenerator, spoil: Callable[[dict[str, Any]], object]
) -> None:
    server.spoil = spoil
    with pytest.raises(MalformedReplyError):
        await client.generate(input_ids=PROMPT, sampling_params=SIX)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("field", "value", "words"), [("completion_tokens", 5, "6 output_ids"), ("prompt_tokens", 5, "4 were sent")]
)
async def test_tokens_are_counted_without_rows_too(
    client: TandemClient, server: StubGenerator, field: str, value: int, words: str
) -> None:
    server.spoil = lambda reply: reply["meta_info"].update({field: value})
    with pytest.raises(MalformedReplyError, match=words):
        await client.generate(input_ids=PROMPT, sampling_params=SIX, rows=False)


async def test_rows_that_nobody_asked_for_are_an_error(client: TandemClient, server: StubGenerator) -> None:
    server.spoil = changed(_shape=[9, 1, 1], _dtype="uint8", _layer_ids=[0], _moe_layer_ids=[0], **{"": b"123456789"})
    with pytest.raises(MalformedReplyError, match="none were asked for"):
        await client.generate(input_ids=PROMPT, sampling_params=SIX, rows=False)


@pytest.mark.parametrize(("n", "body"), [(1, []), (2, {}), (2, [{}]), (1, b"{"), (1, b"7")])
async def test_another_number_of_replies_is_an_error(
    client: TandemClient, server: StubGenerator, n: int, body: object
) -> None:
    server.moves = [say(body)]
    with pytest.raises(MalformedReplyError):
        await client.samples(input_ids=PROMPT, sampling_params={**SIX, "n": n})


# ------------------------------------------------------------------------------------------------ retries and errors


@pytest.mark.parametrize("move", [refuse(503), refuse(429, Retry_After="0"), hang_up, hang_up_midway])
async def test_a_generation_is_tried_again_and_repeats_itself(
    client: TandemClient, server: StubGenerator, move: Move
) -> None:
    server.moves = [move, move]
    is_right(await client.generate(input_ids=PROMPT, sampling_params=SIX), PROMPT, 6)
    assert len(server.asked) == 3
    assert server.asked[0] == server.asked[1] == server.asked[2]
    assert server.asked[0]["sampling_params"]["sampling_seed"] >= 0


@pytest.mark.parametrize("status", [400, 401, 404, 409, 500, 502, 504])
async def test_other_errors_are_final_and_say_what_the_server_says(
    client: TandemClient, server: StubGenerator, status: int
) -> None:
    server.moves = [refuse(status)]
    with pytest.raises(ServerError, match=f"^{status}: not now$") as raised:
        await client.generate(input_ids=PROMPT, sampling_params=SIX)
    report = raised.value.report
    assert (report.status, report.code, report.leg, report.stage, report.rid) == (
        status,
        "busy",
        "decode",
        "engine",
        "r",
    )
    assert len(server.asked) == 1


async def test_retries_end(client: TandemClient, server: StubGenerator) -> None:
    server.moves = [refuse(503)] * 9
    with pytest.raises(ServerError):
        await client.generate(input_ids=PROMPT)
    assert len(server.asked) == 1 + QUICK.most


async def test_a_server_that_wants_a_longer_pause_than_there_is_time_is_not_asked_again(
    client: TandemClient, server: StubGenerator
) -> None:
    server.moves = [refuse(429, Retry_After="100")]
    with pytest.raises(ServerError) as raised:
        await client.generate(input_ids=PROMPT)
    assert raised.value.retry_after_s == 100
    assert len(server.asked) == 1


def test_pauses_grow_and_are_not_shorter_than_asked_for() -> None:
    retries = Retries(first_pause_s=1.0, longest_pause_s=8.0)
    for number, longest_s in enumerate((1, 2, 4, 8, 8)):
        assert longest_s / 2 <= retries.pause_s(number, None) <= longest_s
    assert retries.pause_s(0, 30.0) == 30.0


async def test_an_error_that_is_none_of_ours_is_quoted(client: TandemClient, server: StubGenerator) -> None:
    server.moves = [say(b"<h1>Bad gateway</h1>", status=502)]
    with pytest.raises(ServerError, match="502: <h1>Bad gateway") as raised:
        await client.generate(input_ids=PROMPT)
    assert raised.value.report.code == "unreadable"


async def test_nobody_listening(server: StubGenerator) -> None:
    async with TandemClient("http://127.0.0.1:9", retries=QUICK) as client:
        with pytest.raises(NoAnswerError, match="ClientConnector"):
            await client.generate(input_ids=PROMPT)


async def test_silence_ends_at_the_deadline(url: str, server: StubGenerator) -> None:
    server.moves = [say_nothing]
    async with TandemClient(url, deadline_s=0.1) as client:
        with pytest.raises(DeadlinePassedError):
            await client.generate(input_ids=PROMPT)
    assert len(server.asked) == 1


# ------------------------------------------------------------------------------------------------ streams


async def streamed(client: TandemClient, **asked: Any) -> tuple[list[Progress], list[Reply]]:
    progress: list[Progress] = []
    replies: list[Reply] = []
    async for event in client.stream(input_ids=PROMPT, **asked):
        if isinstance(event, Progress):
            progress.append(event)
        else:
            replies.append(event)
    return progress, replies


@pytest.mark.parametrize("form", ["msgpack", "int32"])
async def test_a_stream_gives_progress_and_then_each_reply(
    client: TandemClient, server: StubGenerator, form: str
) -> None:
    server.moves = [refuse(503), hang_up]
    progress, replies = await streamed(client, sampling_params={**SIX, "n": 2}, form=form)
    assert [(event.index, len(event.output_ids)) for event in progress] == [(0, 1), (1, 1)]
    assert [reply.index for reply in replies] == [0, 1]
    for reply in replies:
        expected = rows_of([*PROMPT, *reply.output_ids])
        assert np.array_equal(np.asarray(reply.rows), expected if form == "msgpack" else spread(expected))
    assert [asked["stream"] for asked in server.asked] == [True] * 3


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 7, 100])
async def test_events_are_cut_wherever_the_chunks_end(piece_bytes: int) -> None:
    stream = b"data: a\n\n: nothing\n\ndata: b c\n\n\n\ndata: [DONE]\n\ndata: cut"

    async def chunks() -> AsyncIterator[bytes]:
        for lo in range(0, len(stream), piece_bytes):
            yield stream[lo : lo + piece_bytes]

    assert [event async for event in cut_events(chunks())] == [b"a", b"b c", b"[DONE]"]


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda events: events[:-1], NoAnswerError),
        (lambda events: [events[0], b'data: {"error":{"message":"gone","code":"c"}}\n\n'], ServerError),
        (lambda events: [b"data: {\n\n"], MalformedReplyError),
        (lambda events: [b"data: {}\n\n"], MalformedReplyError),
        (lambda events: [events[1].replace(b'"index":0', b'"index":1'), *events], MalformedReplyError),
    ],
)
async def test_a_stream_that_does_not_end_well_is_an_error_and_not_begun_again(
    client: TandemClient, server: StubGenerator, spoil: Callable[[list[bytes]], list[bytes]], error: type[Exception]
) -> None:
    server.event_spoil = spoil
    with pytest.raises(error):
        await streamed(client, sampling_params=SIX)
    assert len(server.asked) == 1


# ------------------------------------------------------------------------------------------------ partial rollouts


@pytest.mark.parametrize("cuts", [[2], [0], [0, 0], [2, 3], [2, 0], [1, 1, 1]])
async def test_a_partial_reply_goes_on_as_if_nobody_had_ended_it(
    client: TandemClient, server: StubGenerator, cuts: list[int]
) -> None:
    sampling = {**SIX, "min_new_tokens": 3}
    server.cuts = list(cuts)
    reply = await client.generate(input_ids=PROMPT, sampling_params=sampling, start_len=1)
    for _ in cuts:
        assert reply.is_partial
        reply = await client.resume(reply, PROMPT, sampling_params=sampling)
    assert not reply.is_partial
    is_right(reply, PROMPT, 6, start=1)
    assert reply.prompt_tokens == len(PROMPT)
    assert reply.text == " ".join(map(str, reply.output_ids))
    assert reply.weight_versions == (VersionSpan(0, 5, "old"), VersionSpan(5, 9, "new"))
    there = sum(cuts)
    last = server.asked[-1]
    assert (last["input_ids"], last["routed_experts_start_len"]) == (
        [*PROMPT, *reply.output_ids[:there]],
        len(PROMPT) + there - 1 if there else 1,
    )
    assert last["sampling_params"] == {
        "max_new_tokens": 6 - there,
        "min_new_tokens": max(0, 3 - there),
        "n": 1,
        "sampling_seed": reply.seed,
    }


async def test_without_rows_a_partial_reply_goes_on_too(client: TandemClient, server: StubGenerator) -> None:
    server.cuts = [2]
    partial = await client.generate(input_ids=PROMPT, sampling_params=SIX, rows=False)
    reply = await client.resume(partial, PROMPT, sampling_params=SIX, rows=False)
    assert reply.rows is None
    assert reply.output_ids == [token_at(len(PROMPT) + i, reply.seed) for i in range(6)]


async def test_rows_of_two_kinds_are_not_joined(client: TandemClient, server: StubGenerator) -> None:
    server.cuts = [2]
    partial = await client.generate(input_ids=PROMPT, sampling_params=SIX)
    for other in ({"form": "int32"}, {"rows": False}):
        with pytest.raises(MalformedRowsError, match="two kinds"):
            await client.resume(partial, PROMPT, sampling_params=SIX, **other)


async def test_a_whole_reply_has_no_rest(client: TandemClient) -> None:
    reply = await client.generate(input_ids=PROMPT, sampling_params=SIX)
    with pytest.raises(ValueError, match="nothing is missing"):
        await client.resume(reply, PROMPT)


# ------------------------------------------------------------------------------------------------ control


async def test_control_calls(client: TandemClient, server: StubGenerator) -> None:
    await client.pause_generation("in_place")
    await client.continue_generation()
    await client.update_weights_from_disk("/weights", "7", flush_cache=True)
    await client.abort("mine")
    await client.abort(abort_all=True)
    await client.flush_cache()
    await client.server_info()
    assert await client.workers() == [{"id": "w0"}]
    assert server.told == [
        ("/pause_generation", {"mode": "in_place"}),
        ("/continue_generation", {}),
        ("/update_weights_from_disk", {"flush_cache": True, "model_path": "/weights", "weight_version": "7"}),
        ("/abort_request", {"rid": "mine", "abort_all": False}),
        ("/abort_request", {"rid": "", "abort_all": True}),
        ("/flush_cache", {}),
        ("/server_info", None),
        ("/workers", None),
    ]


@pytest.mark.parametrize("move", [refuse(503), hang_up])
async def test_only_what_may_be_repeated_is(client: TandemClient, server: StubGenerator, move: Move) -> None:
    server.moves = [move]
    await client.pause_generation()
    assert len(server.told) == 2
    server.moves = [move]
    with pytest.raises((ServerError, NoAnswerError)):
        await client.update_weights_from_disk("/weights")
    assert len(server.told) == 3


async def test_workers_must_be_a_list(client: TandemClient, server: StubGenerator) -> None:
    server.moves = [say({"workers": 7})]
    with pytest.raises(MalformedReplyError, match="/workers"):
        await client.workers()
