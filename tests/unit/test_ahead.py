"""What the router does with a leg's rows before the other leg has ended: checks, and base64 made ahead."""

import asyncio
import contextlib
import gc
import itertools
import json
import threading
from unittest import mock

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import common.routed_experts.codec
import common.server.bodies
import router.ahead
from common.errors import BadRows, LegFailed, RowsMismatch
from common.messages import FinishReason, RowBlock
from common.protocol.legs import LegExtras, LegMeta, LegReply
from common.protocol.replies import encode_json
from common.routed_experts.codec import base64_length, base64_slices, num_full_slices, rows_from_reply
from common.routed_experts.spec import RowSpec
from common.routed_experts.verify import verify
from common.server.bodies import BodyWriter
from common.versions import whole
from router.ahead import Arrived, LeadEncoder, arrive
from router.merge import merge
from tests.support import stub_workers as stubs
from tests.support.rows import SPEC, cut, make_rows
from tests.support.stub_workers import ROWS, stack

PROMPT = list(range(200))
P = len(PROMPT)
GAPS, NO_GAPS = (0, 2, 3), (1, 2)


def small_slices(num_bytes=1000):
    """Make slices small, so that few rows are many slices."""
    return mock.patch.object(common.routed_experts.codec, "_SLICE_BYTES", num_bytes)


def leg_reply(block):
    meta = LegMeta(
        prompt_tokens=P,
        cached_tokens=0,
        weight_version="w1",
        finish_reason=FinishReason(type="length", length=1),
        routed_experts=None if block is None else memoryview(block.data),
    )
    return LegReply("", [1], meta, LegExtras(None if block is None else block.header))


def ended_leg(block):
    """A leg's task that has ended, or will."""

    async def end():
        return [Arrived(leg_reply(block), block)]

    return asyncio.ensure_future(end())


# ------------------------------------------------------------------------------------------------ the same bytes


async def written(block, form, lead):
    writer = BodyWriter()
    body = writer.body(encode_json(writer.rows(block, form, lead)))
    parts = [bytes(part) async for part in body.written()]
    assert b"".join(parts) == b"".join(body.parts())
    assert sum(map(len, parts)) == body.num_bytes
    return b"".join(parts)


@given(
    layer_ids=st.sampled_from([GAPS, NO_GAPS]),
    num_experts=st.sampled_from([16, 300]),
    top_k=st.integers(1, 5),
    start=st.integers(0, 30),
    num_prompt=st.integers(0, 60),
    num_surplus=st.integers(0, 5),
    num_output=st.integers(0, 20),
    slice_bytes=st.integers(1, 400),
    num_made=st.integers(0, 60),
    form=st.sampled_from(["int32", "auto"]),
    is_small=st.booleans(),
)
def test_what_was_made_ahead_changes_no_byte(
    layer_ids, num_experts, top_k, start, num_prompt, num_surplus, num_output, slice_bytes, num_made, form, is_small
):
    spec = RowSpec(num_experts=num_experts, top_k=top_k, layer_ids=layer_ids, num_hidden_layers=5)
    prompt_end, stop = start + num_prompt, start + num_prompt + num_output
    rows = make_rows(spec, stop + num_surplus)
    prefill, decode = cut(spec, rows, start, prompt_end), cut(spec, rows, prompt_end, stop + num_surplus)
    merged = merge([prefill, decode], start=start, stop=stop)
    small = mock.patch.object(common.server.bodies, "_SMALL_BYTES", 2**18 if is_small else 0)
    with small_slices(slice_bytes), small:
        num_full = num_full_slices(prefill.header, form)
        lead = list(itertools.islice(base64_slices(prefill, form), min(num_made, num_full)))
        plain, ahead = (asyncio.run(written(merged, form, made)) for made in ((), lead))
    assert plain == ahead
    read = rows_from_reply(json.loads(ahead))
    expected = rows[start:stop]
    np.testing.assert_array_equal(read[:, list(layer_ids)] if form == "int32" else read, expected)


def test_a_lead_that_reaches_past_the_end_is_cut():
    block = cut(SPEC, ROWS, 0, 100)
    merged = merge([block], start=0, stop=40)
    with small_slices():
        lead = list(itertools.islice(base64_slices(block, "int32"), num_full_slices(block.header, "int32")))
        assert len(lead) > num_full_slices(merged.header, "int32") > 0
        plain, ahead = (asyncio.run(written(merged, "int32", made)) for made in ((), lead))
    assert plain == ahead


async def test_bytes_are_written_from_where_they_lie():
    block = cut(SPEC, make_rows(SPEC, 40_000), 0, 40_000)
    writer = BodyWriter(binary=True)
    body = writer.body(msgspec.msgpack.encode(writer.rows(block, "auto", [b"not these"])))
    parts = [part async for part in body.written()]
    slices = [part for part in parts if isinstance(part, memoryview)]
    assert b"".join(slices) == bytes(block.data)
    assert all(np.shares_memory(np.frombuffer(part, np.uint8), np.frombuffer(block.data, np.uint8)) for part in slices)
    assert max(map(len, parts)) <= 200_000
    assert msgspec.msgpack.decode(b"".join(parts))["routed_experts"] == bytes(block.data)


# ------------------------------------------------------------------------------------------------ arrivals


@pytest.mark.parametrize("leg", ["prefill", "decode", None])
@pytest.mark.parametrize("num_rows", [2, 100_000])
async def test_bad_rows_name_their_leg(leg, num_rows):
    header = SPEC.header(start=0, stop=num_rows, weight_versions=whole(0, num_rows, "w1"))
    reply = leg_reply(RowBlock(header, bytes(header.num_bytes)))
    with pytest.raises(BadRows) as failure:
        await arrive(leg, reply, wants_rows=True, verify_rows=True)
    assert (failure.value.leg, failure.value.stage) == (leg, "verify")
    assert (await arrive(leg, reply, wants_rows=True, verify_rows=False)).rows is not None
    assert (await arrive(leg, reply, wants_rows=False, verify_rows=True)).rows is None


async def test_rows_are_counted_even_if_they_are_not_verified():
    header = SPEC.header(start=0, stop=2, weight_versions=whole(0, 2, "w1"))
    with pytest.raises(RowsMismatch):
        await arrive("decode", leg_reply(RowBlock(header, b"\0")), wants_rows=True, verify_rows=False)


# ------------------------------------------------------------------------------------------------ the encoder


async def test_all_full_slices_are_made_if_there_is_time():
    block = cut(SPEC, ROWS, 3, 200)
    with small_slices():
        lead = await LeadEncoder().encode(ended_leg(block), "int32", asyncio.Event())
        num_full = num_full_slices(block.header, "int32")
        assert lead == list(base64_slices(block, "int32"))[:num_full]
    assert num_full > 10


async def test_nothing_is_begun_once_it_is_over():
    is_over = asyncio.Event()
    is_over.set()
    with small_slices():
        assert await LeadEncoder().encode(ended_leg(cut(SPEC, ROWS, 0, 200)), "int32", is_over) == []


@pytest.mark.parametrize("block", [None, cut(SPEC, ROWS, 0, 0), cut(SPEC, ROWS, 0, 200)])
async def test_no_rows_and_few_rows_have_no_lead(block):
    assert await LeadEncoder().encode(ended_leg(block), "int32", asyncio.Event()) == []


async def test_it_stops_after_the_trip_that_it_is_in():
    is_over = asyncio.Event()
    loop = asyncio.get_running_loop()

    def slices(*args, **kwargs):
        for number, part in enumerate(base64_slices(*args, **kwargs)):
            if number == 3:
                asyncio.run_coroutine_threadsafe(_set(is_over), loop).result()
            yield part

    with small_slices(), mock.patch.object(router.ahead, "base64_slices", slices):
        lead = await LeadEncoder().encode(ended_leg(cut(SPEC, ROWS, 0, 200)), "int32", is_over)
    assert len(lead) == common.server.bodies._PARTS_PER_TRIP


async def _set(event):
    event.set()


async def test_a_failed_leg_has_no_lead():
    async def fail():
        raise LegFailed("no", leg="prefill", stage="reply")

    with pytest.raises(LegFailed):
        await LeadEncoder().encode(asyncio.ensure_future(fail()), "int32", asyncio.Event())


async def test_what_waits_is_bounded_until_nobody_holds_it():
    block = cut(SPEC, ROWS, 0, 200)
    encoder = LeadEncoder(max_bytes=base64_length(block.header, "int32"))
    with small_slices():
        held = await encoder.encode(ended_leg(block), "int32", asyncio.Event())
        assert held
        assert await encoder.encode(ended_leg(block), "int32", asyncio.Event()) == []
        del held
        gc.collect()
        assert await encoder.encode(ended_leg(block), "int32", asyncio.Event())


# ------------------------------------------------------------------------------------------------ the whole router


def body(**fields):
    sampling = {"max_new_tokens": 4, "sampling_seed": 100} | fields.pop("sampling_params", {})
    return {"input_ids": PROMPT, "rid": "mine", "return_routed_experts": True, "sampling_params": sampling} | fields


async def ask(running, request):
    """Ask, and return the last reply of the only sample, or the error."""
    async with running.client.post("/generate", json=request) as response:
        if response.content_type == "application/json":
            return await response.json()
        events = [line[6:] for line in (await response.text()).split("\n\n") if line]
        return json.loads([event for event in events if event != "[DONE]"][-1])


@contextlib.contextmanager
def watched_encoding():
    """Make slices small, and tell when one was made ahead and whether it may go on; counts all that is made."""
    began, go_on, ahead = asyncio.Event(), threading.Event(), []
    loop = asyncio.get_running_loop()

    def slices(*args, **kwargs):
        for part in base64_slices(*args, **kwargs):
            ahead.append(part)
            loop.call_soon_threadsafe(began.set)
            assert go_on.wait(20)
            yield part

    with small_slices(), mock.patch.object(router.ahead, "base64_slices", slices):
        try:
            yield began, go_on, ahead
        finally:
            go_on.set()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("form", ["int32", "auto"])
@pytest.mark.parametrize("n", [1, 3])
async def test_the_prefill_legs_rows_are_encoded_once_while_decode_runs(stream, form, n):
    with watched_encoding() as (began, go_on, ahead):
        async with stack(decode=stubs.after_release) as running:
            request = body(stream=stream, routed_experts_dtype=form, sampling_params={"n": n})
            asking = asyncio.create_task(ask(running, request))
            await began.wait()
            go_on.set()
            running.decode.release.set()
            answer = await asking
    for reply in answer if isinstance(answer, list) else [answer]:
        rows = rows_from_reply(reply["meta_info"])
        rows = rows[:, list(SPEC.layer_ids)] if form == "int32" else rows
        np.testing.assert_array_equal(rows, ROWS[: P + 3])
    assert ahead
    assert len(set(ahead)) == len(ahead)


async def test_nothing_is_encoded_ahead_of_msgpack():
    with watched_encoding() as (_, _, ahead):
        async with stack() as running:
            headers = {"Accept": "application/msgpack"}
            async with running.client.post("/generate", json=body(), headers=headers) as response:
                meta = msgspec.msgpack.decode(await response.read())["meta_info"]
    np.testing.assert_array_equal(rows_from_reply(meta), ROWS[: P + 3])
    assert ahead == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("end", ["failure", "client"])
async def test_what_was_begun_is_dropped_with_its_prompt(stream, end):
    async def refuse_when_released(stub, request, sample):
        await stub.release.wait()
        return await stubs.refuse(500, "no more")(stub, request, sample)

    encoders = []
    make = LeadEncoder.__init__

    def noted(self, *args):
        make(self, *args)
        encoders.append(self)

    with watched_encoding() as (began, go_on, ahead), mock.patch.object(LeadEncoder, "__init__", noted):
        async with stack(decode=refuse_when_released) as running:
            (encoder,) = encoders
            all_bytes = encoder._free_bytes
            asking = asyncio.create_task(ask(running, body(stream=stream)))
            await began.wait()
            assert encoder._free_bytes < all_bytes
            if end == "failure":
                running.decode.release.set()
                error = (await asking)["error"]
                assert (error["leg"], error["stage"], error["rid"]) == ("decode", "forward", "mine")
            else:
                asking.cancel()
                await asyncio.wait([asking])
                await running.decode.cancelled.wait()
            # The thread is still in its trip, but nobody waits for it, and nobody holds what it has made.
            while encoder._free_bytes < all_bytes or any("encode" in repr(t.get_coro()) for t in asyncio.all_tasks()):
                gc.collect()
                await asyncio.sleep(0)
            go_on.set()
    assert len(ahead) <= common.server.bodies._PARTS_PER_TRIP


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("leg", ["prefill", "decode"])
async def test_a_bad_row_is_an_error_that_names_leg_and_stage(leg, stream):
    async def repeat_an_expert(stub, request, sample):
        made = stub.reply(sample, binary=not sample.options.stream)
        meta = made["meta_info"]
        if sample.options.stream:
            meta["routed_experts"] = "A" * len(meta["routed_experts"])
            response = await stubs.begin_stream(request)
            await response.write(stubs.sse_event(made) + stubs.SSE_DONE)
            return response
        meta["routed_experts"] = bytes(len(meta["routed_experts"]))
        return stubs.web.Response(body=msgspec.msgpack.encode(made))

    async with stack(**{leg: repeat_an_expert}) as running:
        error = (await ask(running, body(stream=stream)))["error"]
    assert (error["code"], error["leg"], error["stage"]) == ("routed_experts_bad", leg, "verify")
    assert error["rid"] == "mine"
    assert f"position {0 if leg == 'prefill' else P}" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_every_row_is_verified_once(stream, n):
    verified = []

    def noted(block):
        verified.append((block.header.start, block.header.stop))
        verify(block)

    with mock.patch.object(router.ahead, "verify", noted):
        async with stack() as running:
            await ask(running, body(stream=stream, sampling_params={"n": n}))
            assert sorted(verified) == [(0, P)] + [(P, P + 3)] * n
            verified.clear()
            await ask(running, body(sampling_params={"max_new_tokens": 0}))
            assert verified == [(0, P - 1)]
