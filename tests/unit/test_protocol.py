"""POST /generate: bodies in, replies and errors out."""

import json

import msgspec
import numpy as np
import pytest

from common.errors import LegFailed, RequestError
from common.messages import (
    Bootstrap,
    ErrorReport,
    Finished,
    FinishReason,
    PromptLogprobs,
    RequestOptions,
    SamplingParams,
    VersionSpan,
)
from common.protocol.generate import parse_generate
from common.protocol.legs import decode_error, decode_last_event, decode_leg, encode_leg
from common.protocol.limits import check_limits
from common.protocol.logprobs import logprob_fields
from common.protocol.replies import (
    encode_json,
    encode_msgpack,
    error_body,
    progress_reply,
    sample_reply,
    sse_event,
    wants_msgpack,
)
from common.routed_experts.codec import row_fields, rows_from_reply, view
from tests.support.rows import SPEC, cut, make_rows


def parse(**fields):
    return parse_generate(json.dumps(fields).encode())


def with_sampling(**fields):
    return {"text": "a", "sampling_params": fields}


BAD = [
    ("text", {}),
    ("text", {"text": None}),
    ("text", {"text": ""}),
    ("text", {"text": []}),
    ("text", {"text": 3}),
    ("text[1]", {"text": ["a", ""]}),
    ("text[1]", {"text": ["a", 3]}),
    ("input_ids", {"text": "a", "input_ids": [1]}),
    ("input_ids", {"input_ids": []}),
    ("input_ids", {"input_ids": "abc"}),
    ("input_ids[1]", {"input_ids": [1, "2"]}),
    ("input_ids[1]", {"input_ids": [1, 2.0]}),
    ("input_ids[0]", {"input_ids": [True]}),
    ("input_ids[1]", {"input_ids": [1, -1]}),
    ("input_ids[0]", {"input_ids": [2**31]}),
    ("input_ids[0]", {"input_ids": [10**40]}),
    ("input_ids[1]", {"input_ids": [1, [2]]}),
    ("input_ids[1]", {"input_ids": [[1], 2]}),
    ("input_ids[1]", {"input_ids": [[1], []]}),
    ("input_ids[1][0]", {"input_ids": [[1], [None]]}),
    ("rid", {"text": "a", "rid": ""}),
    ("rid", {"text": "a", "rid": 1}),
    ("rid", {"text": "a", "rid": "r" * 513}),
    ("rid", {"text": "a", "rid": ["x"]}),
    ("rid", {"text": ["a", "b"], "rid": ["x"]}),
    ("rid", {"text": ["a", "b"], "rid": ["x", "x"]}),
    ("rid[1]", {"text": ["a", "b"], "rid": ["x", None]}),
    ("stream", {"text": "a", "stream": 1}),
    ("return_logprob", {"text": "a", "return_logprob": "yes"}),
    ("return_routed_experts", {"text": "a", "return_routed_experts": 0}),
    ("routed_experts_dtype", {"text": "a", "routed_experts_dtype": "int8"}),
    ("routed_experts_start_len", {"text": "a", "return_routed_experts": True, "routed_experts_start_len": -1}),
    ("routed_experts_start_len", {"text": "a", "return_routed_experts": True, "routed_experts_start_len": 1.5}),
    ("data_parallel_rank", {"text": "a", "data_parallel_rank": -1}),
    ("data_parallel_rank", {"text": "a", "data_parallel_rank": [0]}),
    ("data_parallel_rank", {"text": "a", "data_parallel_rank": True}),
    ("sampling_params", {"text": "a", "sampling_params": 3}),
    ("sampling_params", {"text": "a", "sampling_params": [{}]}),
    ("sampling_params", {"text": ["a", "b"], "sampling_params": [{}]}),
    ("sampling_params[1].top_k", {"text": ["a", "b"], "sampling_params": [{}, {"top_k": 0}]}),
    ("sampling_params.max_new_tokens", with_sampling(max_new_tokens=-1)),
    ("sampling_params.max_new_tokens", with_sampling(max_new_tokens=1.0)),
    ("sampling_params.max_new_tokens", with_sampling(max_new_tokens=2**40)),
    ("sampling_params.temperature", with_sampling(temperature=-0.1)),
    ("sampling_params.temperature", with_sampling(temperature="hot")),
    ("sampling_params.temperature", with_sampling(temperature=True)),
    ("sampling_params.temperature", with_sampling(temperature=10**400)),
    ("sampling_params.top_p", with_sampling(top_p=0)),
    ("sampling_params.top_p", with_sampling(top_p=1.01)),
    ("sampling_params.top_k", with_sampling(top_k=0)),
    ("sampling_params.top_k", with_sampling(top_k=-2)),
    ("sampling_params.min_p", with_sampling(min_p=-0.1)),
    ("sampling_params.min_p", with_sampling(min_p=1.1)),
    ("sampling_params.ignore_eos", with_sampling(ignore_eos=1)),
    ("sampling_params.stop_token_ids", with_sampling(stop_token_ids=5)),
    ("sampling_params.stop_token_ids[0]", with_sampling(stop_token_ids=["5"])),
    ("sampling_params.sampling_seed", with_sampling(sampling_seed=-1)),
    ("sampling_params.sampling_seed", with_sampling(sampling_seed=2**63)),
    ("bootstrap_room", {"text": "a", "bootstrap_host": "h", "bootstrap_port": 1}),
    ("bootstrap_host", {"text": "a", "bootstrap_room": 1}),
    ("bootstrap_room", {"text": "a", "bootstrap_host": "h", "bootstrap_port": 1, "bootstrap_room": 2**63}),
    ("bootstrap_room", {"text": "a", "bootstrap_host": "h", "bootstrap_port": 1, "bootstrap_room": -1}),
    ("bootstrap_port", {"text": "a", "bootstrap_host": "h", "bootstrap_port": 0, "bootstrap_room": 1}),
    ("bootstrap_room", {"text": ["a", "b"], "bootstrap_host": "h", "bootstrap_port": 1, "bootstrap_room": 1}),
    ("bootstrap_room", {"text": ["a", "b"], "bootstrap_host": "h", "bootstrap_port": 1, "bootstrap_room": [1]}),
    ("bootstrap_room", {**with_sampling(n=2), "bootstrap_host": "h", "bootstrap_port": 1, "bootstrap_room": 1}),
    ("bootstrap_room", {**with_sampling(n=2), "bootstrap_host": "h", "bootstrap_port": 1, "bootstrap_room": [1]}),
    ("bootstrap_room", {**with_sampling(n=2), "bootstrap_host": "h", "bootstrap_port": 1, "bootstrap_room": [1, 1]}),
    ("bootstrap_room", {**with_sampling(n=2), "bootstrap_host": "h", "bootstrap_port": 1, "bootstrap_room": [1, "2"]}),
    ("bootstrap_room", {**with_sampling(n=1), "bootstrap_host": "h", "bootstrap_port": 1, "bootstrap_room": [1]}),
    ("messages", {"text": "a", "messages": [{"role": "user", "content": "x"}]}),
    ("messages", {"messages": []}),
    ("messages", {"messages": "hello"}),
    ("messages[0]", {"messages": ["hello"]}),
    ("messages[0]", {"messages": [[{"role": "user", "content": "x"}]]}),
    ("messages[0].role", {"messages": [{"content": "x"}]}),
    ("messages[1].content", {"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": 3}]}),
    ("chat_template_kwargs", {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": [1]}),
    ("sampling_params.n", with_sampling(n=0)),
    ("sampling_params.n", with_sampling(n=129)),
    ("sampling_params.n", with_sampling(n=2.0)),
    ("sampling_params.n", with_sampling(n=2, max_new_tokens=0)),
    ("sampling_params.sampling_seed", with_sampling(n=2, sampling_seed=2**63 - 1)),
    ("sampling_params.stop", with_sampling(stop=3)),
    ("sampling_params.stop", with_sampling(stop=["x"] * 17)),
    ("sampling_params.stop", with_sampling(stop="x" * 1025)),
    ("sampling_params.stop[1]", with_sampling(stop=["x", ""])),
    ("sampling_params.stop[0]", with_sampling(stop=[5])),
    ("sampling_params.min_new_tokens", with_sampling(min_new_tokens=-1)),
    ("sampling_params.min_new_tokens", with_sampling(min_new_tokens=6, max_new_tokens=5)),
    ("sampling_params.frequency_penalty", with_sampling(frequency_penalty=2.5)),
    ("sampling_params.presence_penalty", with_sampling(presence_penalty=-2.1)),
    ("sampling_params.repetition_penalty", with_sampling(repetition_penalty=0)),
    ("sampling_params.repetition_penalty", with_sampling(repetition_penalty=2.01)),
    ("sampling_params.logit_bias", with_sampling(logit_bias=[1])),
    ("sampling_params.logit_bias", with_sampling(logit_bias={"x": 1})),
    ("sampling_params.logit_bias", with_sampling(logit_bias={"-1": 1})),
    ("sampling_params.logit_bias", with_sampling(logit_bias={"\u0663": 1})),
    ("sampling_params.logit_bias", with_sampling(logit_bias={"9" * 10: 1})),
    ("sampling_params.logit_bias", with_sampling(logit_bias={"9" * 5000: 1})),
    ("sampling_params.logit_bias.5", with_sampling(logit_bias={"5": 101})),
    ("sampling_params.logit_bias.5", with_sampling(logit_bias={"5": None})),
    ("sampling_params.no_stop_trim", with_sampling(no_stop_trim=1)),
    ("top_logprobs_num", {"text": "a", "return_logprob": True, "top_logprobs_num": 21}),
    ("logprob_start_len", {"text": "a", "return_logprob": True, "logprob_start_len": -2}),
    ("return_text_in_logprobs", {"text": "a", "return_logprob": True, "return_text_in_logprobs": 1}),
    # Known, and not to be had.
    ("sampling_params.stop_regex", with_sampling(stop_regex="a+")),
    ("token_ids_logprob", {"text": "a", "token_ids_logprob": [1]}),
    ("sampling_params.json_schema", with_sampling(json_schema="{}")),
    ("sampling_params.regex", with_sampling(regex="a+")),
    ("return_hidden_states", {"text": "a", "return_hidden_states": True}),
    ("lora_path", {"text": ["a", "b"], "lora_path": [None, "x"]}),
    ("image_data", {"text": "a", "image_data": "x.png"}),
    ("input_embeds", {"input_embeds": [[0.5]]}),
]


@pytest.mark.parametrize(("field", "body"), BAD)
def test_a_bad_field_is_named(field, body):
    with pytest.raises(RequestError) as caught:
        parse(**body)
    assert caught.value.field == field
    assert ErrorReport.of(caught.value).status == 400


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b'{"text": "a"} x',
        b'{"text": "\xff"}',
        b'{"text": "a", "sampling_params": {"temperature": NaN}}',
        b'{"text": "a", "sampling_params": {"temperature": Infinity}}',
        b'{"text": "a", "sampling_params": {"temperature": 1e999}}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_json_object_is_refused(body):
    with pytest.raises(RequestError) as caught:
        parse_generate(body)
    assert caught.value.field == "body"


def test_defaults():
    call = parse(text="hello")
    (sample,) = call.samples
    assert not call.is_list
    assert not call.stream
    assert (sample.text, sample.input_ids, sample.bootstrap) == ("hello", None, None)
    assert sample.options == RequestOptions(sampling=sample.options.sampling)
    sampling = sample.options.sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_k) == (128, 1.0, -1)
    assert parse(text="hello").samples[0].options.sampling.seed != sampling.seed
    assert len(sample.rid) == 32


def test_neutral_values_null_and_unknown_fields_are_fine():
    call = parse(
        input_ids=[[1, 2]],
        text=None,
        lora_path=[None],
        top_logprobs_num=0,
        logprob_start_len=-1,
        return_hidden_states=False,
        routed_experts_start_len=-5,
        model="any",
        sampling_params={"n": 1, "stop": [], "logit_bias": {}, "repetition_penalty": 1.0, "temperature": None, "x": 1},
    )
    assert call.is_list
    assert call.samples[0].options.routed_experts_start_len == 0


def test_a_list_has_one_of_everything_for_each():
    call = parse(
        input_ids=[[1], [2, 3]],
        sampling_params=[{"sampling_seed": 7, "stop_token_ids": [9, 5, 9]}, {"max_new_tokens": 0}],
        rid=["x", "y"],
        stream=True,
        bootstrap_host="h",
        bootstrap_port=[1, 2],
        bootstrap_room=[10, 2**63 - 1],
    )
    first, second = call.samples
    assert (first.rid, second.rid, first.input_ids, second.input_ids) == ("x", "y", (1,), (2, 3))
    assert (first.options.sampling.seed, first.options.sampling.stop_token_ids) == (7, (5, 9))
    assert second.options.sampling.max_new_tokens == 0
    assert (first.bootstrap, second.bootstrap) == (Bootstrap("h", 1, (10,)), Bootstrap("h", 2, (2**63 - 1,)))
    assert call.stream
    assert first.options.stream
    assert [sample.rid for sample in parse(text=["a", "b"], rid="x").samples] == ["x_0", "x_1"]


def test_every_sampling_parameter_arrives():
    given = {
        "n": 3,
        "max_new_tokens": 9,
        "min_new_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 5,
        "min_p": 0.25,
        "frequency_penalty": -2,
        "presence_penalty": 2,
        "repetition_penalty": 2,
        "logit_bias": {"5": -100, "07": 1.5},
        "stop": ["b", "a", "b"],
        "no_stop_trim": True,
        "ignore_eos": True,
        "stop_token_ids": [3, 2, 3],
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "sampling_seed": 2**63 - 3,
    }
    sampling = parse(text="a", sampling_params=given).samples[0].options.sampling
    assert sampling == SamplingParams(
        **{
            **{name: value for name, value in given.items() if name != "sampling_seed"},
            "logit_bias": {5: -100.0, 7: 1.5},
            "stop": ("b", "a"),
            "stop_token_ids": (2, 3),
            "seed": 2**63 - 3,
        }
    )
    assert parse(**with_sampling(stop="ab")).samples[0].options.sampling.stop == ("ab",)
    assert parse(**with_sampling(stop="")).samples[0].options.sampling.stop == ()


def test_logprob_options_count_only_when_logprobs_are_asked_for():
    fields = {"logprob_start_len": 4, "top_logprobs_num": 3, "return_text_in_logprobs": True}
    options = parse(text="a", return_logprob=True, **fields).samples[0].options
    assert (options.logprob_start_len, options.top_logprobs_num, options.return_text_in_logprobs) == (4, 3, True)
    ignored = parse(text="a", **fields).samples[0].options
    assert ignored == RequestOptions(sampling=ignored.sampling)


def test_several_answers_make_a_list():
    call = parse(**with_sampling(n=3), bootstrap_host="h", bootstrap_port=1, bootstrap_room=[5, 6, 2**63 - 1])
    assert (call.is_list, call.has_prompt_list, call.num_answers) == (True, False, 3)
    assert call.samples[0].bootstrap == Bootstrap("h", 1, (5, 6, 2**63 - 1))
    call = parse(
        text=["a", "b"],
        sampling_params=[{"n": 2}, {}],
        bootstrap_host="h",
        bootstrap_port=1,
        bootstrap_room=[[5, 6], 7],
    )
    assert (call.is_list, call.has_prompt_list, call.num_answers) == (True, True, 3)
    assert [sample.bootstrap.rooms for sample in call.samples if sample.bootstrap] == [(5, 6), (7,)]
    one = parse(text=["a"], bootstrap_host="h", bootstrap_port=1, bootstrap_room=7).samples[0]
    assert one.bootstrap == Bootstrap("h", 1, (7,))


def test_a_conversation_is_a_prompt():
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "hi", "name": "x"}]
    call = parse(messages=messages, chat_template_kwargs={"enable_thinking": False})
    (sample,) = call.samples
    assert not call.is_list
    assert (sample.prompt_field, sample.text, sample.input_ids) == ("messages", None, None)
    assert sample.messages == tuple(messages)
    assert sample.chat_template_kwargs == {"enable_thinking": False}
    assert parse(text="a", chat_template_kwargs={"x": 1}).samples[0].chat_template_kwargs == {}


LIMITS = {"vocab_size": 100, "context_tokens": 50, "kv_pool_tokens": 40}


@pytest.mark.parametrize(
    ("field", "message", "body", "num_prompt_tokens", "limits"),
    [
        ("input_ids", "id 100 at index 1 is outside [0, 100)", {"input_ids": [99, 100]}, 2, LIMITS),
        ("text", "no tokens", {"text": "a"}, 0, LIMITS),
        ("sampling_params.max_new_tokens", "pool of 40", with_sampling(max_new_tokens=31), 10, LIMITS),
        ("sampling_params.max_new_tokens", "context of 50", with_sampling(max_new_tokens=41), 10, LIMITS),
        ("text", "51 tokens", with_sampling(max_new_tokens=0), 51, LIMITS),
        ("input_ids", "40 tokens", {"input_ids": [1], "sampling_params": {"max_new_tokens": 5}}, 40, LIMITS),
        ("sampling_params.logit_bias", "id 100 is", with_sampling(logit_bias={"100": 1}), 1, LIMITS),
        ("sampling_params.stop_token_ids", "id 100 is", with_sampling(stop_token_ids=[1, 100]), 1, LIMITS),
        (
            "logprob_start_len",
            "6 is outside [0, 5]",
            {**with_sampling(max_new_tokens=1), "return_logprob": True, "logprob_start_len": 6},
            5,
            LIMITS,
        ),
        (
            "routed_experts_start_len",
            "6 is outside [0, 5]",
            {**with_sampling(max_new_tokens=1), "return_routed_experts": True, "routed_experts_start_len": 6},
            5,
            LIMITS,
        ),
    ],
)
def test_limits_are_named(field, message, body, num_prompt_tokens, limits):
    with pytest.raises(RequestError) as caught:
        check_limits(parse(**body).samples[0], num_prompt_tokens, **limits)
    assert caught.value.field == field
    assert message in str(caught.value)


def test_what_just_fits_passes():
    body = {**with_sampling(max_new_tokens=30), "return_routed_experts": True, "routed_experts_start_len": 10}
    check_limits(parse(**body).samples[0], 10, **LIMITS)
    check_limits(parse(**with_sampling(max_new_tokens=0)).samples[0], 40, **LIMITS)
    check_limits(parse(**with_sampling(max_new_tokens=1), routed_experts_start_len=99).samples[0], 5, **LIMITS)


def finished(rows=None):
    return Finished(
        rid="r",
        prompt_tokens=5,
        cached_tokens=4,
        token_ids=[7, 8, 9],
        logprobs=[-0.5, -1.0, -1.5],
        finish_reason=FinishReason(type="length", length=3),
        rows=rows,
        weight_versions=(VersionSpan(0, 3, "w0"), VersionSpan(3, 7, "w1")),
        timings={"pd_transfer_duration": 0.25},
    )


OPTIONS = RequestOptions(return_logprob=True, return_routed_experts=True)
BLOCK = cut(SPEC, make_rows(SPEC, 7), 0, 7)


def reply(*, binary, is_leg):
    rows = row_fields(BLOCK, "auto" if is_leg else "int32", binary=binary)
    return sample_reply(
        finished(BLOCK.header),
        text="abc",
        options=OPTIONS,
        weight_version="w2",
        e2e_latency_s=1.5,
        rows=rows,
        is_leg=is_leg,
    )


def test_json_and_msgpack_say_the_same():
    from_json = json.loads(encode_json(reply(binary=False, is_leg=False)))
    from_msgpack = msgspec.msgpack.decode(encode_msgpack(reply(binary=True, is_leg=False)))
    np.testing.assert_array_equal(
        rows_from_reply(from_json["meta_info"])[:, list(SPEC.layer_ids)], rows_from_reply(from_msgpack["meta_info"])
    )
    for answer in (from_json, from_msgpack):
        meta = answer["meta_info"]
        assert [meta.pop(key) for key in list(meta) if key.startswith("routed_experts")]
        assert answer == {
            "text": "abc",
            "output_ids": [7, 8, 9],
            "meta_info": {
                "id": "r",
                "finish_reason": {"type": "length", "length": 3},
                "prompt_tokens": 5,
                "completion_tokens": 3,
                "cached_tokens": 4,
                "weight_version": "w1",
                "weight_versions": [[0, 3, "w0"], [3, 7, "w1"]],
                "e2e_latency": 1.5,
                "pd_transfer_duration": 0.25,
                "output_token_logprobs": [[-0.5, 7, None], [-1.0, 8, None], [-1.5, 9, None]],
            },
        }


def test_logprobs_have_exactly_three_items():
    options = RequestOptions(return_logprob=True, logprob_start_len=0, top_logprobs_num=2, return_text_in_logprobs=True)
    ended = msgspec.structs.replace(
        finished(),
        top_logprobs=[[(-0.5, 7), (-2.0, 1)], [(-1.0, 8), (-3.0, 2)], [(-1.5, 9), (float("-inf"), 3)]],
        prompt_logprobs=PromptLogprobs([None, -4.0], [5, 6], [None, [(-4.0, 6), (-5.0, 7)]]),
    )
    made = logprob_fields(ended, options, text_of=str)
    assert json.loads(msgspec.json.encode(made)) == {
        "output_token_logprobs": [[-0.5, 7, "7"], [-1.0, 8, "8"], [-1.5, 9, "9"]],
        "output_top_logprobs": [
            [[-0.5, 7, "7"], [-2.0, 1, "1"]],
            [[-1.0, 8, "8"], [-3.0, 2, "2"]],
            [[-1.5, 9, "9"], [None, 3, "3"]],
        ],
        "input_token_logprobs": [[None, 5, "5"], [-4.0, 6, "6"]],
        "input_top_logprobs": [None, [[-4.0, 6, "6"], [-5.0, 7, "7"]]],
    }
    plain = logprob_fields(ended, RequestOptions(return_logprob=True), text_of=str)
    assert plain == {"output_token_logprobs": [(-0.5, 7, None), (-1.0, 8, None), (-1.5, 9, None)]}
    answer = sample_reply(
        ended, text="", options=options, weight_version="w", e2e_latency_s=0.0, logprobs=made, is_leg=True
    )
    leg = decode_leg(encode_msgpack(answer)).meta_info
    assert (leg.input_token_logprobs, leg.input_top_logprobs) == (
        [(None, 5, "5"), (-4.0, 6, "6")],
        [None, [(-4.0, 6, "6"), (-5.0, 7, "7")]],
    )
    assert leg.output_top_logprobs is not None
    assert leg.output_top_logprobs[2] == [(-1.5, 9, "9"), (float("-inf"), 3, "3")]


def test_an_early_abort_has_no_rows_at_all():
    ended = msgspec.structs.replace(
        finished(),
        token_ids=[],
        logprobs=[],
        finish_reason=FinishReason(type="abort", message="asked for", cause="requested"),
        weight_versions=(),
    )
    answer = sample_reply(ended, text="", options=OPTIONS, weight_version="w", e2e_latency_s=0.0, is_leg=True)
    body = json.loads(encode_json(answer))
    assert not [key for key in body["meta_info"] if key.startswith("routed_experts")]
    assert body["output_ids"] == body["meta_info"]["output_token_logprobs"] == []
    assert body["meta_info"]["finish_reason"] == {"type": "abort", "message": "asked for", "cause": "requested"}
    leg = decode_leg(encode_msgpack(answer))
    assert leg.rows is None
    assert (leg.meta_info.weight_version, leg.meta_info.weight_versions) == ("w", ())
    assert leg.meta_info.finish_reason.cause == "requested"
    with pytest.raises(AssertionError):
        sample_reply(finished(), text="", options=OPTIONS, weight_version="w", e2e_latency_s=0.0)


def test_a_leg_reply_comes_back_with_its_block():
    body = encode_msgpack(reply(binary=True, is_leg=True))
    event = encode_json(reply(binary=False, is_leg=True))
    for leg in (decode_leg(body), decode_last_event(event)):
        assert leg.rows is not None
        assert leg.rows.header == BLOCK.header
        np.testing.assert_array_equal(view(leg.rows), view(BLOCK))
        assert [logprob for logprob, _, _ in leg.meta_info.output_token_logprobs or ()] == [-0.5, -1.0, -1.5]
        assert leg.leg.timings == {"pd_transfer_duration": 0.25}
        assert leg.meta_info.weight_versions == (VersionSpan(0, 3, "w0"), VersionSpan(3, 7, "w1"))
    rows = decode_leg(body).rows
    assert rows is not None
    assert np.shares_memory(np.frombuffer(body, np.uint8), view(rows))


def test_a_leg_body_is_parsed_as_it_was_meant():
    sample = parse(
        input_ids=[1, 2],
        return_logprob=True,
        return_routed_experts=True,
        routed_experts_start_len=1,
        data_parallel_rank=2,
        sampling_params={"temperature": 0.5, "top_k": 3, "stop_token_ids": [4], "ignore_eos": True},
    ).samples[0]
    bootstrap = Bootstrap("h", 8, (9,))
    call = parse_generate(encode_leg(sample, "decode", rid="leg", bootstrap=bootstrap, stream=False))
    (leg,) = call.samples
    assert not call.is_list
    assert (leg.rid, leg.bootstrap, leg.input_ids) == ("leg", bootstrap, (1, 2))
    assert leg.options.sampling == sample.options.sampling
    assert leg.options == msgspec.structs.replace(sample.options, routed_experts_dtype="auto")
    (leg,) = parse_generate(encode_leg(sample, "prefill", rid="leg", bootstrap=bootstrap, stream=False)).samples
    assert leg.options.data_parallel_rank is None


def test_a_stream_event():
    event = sse_event(progress_reply("r", text="a", token_ids=[7], logprobs=[-0.5], prompt_tokens=5, options=OPTIONS))
    assert event.startswith(b"data: {")
    assert event.endswith(b"}\n\n")
    meta = json.loads(event[5:])["meta_info"]
    assert (meta["finish_reason"], meta["completion_tokens"]) == (None, 1)


def test_errors_come_back_from_their_body():
    report = ErrorReport.of(LegFailed("lost", leg="decode", stage="transfer"), rid="r")
    body = error_body(report)
    assert json.loads(body) == {
        "error": {
            "message": "lost",
            "type": "server_error",
            "code": "leg_failed",
            "leg": "decode",
            "stage": "transfer",
            "rid": "r",
        }
    }
    again = decode_error(502, body)
    assert (again.message, again.code, again.stage) == ("lost", "leg_failed", "transfer")
    assert decode_error(500, b"<html>oops").message == "HTTP 500: <html>oops"


def test_accept():
    assert wants_msgpack("application/msgpack", stream=False)
    assert wants_msgpack("application/json, application/msgpack;q=0.9", stream=False)
    assert not wants_msgpack("*/*", stream=True)
    assert not wants_msgpack(None, stream=False)
    with pytest.raises(RequestError):
        wants_msgpack("application/msgpack", stream=True)
