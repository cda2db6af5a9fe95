"""A leg's replies as the router reads them: large last events, lists of samples, and bodies for n samples."""

import json

import msgspec
import numpy as np
import pytest

from common.messages import Bootstrap, Finished, FinishReason, RequestOptions, SamplingParams
from common.protocol.generate import Sample, parse_generate
from common.protocol.legs import decode_last_event, decode_samples, encode_leg
from common.protocol.replies import encode_json, encode_msgpack, sample_reply
from common.routed_experts.codec import row_fields, view
from tests.support.rows import SPEC, cut, make_rows


def reply(num_rows, *, binary):
    block = cut(SPEC, make_rows(SPEC, num_rows), 0, num_rows)
    finished = Finished(
        rid="r",
        prompt_tokens=5,
        cached_tokens=0,
        token_ids=[1],
        logprobs=[-1.0],
        finish_reason=FinishReason(type="length", length=1),
        rows=block.header,
    )
    made = sample_reply(
        finished,
        # What looks like the field of the rows, within a string.
        text='"routed_experts":"AAAA"',
        options=RequestOptions(return_routed_experts=True),
        weight_version="w1",
        e2e_latency_s=0.0,
        rows=row_fields(block, "auto", binary=binary),
        is_leg=True,
    )
    return made, block


@pytest.mark.parametrize("num_rows", [0, 10, 40_001])
def test_a_last_event_of_any_size_is_read(num_rows):
    made, block = reply(num_rows, binary=False)
    leg = decode_last_event(encode_json(made | {"index": 3}))
    assert leg.rows is not None
    assert (leg.index, leg.text, leg.rows.header) == (3, '"routed_experts":"AAAA"', block.header)
    np.testing.assert_array_equal(view(leg.rows), view(block))


@pytest.mark.parametrize("cut_at", [10, 300_000, -10])
def test_a_broken_last_event_is_a_value_error(cut_at):
    made, _ = reply(40_001, binary=False)
    with pytest.raises(ValueError, match=r"."):
        decode_last_event(encode_json(made)[:cut_at])


def test_bad_base64_is_a_value_error():
    made, _ = reply(40_001, binary=False)
    encoded = bytearray(encode_json(made))
    encoded[len(encoded) // 2] = ord("!")
    with pytest.raises(ValueError, match=r"."):
        decode_last_event(bytes(encoded))


def test_a_decode_leg_answers_with_one_reply_or_a_list():
    made, _ = reply(10, binary=True)
    assert len(decode_samples(encode_msgpack(made))) == 1
    assert len(decode_samples(encode_msgpack([made, made]))) == 2


def test_n_samples_have_n_rooms():
    options = RequestOptions(sampling=SamplingParams(n=3, seed=9), return_logprob=True, top_logprobs_num=2)
    sample = Sample(rid="mine", options=options, messages=({"role": "user", "content": "a"},))
    bootstrap = Bootstrap("h", 8, (1, 2, 3))
    body = encode_leg(sample, "decode", rid="leg", bootstrap=bootstrap, stream=True)
    (leg,) = parse_generate(body).samples
    assert (leg.messages, leg.bootstrap) == (sample.messages, bootstrap)
    assert leg.options == msgspec.structs.replace(options, stream=True, routed_experts_dtype="auto")
    alone = json.loads(encode_leg(sample, "decode", rid="leg", bootstrap=None, stream=False))
    assert alone["sampling_params"]["n"] == 3
    assert "bootstrap_room" not in alone
    one_room = json.loads(encode_leg(sample, "decode", rid="leg", bootstrap=Bootstrap("h", 8, (7,)), stream=False))
    assert one_room["bootstrap_room"] == 7
