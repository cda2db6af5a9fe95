"""OpenAI's dialect: what is read, what is refused, and what the official client gets from a router over stub workers."""

import json
from contextlib import asynccontextmanager

import msgspec
import numpy as np
import openai
import pytest

from common.errors import RequestError
from common.messages import ErrorReport, FinishReason
from common.protocol.openai import (
    CHAT_RENAMES,
    COMPLETION_RENAMES,
    openai_error,
    parse_chat,
    parse_completion,
)
from common.protocol.openai_replies import finish_reason
from common.routed_experts.codec import rows_from_reply
from tests.support import stub_workers as stubs
from tests.support.rows import SPEC
from tests.support.stub_workers import CACHED_TOKENS, ROWS, stack

PROMPT = list(range(10, 17))
P = len(PROMPT)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
ROWS_WANTED = {"return_routed_experts": True}


def completion(**fields):
    return parse_completion(json.dumps({"prompt": "a"} | fields).encode())


def chat(**fields):
    return parse_chat(json.dumps({"messages": MESSAGES} | fields).encode())


def moe_rows(meta):
    rows = rows_from_reply(meta)
    return rows[:, list(SPEC.layer_ids)] if meta["routed_experts_dtype"] == "int32" else rows


@asynccontextmanager
async def client_of(running, **options):
    async with openai.AsyncOpenAI(
        base_url=f"{running.url}/v1", **{"api_key": "none", "max_retries": 0} | options
    ) as client:
        yield client


# ------------------------------------------------------------------------------------------------ parsing


def test_the_defaults_are_openais():
    sampling = completion().generate.samples[0].options.sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.n) == (16, 1.0, 1)
    call = chat(model="any name")
    assert call.generate.samples[0].options.sampling.max_new_tokens == 128
    assert (call.model, call.return_logprob, call.include_usage, call.return_meta_info) == ("any name",) + (False,) * 3


def test_every_field_finds_its_place():
    call = completion(
        n=2,
        best_of=2,
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        stop=["x", "y"],
        seed=5,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        logit_bias={"5": 1.5},
        logprobs=3,
        stream=True,
        stream_options={"include_usage": True},
        user="me",
        return_routed_experts=True,
        routed_experts_start_len=1,
        routed_experts_dtype="auto",
        data_parallel_rank=3,
        rid="mine",
        return_meta_info=True,
        top_k=4,
        min_p=0.3,
        repetition_penalty=1.1,
        min_tokens=2,
        ignore_eos=True,
        stop_token_ids=[9],
        skip_special_tokens=False,
    )
    (sample,) = call.generate.samples
    options, sampling = sample.options, sample.options.sampling
    assert (sampling.n, sampling.max_new_tokens, sampling.min_new_tokens) == (2, 7, 2)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 4, 0.3)
    assert (sampling.stop, sampling.stop_token_ids, sampling.seed) == (("x", "y"), (9,), 5)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.1, 0.2, 1.1)
    assert (sampling.logit_bias, sampling.ignore_eos, sampling.skip_special_tokens) == ({5: 1.5}, True, False)
    assert (options.return_logprob, options.top_logprobs_num, options.return_text_in_logprobs) == (True, 3, True)
    assert (options.return_routed_experts, options.routed_experts_start_len) == (True, 1)
    assert (options.routed_experts_dtype, options.data_parallel_rank) == ("auto", 3)
    assert (sample.rid, call.id, call.include_usage, call.return_meta_info) == ("mine", "mine", True, True)


@pytest.mark.parametrize(
    ("prompt", "count", "first"),
    [("ab", 1, "ab"), (["ab", "c"], 2, "ab"), ([1, 2], 1, (1, 2)), ([[1, 2], [3]], 2, (1, 2))],
)
def test_prompts(prompt, count, first):
    samples = completion(prompt=prompt).generate.samples
    assert len(samples) == count
    assert (samples[0].text or samples[0].input_ids) == first


def test_chat_prompts():
    assert chat().generate.samples[0].messages == tuple(MESSAGES)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (message,) = chat(messages=[{"role": "user", "content": parts}]).generate.samples[0].messages or ()
    assert message == {"role": "user", "content": "a b"}
    sample = chat(chat_template_kwargs={"enable_thinking": False}).generate.samples[0]
    assert sample.chat_template_kwargs == {"enable_thinking": False}
    sample = chat(input_ids=[1, 2]).generate.samples[0]
    assert (sample.input_ids, sample.messages) == ((1, 2), None)
    assert chat(max_tokens=3, max_completion_tokens=4).generate.samples[0].options.sampling.max_new_tokens == 4


@pytest.mark.parametrize(
    "fields",
    [
        {"echo": False, "suffix": "", "best_of": 1, "user": "u"},
        {"tools": [], "tool_choice": "auto", "functions": [], "response_format": {"type": "text"}},
        {"modalities": ["text"], "store": False, "parallel_tool_calls": True, "service_tier": "auto"},
        {"stream_options": None, "logit_bias": {}, "stop": None, "seed": None, "logprobs": None},
    ],
)
def test_what_asks_for_nothing_is_taken(fields):
    completion(**fields)
    chat(**fields)


@pytest.mark.parametrize(
    ("parse", "fields", "param"),
    [
        (completion, {"prompt": None}, "prompt"),
        (completion, {"prompt": []}, "prompt"),
        (completion, {"prompt": ["a", 1]}, "prompt"),
        (completion, {"prompt": [[1], "a"]}, "prompt"),
        (completion, {"prompt": {}}, "prompt"),
        (completion, {"max_tokens": -1}, "max_tokens"),
        (completion, {"n": 0}, "n"),
        (completion, {"best_of": 3, "n": 2}, "best_of"),
        (completion, {"echo": True}, "echo"),
        (completion, {"suffix": "s"}, "suffix"),
        (completion, {"logprobs": True}, "logprobs"),
        (completion, {"logprobs": 1000}, "logprobs"),
        (completion, {"seed": -1}, "seed"),
        (completion, {"min_tokens": -1}, "min_tokens"),
        (completion, {"logit_bias": {"5": "x"}}, "logit_bias"),
        (completion, {"stream_options": 1}, "stream_options"),
        (completion, {"routed_experts_start_len": -1, "return_routed_experts": True}, "routed_experts_start_len"),
        (completion, {"regex": "a+"}, "regex"),
        (completion, {"lora_path": "x"}, "lora_path"),
        (chat, {"messages": None}, "messages"),
        (chat, {"messages": []}, "messages"),
        (chat, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        (chat, {"input_ids": [[1]]}, "input_ids"),
        (chat, {"tools": [{"type": "function"}]}, "tools"),
        (chat, {"functions": [{"name": "f"}]}, "functions"),
        (chat, {"tool_choice": "required"}, "tool_choice"),
        (chat, {"response_format": {"type": "json_object"}}, "response_format"),
        (chat, {"modalities": ["text", "audio"]}, "modalities"),
        (chat, {"top_logprobs": 2}, "top_logprobs"),
        (chat, {"logprobs": True, "top_logprobs": 1000}, "top_logprobs"),
        (chat, {"max_tokens": -1}, "max_tokens"),
        (chat, {"reasoning_effort": "high"}, "reasoning_effort"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_name(parse, fields, param):
    with pytest.raises(RequestError) as caught:
        parse(**fields)
    body = openai_error(ErrorReport.of(caught.value), COMPLETION_RENAMES if parse is completion else CHAT_RENAMES)
    error = body["error"]
    assert isinstance(error, dict)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert error["message"].startswith(param)


def test_reasons_are_openais():
    reasons = [FinishReason(type="stop", matched=2), FinishReason(type="length", length=3), FinishReason(type="abort")]
    assert [finish_reason(reason) for reason in reasons] == ["stop", "length", "length"]


# ------------------------------------------------------------------------------------------------ the official client


async def test_a_completion():
    async with stack() as running, client_of(running) as client:
        reply = await client.completions.create(
            model="m", prompt=PROMPT, max_tokens=3, seed=100, extra_body=ROWS_WANTED | {"rid": "mine"}
        )
    (choice,) = reply.choices
    assert (reply.id, reply.object, reply.model) == ("mine", "text_completion", "m")
    assert (choice.index, choice.text, choice.finish_reason) == (0, "<100><101><102>", "length")
    assert choice.logprobs is None
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (P, 3, P + 3)
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == CACHED_TOKENS
    np.testing.assert_array_equal(moe_rows(reply.sglext), ROWS[: P + 2])


async def test_a_list_of_prompts_with_two_choices_each():
    prompts = [[1] * 3, [2] * 8]
    async with stack() as running, client_of(running) as client:
        reply = await client.completions.create(
            model="m",
            prompt=prompts,
            n=2,
            max_tokens=3,
            seed=100,
            extra_body=ROWS_WANTED | {"return_meta_info": True, "routed_experts_start_len": 1},
        )
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in reply.choices] == ["<100><101><102>", "<101><102><103>"] * 2
    assert not hasattr(reply, "sglext")
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (11, 12)
    for choice, prompt in zip(reply.choices, [prompts[0]] * 2 + [prompts[1]] * 2, strict=True):
        assert choice.meta_info["routed_experts_start_len"] == 1
        np.testing.assert_array_equal(moe_rows(choice.meta_info), ROWS[1 : len(prompt) + 2])


async def test_completion_logprobs():
    async with stack() as running, client_of(running) as client:
        reply = await client.completions.create(model="m", prompt="abc", max_tokens=2, seed=9, logprobs=2)
        plain = await client.completions.create(model="m", prompt="abc", max_tokens=2, seed=9, logprobs=0)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert (logprobs.tokens, logprobs.token_logprobs, logprobs.text_offset) == (["<9>", "<10>"], [-9.0, -10.0], [0, 3])
    assert logprobs.top_logprobs == [{"<9>": -9.0, "<10>": -10.0}, {"<10>": -10.0, "<11>": -11.0}]
    assert plain.choices[0].logprobs is not None
    assert plain.choices[0].logprobs.top_logprobs is None


@pytest.mark.parametrize("include_usage", [False, True])
async def test_a_completion_streams(include_usage):
    async with stack() as running, client_of(running) as client:
        stream = await client.completions.create(
            model="m",
            prompt=[PROMPT, PROMPT[:3]],
            n=2,
            max_tokens=3,
            seed=100,
            logprobs=1,
            stream=True,
            stream_options={"include_usage": include_usage},
            extra_body=ROWS_WANTED,
        )
        chunks = [chunk async for chunk in stream]
    assert len({chunk.id for chunk in chunks}) == 1
    for index, first in enumerate([100, 101, 100, 101]):
        mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(choice.text for choice in mine) == "".join(f"<{first + i}>" for i in range(3))
        logprobs = [choice.logprobs for choice in mine if choice.logprobs is not None]
        assert [token for one in logprobs for token in one.tokens or ()] == [f"<{first + i}>" for i in range(3)]
        assert [offset for one in logprobs for offset in one.text_offset or ()] == [0, 5, 10]
        assert [choice.finish_reason for choice in mine if choice.finish_reason] == ["length"]
    assert [hasattr(chunk, "sglext") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    np.testing.assert_array_equal(moe_rows(chunks[-1].sglext), ROWS[: P + 2])
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [include_usage]
    if include_usage:
        assert chunks[-1].choices == []
        assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (P + 3, 12)


async def test_a_chat():
    async with stack() as running, client_of(running) as client:
        reply = await client.chat.completions.create(
            model="m",
            messages=MESSAGES,
            max_tokens=2,
            n=2,
            seed=7,
            logprobs=True,
            top_logprobs=1,
            extra_body=ROWS_WANTED | {"chat_template_kwargs": {"a": 1}},
        )
        (prefill,), (decode,) = running.prefill.samples, running.decode.samples
    assert prefill.messages == decode.messages == tuple(MESSAGES)
    assert prefill.chat_template_kwargs == {"a": 1}
    assert reply.object == "chat.completion"
    assert [choice.message.content for choice in reply.choices] == ["<7><8>", "<8><9>"]
    assert {choice.message.role for choice in reply.choices} == {"assistant"}
    logprobs = reply.choices[1].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [(one.token, one.logprob, one.bytes) for one in logprobs.content] == [
        ("<8>", -8.0, list(b"<8>")),
        ("<9>", -9.0, list(b"<9>")),
    ]
    assert [one.top_logprobs[0].token for one in logprobs.content] == ["<8>", "<9>"]
    np.testing.assert_array_equal(moe_rows(reply.sglext), ROWS[: len(MESSAGES) + 1])


@pytest.mark.parametrize("include_usage", [False, True])
async def test_a_chat_streams(include_usage):
    async with stack() as running, client_of(running) as client:
        stream = await client.chat.completions.create(
            model="m",
            messages=MESSAGES,
            max_completion_tokens=3,
            seed=100,
            stream=True,
            stream_options={"include_usage": include_usage},
            extra_body=ROWS_WANTED | {"input_ids": PROMPT, "return_meta_info": True},
        )
        chunks = [chunk async for chunk in stream]
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert [delta.role for delta in deltas if delta.role] == ["assistant"]
    assert deltas[0].role == "assistant"
    assert [delta.content for delta in deltas if delta.content] == ["<100>", "<101>", "<102>"]
    (end,) = [choice for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert end.finish_reason == "length"
    np.testing.assert_array_equal(moe_rows(end.meta_info), ROWS[: P + 2])
    assert (chunks[-1].usage is not None, chunks[-1].choices == []) == (include_usage, include_usage)


async def test_models():
    async with stack() as running, client_of(running) as client:
        (model,) = (await client.models.list()).data
        assert (model.id, model.object) == ("stub/model", "model")
        assert (await client.models.retrieve("stub/model")).id == "stub/model"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("another")


async def test_errors_have_openais_form():
    async with stack(decode=stubs.refuse(500, "lost a page")) as running, client_of(running) as client:
        with pytest.raises(openai.BadRequestError, match="prompt") as refused:
            await client.completions.create(model="m", prompt=[])
        assert (refused.value.param, refused.value.type) == ("prompt", "invalid_request_error")
        with pytest.raises(openai.InternalServerError, match="lost a page") as failed:
            await client.chat.completions.create(model="m", messages=MESSAGES)
        assert (failed.value.status_code, failed.value.type, failed.value.param) == (502, "server_error", None)


async def test_a_workers_refusal_has_the_clients_name_of_the_field():
    async def refuse(stub, request, sample):
        report = ErrorReport.of(RequestError("sampling_params.max_new_tokens", "too many"))
        return stubs.web.Response(status=400, body=stubs.error_body(report))

    async with stack(prefill=refuse) as running, client_of(running) as client:
        with pytest.raises(openai.BadRequestError, match="max_tokens: too many") as refused:
            await client.completions.create(model="m", prompt="a")
    assert refused.value.param == "max_tokens"


async def test_a_broken_stream_is_an_error():
    async with stack(decode=stubs.error_event) as running, client_of(running) as client:
        stream = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True, seed=1)
        with pytest.raises(openai.APIError, match="lost a page"):
            async for _ in stream:
                pass


async def test_the_key_is_asked_for_and_the_workers_get_theirs():
    options = {"router": {"worker_api_key": "back-key"}, "server": {"api_key": "front-key"}}
    async with stack(**options) as running:
        async with client_of(running) as client:
            with pytest.raises(openai.AuthenticationError):
                await client.completions.create(model="m", prompt="a")
        async with client_of(running, api_key="front-key") as client:
            await client.completions.create(model="m", prompt="a")
            async with running.client.get("/server_info", headers={"Authorization": "Bearer front-key"}) as response:
                text = await response.text()
    assert running.prefill.authorizations == running.decode.authorizations == ["Bearer back-key"]
    assert "back-key" not in text
    assert "front-key" not in text


async def test_a_reply_may_be_msgpack():
    request = {"prompt": PROMPT, "max_tokens": 3, "n": 2, "return_meta_info": True} | ROWS_WANTED
    async with (
        stack() as running,
        running.client.post("/v1/completions", json=request, headers={"Accept": "application/msgpack"}) as response,
    ):
        reply = msgspec.msgpack.decode(await response.read())
    for choice in reply["choices"]:
        assert isinstance(choice["meta_info"]["routed_experts"], bytes)
        np.testing.assert_array_equal(moe_rows(choice["meta_info"]), ROWS[: P + 2])


async def test_too_many_are_told_to_come_back():
    async with stack(server={"max_open_requests": 3}) as running, client_of(running) as client:
        with pytest.raises(openai.RateLimitError) as refused:
            await client.completions.create(model="m", prompt=["a", "b"], n=2)
        assert refused.value.response.headers["Retry-After"]
        await client.completions.create(model="m", prompt=["a", "b", "c"])
