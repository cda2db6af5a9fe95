"""Bodies that nobody should send: each is a call that can be passed on, or a RequestError that names a field."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from common.errors import RequestError
from common.messages import ErrorReport, FrontendToEngine, Generate
from common.protocol import bounds
from common.protocol.generate import GenerateCall, parse_generate
from common.protocol.legs import encode_leg
from common.protocol.openai import CHAT_RENAMES, COMPLETION_RENAMES, openai_error, parse_chat, parse_completion
from common.protocol.replies import encode_json
from tests.support.hostile import EXTREMES, STABLE, Pairs, Raw, dump, mutated, places, replaced
from tests.support.scripted_worker import scripted_worker

SAMPLING: dict[str, Any] = {
    "n": 2,
    "max_new_tokens": 9,
    "min_new_tokens": 1,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.25,
    "frequency_penalty": -2,
    "presence_penalty": 2,
    "repetition_penalty": 2,
    "logit_bias": {"5": -100, "07": 1.5},
    "stop": ["b", "a"],
    "no_stop_trim": True,
    "ignore_eos": True,
    "stop_token_ids": [3, 2],
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "sampling_seed": 5,
    "stop_regex": None,
}
COMMON: dict[str, Any] = {
    "rid": "r",
    "stream": True,
    "return_routed_experts": True,
    "routed_experts_start_len": 1,
    "routed_experts_dtype": "auto",
    "lora_path": [None],
}
GENERATE: dict[str, Any] = {
    **COMMON,
    "sampling_params": SAMPLING,
    "return_logprob": True,
    "logprob_start_len": 0,
    "top_logprobs_num": 2,
    "return_text_in_logprobs": True,
}
ROOMS: dict[str, Any] = {"bootstrap_host": "::1", "bootstrap_port": 8998, "bootstrap_room": [1, 2**63 - 1]}
CONVERSATION: list[Any] = [{"role": "user", "content": "hi", "name": "x"}, {"role": "assistant", "content": "a"}]
GOOD_GENERATE: list[Any] = [
    {**GENERATE, **ROOMS, "text": "hello"},
    {**GENERATE, "input_ids": [1, 2, 3]},
    {**GENERATE, "text": ["a", "b"], "rid": ["x", "y"], "sampling_params": [{"n": 1}, {"n": 2}]}
    | {**ROOMS, "bootstrap_room": [5, [6, 7]]},
    {**GENERATE, "input_ids": [[1], [2, 3]], "sampling_params": None, **ROOMS},
    {**GENERATE, "messages": CONVERSATION, "chat_template_kwargs": {"enable_thinking": False, "x": [1]}},
]
OPENAI: dict[str, Any] = {
    **COMMON,
    "model": "m",
    "n": 2,
    "temperature": 0.5,
    "top_p": 0.5,
    "stop": ["b"],
    "seed": 5,
    "logit_bias": {"5": 1},
    "best_of": 2,
    "stream_options": {"include_usage": True},
    "return_meta_info": True,
    "user": "somebody",
    "echo": False,
}
GOOD_COMPLETION: list[Any] = [
    {**OPENAI, "prompt": "a", "logprobs": 2, "max_tokens": 5},
    {**OPENAI, "prompt": [[1], [2]], "max_tokens": 5},
]
GOOD_CHAT: list[Any] = [
    {**OPENAI, "messages": CONVERSATION, "logprobs": True, "top_logprobs": 2, "chat_template_kwargs": {"x": {"y": 1}}},
    {**OPENAI, "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "max_tokens": 5},
    {**OPENAI, "input_ids": [1, 2], "tool_choice": "none"},
]
DEEP = Raw("[" * 400 + "]" * 400)


def check_call(call: GenerateCall) -> None:
    """All that was read must reach a worker as it was read."""
    assert call.samples
    for sample in call.samples:
        body = encode_leg(sample, "decode", rid="leg", bootstrap=sample.bootstrap, stream=call.stream)
        [again] = parse_generate(body).samples
        assert again.options == replace(sample.options, routed_experts_dtype="auto")
        assert (again.bootstrap, again.prompt_field) == (sample.bootstrap, sample.prompt_field)
        assert (again.text, again.input_ids, again.messages) == (sample.text, sample.input_ids, sample.messages)
        assert again.chat_template_kwargs == sample.chat_template_kwargs


def check_refusal(error: RequestError) -> None:
    """It names a field, and can be answered in both dialects."""
    assert error.field
    report = ErrorReport.of(error)
    assert report.message.startswith(f"{error.field}: ")
    assert len(report.message) < 1000
    for renames in (COMPLETION_RENAMES, CHAT_RENAMES):
        encode_json(openai_error(report, renames))


def check(parse: Callable[[bytes], Any], body: bytes) -> None:
    try:
        call = parse(body)
    except RequestError as error:
        check_refusal(error)
        return
    if isinstance(call, GenerateCall):
        check_call(call)
    else:
        encode_json({"id": call.id, "model": call.model})
        check_call(call.generate)


PARSERS: list[Callable[[bytes], Any]] = [parse_generate, parse_completion, parse_chat]


@STABLE
@given(st.sampled_from(PARSERS), st.binary(max_size=60))
@example(parse_generate, b'{"text":"\xff"}')
@example(parse_chat, b"[" * 10**6)
def test_any_bytes(parse: Callable[[bytes], Any], body: bytes):
    check(parse, body)
    check(parse, b"{" + body)


@STABLE
@given(mutated(GOOD_GENERATE))
@example({"text": "a", "tools": DEEP})
@example({"text": "a", "bootstrap_room": DEEP, "bootstrap_host": "h", "bootstrap_port": 1})
@example({"messages": CONVERSATION, "chat_template_kwargs": {"x": DEEP}})
@example({"messages": CONVERSATION, "chat_template_kwargs": {"x": 10**400}})
@example({"messages": [{"role": "a", "content": "b", "x": DEEP}]})
@example(Pairs([("text", "a"), ("text", "b"), ("sampling_params", {}), ("sampling_params", DEEP)]))
def test_generate(body: Any):
    check(parse_generate, dump(body).encode())


@STABLE
@given(mutated(GOOD_COMPLETION))
@example({"prompt": "a", "logit_bias": {"5": 10**30}})
@example({"prompt": "a", "stop": DEEP})
@example({"prompt": "a", "best_of": DEEP, "n": DEEP})
@example({"prompt": "a", "best_of": True})
def test_completion(body: Any):
    check(parse_completion, dump(body).encode())


@STABLE
@given(mutated(GOOD_CHAT))
@example({"messages": CONVERSATION, "chat_template_kwargs": {"x": 2**64}})
@example({"messages": [{"role": "a", "content": "b", "tool_calls": DEEP}]})
def test_chat(body: Any):
    check(parse_chat, dump(body).encode())


@pytest.mark.parametrize("parse", PARSERS)
@pytest.mark.parametrize("good", [*GOOD_GENERATE, *GOOD_COMPLETION, *GOOD_CHAT])
def test_every_place_with_every_extreme(parse: Callable[[bytes], Any], good: Any):
    """The product, for bodies of the parser's own dialect and, since nobody keeps clients from it, of the others."""
    check(parse, dump(good).encode())
    own = good in dict(zip(PARSERS, (GOOD_GENERATE, GOOD_COMPLETION, GOOD_CHAT), strict=True))[parse]
    for place in places(good) if own else []:
        for value in EXTREMES:
            check(parse, dump(replaced(good, place, value)).encode())


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1, 10**400])
def test_what_is_passed_on_fits_64_bits(number: int):
    """Other readers of JSON than ours may have no larger integers."""
    for body in (
        {"messages": [{"role": "u", "content": "", "x": [number]}]},
        {"messages": CONVERSATION, "chat_template_kwargs": {"x": {"y": number}}},
    ):
        with pytest.raises(RequestError, match="64 bits"):
            parse_generate(dump(body).encode())


@pytest.mark.parametrize("best_of", [True, 1.0, 2, "1", [1]])
def test_best_of_asks_for_nothing_or_is_refused(best_of: Any):
    parse_completion(dump({"prompt": "a", "best_of": 1}).encode())
    with pytest.raises(RequestError) as caught:
        parse_completion(dump({"prompt": "a", "best_of": best_of}).encode())
    assert caught.value.field == "best_of"


@pytest.mark.parametrize("good", GOOD_GENERATE)
def test_the_good_ones_are_good(good: Any):
    check_call(parse_generate(dump(good).encode()))


@pytest.mark.parametrize("message", ["[0]: x", "]: x", ".: x", "", ": ", "sampling_params.: x", "a" * 10**5 + ": x"])
def test_a_worker_s_refusal_may_name_anything(message: str):
    report = ErrorReport(status=400, message=message, code="invalid_request")
    encode_json(openai_error(report, COMPLETION_RENAMES))


# ------------------------------------------------------------------------------------------------ limits


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": CONVERSATION, **fields}


def nested(depth: int) -> Any:
    return Raw("[" * depth + "]" * depth)


LIMITS: list[tuple[str, int, Callable[[int], dict[str, Any]], str]] = [
    ("text", bounds.MAX_PROMPTS, lambda n: {"text": ["a"] * n}, "prompts"),
    ("input_ids", bounds.MAX_PROMPTS, lambda n: {"input_ids": [[1]] * n}, "prompts"),
    ("sampling_params.n", bounds.MAX_SAMPLES, lambda n: {"text": "a", "sampling_params": {"n": n}}, "must be in"),
    ("rid", bounds.MAX_RID_CHARS, lambda n: {"text": "a", "rid": "r" * n}, "characters"),
    ("messages", bounds.MAX_MESSAGES, lambda n: {"messages": [{"role": "u", "content": ""}] * n}, "messages"),
    (
        "sampling_params.stop",
        bounds.MAX_STOP_STRINGS,
        lambda n: {"text": "a", "sampling_params": {"stop": ["a"] * n}},
        "strings",
    ),
    (
        "sampling_params.stop",
        bounds.MAX_STOP_CHARS,
        lambda n: {"text": "a", "sampling_params": {"stop": "a" * n}},
        "characters",
    ),
    (
        "sampling_params.stop_token_ids",
        bounds.MAX_STOP_TOKEN_IDS,
        lambda n: {"text": "a", "sampling_params": {"stop_token_ids": [1] * n}},
        "ids",
    ),
    (
        "sampling_params.logit_bias",
        bounds.MAX_LOGIT_BIAS_TOKENS,
        lambda n: {"text": "a", "sampling_params": {"logit_bias": {str(i): 1 for i in range(n)}}},
        "tokens",
    ),
    (
        "top_logprobs_num",
        bounds.MAX_TOP_LOGPROBS,
        lambda n: {"text": "a", "return_logprob": True, "top_logprobs_num": n},
        "must be in",
    ),
    (
        "bootstrap_host",
        bounds.MAX_HOST_CHARS,
        lambda n: {"text": "a", "bootstrap_host": "h" * n, "bootstrap_port": 1, "bootstrap_room": 1},
        "characters",
    ),
    ("chat_template_kwargs", bounds.MAX_NESTING, lambda n: chat(chat_template_kwargs={"x": nested(n - 1)}), "deeply"),
    (
        "messages[0]",
        bounds.MAX_NESTING,
        lambda n: {"messages": [{"role": "u", "content": "", "x": nested(n - 1)}]},
        "deeply",
    ),
]


@pytest.mark.parametrize(("field", "most", "body_of", "word"), LIMITS)
def test_a_limit_is_where_it_is(field: str, most: int, body_of: Callable[[int], dict[str, Any]], word: str):
    parse_generate(dump(body_of(most)).encode())
    with pytest.raises(RequestError, match=word) as caught:
        parse_generate(dump(body_of(most + 1)).encode())
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bootstrap_host", ""),
        ("bootstrap_host", "a b"),
        ("bootstrap_host", "eth0;10.0.0.1"),
        ("bootstrap_host", "h/x"),
        ("bootstrap_host", "h\0"),
        ("bootstrap_host", "h\n"),
        ("bootstrap_host", "ħ"),
        ("bootstrap_host", 5),
        ("bootstrap_port", 0),
        ("bootstrap_port", 65536),
        ("bootstrap_port", "80"),
        ("bootstrap_room", 0),
        ("bootstrap_room", -1),
        ("bootstrap_room", 2**63),
        ("bootstrap_room", True),
    ],
)
def test_where_the_other_leg_is_must_be_a_place(field: str, value: Any):
    body = {"text": "a", "bootstrap_host": "h", "bootstrap_port": 1, "bootstrap_room": 1}
    with pytest.raises(RequestError) as caught:
        parse_generate(dump({**body, field: value}).encode())
    assert caught.value.field == field


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "fe80::1%eth0", "prefill_0.my-net.example", "localhost"])
def test_hosts_of_every_kind(host: str):
    body = {"text": "a", "bootstrap_host": host, "bootstrap_port": 65535, "bootstrap_room": 2**63 - 1}
    [sample] = parse_generate(dump(body).encode()).samples
    assert sample.bootstrap is not None
    assert sample.bootstrap.host == host


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("model", {"prompt": "a", "model": "m" * (bounds.MAX_MODEL_CHARS + 1)}),
        ("prompt", {"prompt": ["a"] * (bounds.MAX_PROMPTS + 1)}),
        ("stop", {"prompt": "a", "stop": ["a"] * (bounds.MAX_STOP_STRINGS + 1)}),
        ("logit_bias", {"prompt": "a", "logit_bias": {str(i): 1 for i in range(bounds.MAX_LOGIT_BIAS_TOKENS + 1)}}),
    ],
)
def test_limits_by_openai_s_names(field: str, body: dict[str, Any]):
    with pytest.raises(RequestError) as caught:
        parse_completion(json.dumps(body).encode())
    error = openai_error(ErrorReport.of(caught.value), COMPLETION_RENAMES)["error"]
    assert isinstance(error, dict)
    assert error["param"] == field


# ------------------------------------------------------------------------------------------------ a whole worker


async def test_a_worker_answers_every_body():
    """Over HTTP: an answer or a refusal, and no defect."""
    rng = random.Random(0)
    good = {**GENERATE, **ROOMS, "text": "hello"}
    bodies = [good, {**good, "text": "long " * 4000}]
    for _ in range(150):
        body = good
        for _ in range(rng.randint(1, 2)):
            body = replaced(body, rng.choice(places(good)), rng.choice(EXTREMES))
        bodies.append(body)
    async with scripted_worker("decode", max_body_bytes=2**14) as worker:

        def answer(message: FrontendToEngine) -> None:
            if isinstance(message, Generate):
                num_tokens = min(2, message.options.sampling.max_new_tokens)
                for index in range(message.options.sampling.n):
                    worker.engine.finish(message, [7] * num_tokens, index=index)

        worker.engine.on_message = answer
        statuses = []
        for body in bodies:
            for path in ("/generate", "/abort_request"):
                async with worker.client.post(path, data=dump(body).encode()) as response:
                    text = await response.text()
                    statuses.append(response.status)
                    assert response.status in (200, 400, 413), (body, text)
                    assert '"error"' not in text or response.status != 200, (body, text)
    assert {200, 400, 413} == set(statuses)
