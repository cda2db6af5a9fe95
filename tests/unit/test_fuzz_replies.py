"""What a worker answers, as the router reads it: whatever the bytes and the numbers, rows are right, or a named error."""

import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from common.errors import RowsError, RowsMismatch
from common.messages import (
    ErrorReport,
    Finished,
    FinishReason,
    RequestOptions,
    RowBlock,
    RowDtype,
    RowHeader,
    VersionSpan,
)
from common.protocol.legs import LegReply, decode_error, decode_last_event, decode_leg, decode_samples
from common.protocol.replies import encode_json, encode_msgpack, error_body, sample_reply
from common.routed_experts.codec import base64_slices, describe, row_fields, view
from common.routed_experts.verify import verify
from router.merge import merge
from tests.support.hostile import STABLE, Raw, damaged, dump, mutated
from tests.support.rows import SPEC, cut, make_rows

BLOCK = cut(SPEC, make_rows(SPEC, 9), 3, 9)
LARGE = cut(SPEC, make_rows(SPEC, 20_000), 0, 20_000)


def reply(*, binary: bool, block: RowBlock = BLOCK) -> Any:
    """A good reply of a leg, decoded as far as its encoding."""
    finished = Finished(
        rid="r",
        prompt_tokens=4,
        cached_tokens=0,
        token_ids=[7, 8],
        logprobs=[-0.5, -1.0],
        finish_reason=FinishReason(type="stop", matched="x"),
        rows=block.header,
        timings={"x": 0.5},
    )
    made = sample_reply(
        finished,
        text="ab",
        options=RequestOptions(return_logprob=True, return_routed_experts=True),
        weight_version="w",
        e2e_latency_s=0.5,
        rows=row_fields(block, "auto", binary=binary),
        is_leg=True,
    )
    return msgspec.msgpack.decode(encode_msgpack(made)) if binary else {**json.loads(encode_json(made)), "index": 1}


BINARY, EVENT = reply(binary=True), reply(binary=False)
ERROR = json.loads(error_body(ErrorReport(status=502, message="lost", code="leg_failed", leg="decode", stage="s")))
DEEP = Raw("[" * 10**5)
# What msgpack can hold.
SMALL_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.sampled_from([-1, 0, 2**31, 2**63, 2**64 - 1])
    | st.floats()
    | st.text(max_size=3)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def use(replies: list[LegReply]) -> None:
    """Do with a reply what the router does with it."""
    for one in replies:
        msgspec.json.encode(one)
        for count in (one.meta_info.prompt_tokens, one.meta_info.cached_tokens, one.index, *one.output_ids):
            assert 0 <= count < 2**31
        if one.rows is not None:
            use_rows(one.rows, one.leg.rows)


def use_rows(block: RowBlock, header: RowHeader | None = None) -> None:
    header = header or block.header
    try:
        rows = view(block)
        verify(block)
        merged = merge([block], start=header.start, stop=header.stop)
    except RowsError:
        return
    assert rows.nbytes == len(block.data)
    assert int(rows.max(initial=0)) < header.num_experts
    assert bytes(merged.data) == bytes(block.data)
    assert sum(map(len, base64_slices(merged, "auto"))) <= 4 * len(block.data)
    msgspec.json.encode(describe(header, "int32"))


def attempt(decode: Callable[[bytes], Any], data: bytes) -> None:
    try:
        decoded = decode(data)
    except ValueError:
        return
    use(decoded if isinstance(decoded, list) else [decoded])


@STABLE
@given(damaged([encode_msgpack(BINARY), encode_msgpack([BINARY, BINARY])]))
@example(b"\x81\xa1x" + b"\x91" * 10**5)
@example(b"\xdd\xff\xff\xff\xff")
def test_bytes_as_msgpack(data: bytes):
    attempt(decode_leg, data)
    attempt(decode_samples, data)


@STABLE
@given(damaged([encode_json(EVENT), encode_json(reply(binary=False, block=LARGE))]))
@example(b'{"x":' + b"[" * 10**5)
@example(b'{"routed_experts":"' + b"A" * 200_000)
@example(b'{"routed_experts":"' + b"A" * 200_000 + b'\\""}')
def test_bytes_as_an_event(data: bytes):
    attempt(decode_last_event, data)


@STABLE
@given(mutated([BINARY, [BINARY, BINARY]], SMALL_VALUES))
def test_mutated_replies(value: Any):
    attempt(decode_samples, msgspec.msgpack.encode(value))


@STABLE
@given(mutated([EVENT]))
@example({**EVENT, "unknown": DEEP})
@example({**EVENT, "output_ids": [10**30]})
@example({**EVENT, "meta_info": {**EVENT["meta_info"], "prompt_tokens": -1}})
def test_mutated_events(value: Any):
    attempt(decode_last_event, dump(value).encode(errors="replace"))


@STABLE
@given(mutated([ERROR]) | st.binary(max_size=40))
@example({"error": DEEP})
@example({"x": DEEP, **ERROR})
def test_errors(value: Any):
    data = value if isinstance(value, bytes) else dump(value).encode(errors="replace")
    report = decode_error(502, data)
    assert report.status == 502
    encode_json({"message": report.message, "stage": report.stage})


# ------------------------------------------------------------------------------------------------ headers

NUMBERS = st.sampled_from(
    [-(2**63), -(10**30), -1, 0, 1, 2, 3, 4, 5, 9, 255, 256, 257, 65536, 65537, 2**31, 2**63, 10**30]
)
DTYPES: st.SearchStrategy[RowDtype] = st.sampled_from(["uint8", "uint8", "uint16"])


def near(number: int) -> st.SearchStrategy[int]:
    return st.just(number) | NUMBERS


@st.composite
def headers(draw: st.DrawFn) -> RowHeader:
    """The header of `BLOCK`, with any of its numbers changed."""
    start, stop = draw(near(3)), draw(near(9))
    spans = st.just((VersionSpan(start, stop, "w"),)) | st.lists(
        st.builds(VersionSpan, NUMBERS, NUMBERS, st.just("w")), max_size=3
    ).map(tuple)
    return RowHeader(
        start=start,
        stop=stop,
        dtype=draw(DTYPES),
        num_experts=draw(near(16)),
        top_k=draw(near(4)),
        layer_ids=draw(st.just((1, 2, 4)) | st.lists(NUMBERS, max_size=4).map(tuple)),
        num_hidden_layers=draw(near(5)),
        weight_versions=draw(spans),
    )


@STABLE
@given(headers(), st.just(bytes(BLOCK.data)) | st.binary(max_size=12))
@example(replace(BLOCK.header, top_k=0), b"")
@example(replace(BLOCK.header, start=0, stop=10**30, layer_ids=()), b"")
@example(replace(BLOCK.header, start=9, stop=9, top_k=-4), b"")
@example(replace(BLOCK.header, start=9, stop=9, layer_ids=(7,)), b"")
@example(replace(BLOCK.header, num_hidden_layers=10**30), bytes(BLOCK.data))
def test_any_header(header: RowHeader, data: bytes):
    use_rows(RowBlock(header, data))


@STABLE
@given(headers(), st.integers(0, 12), st.integers(0, 12))
def test_any_header_in_a_merge(header: RowHeader, start: int, stop: int):
    """Beside a good block, before it or behind it."""
    other = RowBlock(header, bytes(BLOCK.data))
    for blocks in ([BLOCK, other], [other, BLOCK]):
        try:
            merged = merge(blocks, start=start, stop=stop)
        except RowsError:
            continue
        assert len(merged.data) == (stop - start) * SPEC.row_bytes


@pytest.mark.parametrize(
    "change",
    [
        {"start": -1},
        {"start": 10},
        {"num_experts": 0},
        {"num_experts": 65537},
        {"num_experts": 257},
        {"dtype": "uint16"},
        {"top_k": 0},
        {"top_k": -1},
        {"top_k": 17},
        {"layer_ids": ()},
        {"layer_ids": (1, 1, 2)},
        {"layer_ids": (-1, 1, 2)},
        {"layer_ids": (1, 2, 5)},
        {"num_hidden_layers": 1025},
    ],
)
def test_no_model_has_such_rows(change: dict[str, Any]):
    """Whether the data is as long as it would have to be or not."""
    header = replace(BLOCK.header, **change)
    for size in {max(0, header.num_bytes), len(BLOCK.data), 0}:
        with pytest.raises(RowsMismatch):
            view(RowBlock(header, bytes(min(size, 10**6))))


def test_what_is_allocated_is_bounded_by_what_was_sent():
    """Numbers in a header make nothing large of few bytes."""
    tracemalloc.start()
    try:
        for change in (
            {"stop": 2**40},
            {"num_hidden_layers": 2**40},
            {"top_k": 2**20, "num_experts": 65536},
            {"start": 0, "stop": 2**40, "layer_ids": ()},
            {"start": 0, "stop": 2**40, "top_k": 0},
        ):
            block = RowBlock(replace(BLOCK.header, **change), bytes(BLOCK.data))
            for make in (view, verify, lambda block: row_fields(block, "int32", binary=False)):
                with pytest.raises(RowsError):
                    make(block)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
