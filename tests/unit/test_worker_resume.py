"""A worker's HTTP side when a sample is retracted, and when one goes on from tokens of earlier legs; over a scripted engine."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest

from common.messages import FinishReason, StopAt
from common.routed_experts.codec import rows_from_reply
from tests.support.scripted_worker import ROOM, ROWS, TOKENIZER, logprob, scripted_worker

PROMPT = [10, 11, 12]
WORDS = TOKENIZER.encode("The river was wide.")
RETRACTED = FinishReason.early("retracted", "in decode")
EURO = TOKENIZER.encode("€")
WITH_ROWS: dict[str, Any] = {"return_routed_experts": True, "routed_experts_dtype": "auto"}


def asked(**fields: Any) -> dict[str, Any]:
    return {"input_ids": PROMPT, **ROOM, "bootstrap_room": 7, **fields}


def resumed(token_ids: list[int], **fields: Any) -> dict[str, Any]:
    """A request that goes on from these tokens."""
    return asked(input_ids=PROMPT + token_ids, resumed_tokens=len(token_ids), **fields)


def started(coroutine: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
    return asyncio.create_task(coroutine)


def check_rows(reply: dict[str, Any], start: int, stop: int) -> None:
    np.testing.assert_array_equal(rows_from_reply(reply["meta_info"]), ROWS[start:stop])
    assert reply["meta_info"]["routed_experts_start_len"] == start


def text_of(token_ids: list[int]) -> str:
    return TOKENIZER.decode(token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("streams", [False, True])
async def test_a_retracted_sample_says_what_its_prompt_was(streams: bool):
    async with scripted_worker() as worker:
        body = asked(return_logprob=True, **WITH_ROWS)
        request = started(worker.stream(**body) if streams else worker.post(**body))
        message = await worker.engine.next_generate()
        worker.engine.finish(message, WORDS[:2], reason=RETRACTED)
        result = await request
        reply = result[-2] if streams else result[1]
    assert reply["meta_info"]["finish_reason"]["cause"] == "retracted"
    assert reply["leg"]["prompt_ids"] == PROMPT
    assert reply["output_ids"] == WORDS[:2]
    check_rows(reply, 3, 4)


@pytest.mark.parametrize(
    ("token_ids", "reason"), [([], RETRACTED), (WORDS[:2], FinishReason.early("requested", "in decode")), (WORDS, None)]
)
async def test_nobody_else_says_it(token_ids: list[int], reason: FinishReason | None):
    async with scripted_worker() as worker:
        request = started(worker.post(**asked()))
        worker.engine.finish(await worker.engine.next_generate(), token_ids, reason=reason)
        _, reply = await request
    assert reply["leg"]["prompt_ids"] is None


async def test_a_character_that_a_retracted_sample_has_begun_is_no_stop_yet():
    async with scripted_worker() as worker:
        request = started(worker.post(**asked(sampling_params={"stop": "\N{REPLACEMENT CHARACTER}"})))
        worker.engine.finish(await worker.engine.next_generate(), EURO[:1], reason=RETRACTED)
        _, reply = await request
    assert len(EURO) > 1
    assert reply["meta_info"]["finish_reason"]["cause"] == "retracted"
    assert reply["output_ids"] == EURO[:1]


@pytest.mark.parametrize("seam", range(1, len(EURO) + 2))
@pytest.mark.parametrize("streams", [False, True])
async def test_the_text_covers_what_is_resumed_and_all_else_is_new(streams: bool, seam: int):
    """Also where the seam is in the middle of a character."""
    output = [*EURO, *WORDS]
    new = output[seam:]
    async with scripted_worker() as worker:
        body = resumed(output[:seam], return_logprob=True, **WITH_ROWS)
        request = started(worker.stream(**body) if streams else worker.post(**body))
        message = await worker.engine.next_generate()
        assert message.input_ids == PROMPT + output[:seam]
        assert message.options.resumed_tokens == seam
        if streams:
            worker.engine.tokens(message, new[:1])
        worker.engine.finish(message, new)
        result = await request
    reply = result[-2] if streams else result[1]
    assert reply["text"] == text_of(output)
    assert reply["output_ids"] == new
    assert reply["meta_info"]["completion_tokens"] == len(new)
    assert reply["meta_info"]["prompt_tokens"] == 3 + seam
    assert reply["meta_info"]["output_token_logprobs"] == [[logprob(i), new[i], None] for i in range(len(new))]
    check_rows(reply, 3 + seam, 3 + len(output) - 1)
    if streams:
        assert text_of(output).startswith(result[0]["text"])
        assert result[0]["text"] == text_of(output[: seam + 1]).rstrip("\N{REPLACEMENT CHARACTER}")


async def test_a_stop_string_may_span_the_seam():
    stop = "ver w"
    count = next(n for n in range(len(WORDS) + 1) if stop in text_of(WORDS[:n]))
    seam = next(n for n in range(len(WORDS) + 1) if "v" in text_of(WORDS[:n]))
    assert seam < count
    async with scripted_worker() as worker:
        request = started(worker.post(**resumed(WORDS[:seam], sampling_params={"stop": stop}, **WITH_ROWS)))
        message = await worker.engine.next_generate()
        worker.engine.tokens(message, WORDS[seam:])
        told = await worker.engine.next()
        # The engine counts the tokens of its own leg.
        assert told == StopAt(rid=message.rid, index=0, num_tokens=count - seam, matched=stop)
        worker.engine.finish(message, WORDS[seam:])
        _, reply = await request
    assert reply["text"] == text_of(WORDS).split(stop)[0]
    assert reply["output_ids"] == WORDS[seam:count]
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    check_rows(reply, 3 + seam, 3 + count - 1)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"resumed_tokens": 3}, "3 leave no prompt of 3 input_ids"),
        ({"resumed_tokens": 99}, "99 leave no prompt of 3 input_ids"),
        ({"resumed_tokens": -1}, ""),
        ({"resumed_tokens": "1"}, ""),
        ({"resumed_tokens": 1, "input_ids": None, "text": "abc"}, "the prompt came as text"),
        (
            {"resumed_tokens": 1, "input_ids": [[1, 2], [3]], "bootstrap_room": [7, 8]},
            "1 leave no prompt of 1 input_ids",
        ),
        ({"resumed_versions": "v1"}, "must be a list of strings, but is a string"),
        ({"resumed_versions": ["v1", 2]}, ""),
    ],
)
async def test_what_cannot_be_resumed_is_refused(fields: dict[str, Any], what: str):
    async with scripted_worker() as worker:
        status, reply = await worker.post(**asked(**fields))
    assert status == 400
    assert reply["error"]["message"].startswith(f"{next(iter(fields))}: ")
    assert what in reply["error"]["message"]


async def test_tokens_that_have_stopped_before_are_refused():
    async with scripted_worker() as worker:
        status, reply = await worker.post(**resumed(WORDS, sampling_params={"stop": "river"}))
        assert worker.engine.num_received == 0
    assert (status, reply["error"]["message"]) == (400, "resumed_tokens: their text has the stop string 'river'")
