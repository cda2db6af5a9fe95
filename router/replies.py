"""Answers on their way to the client: the contract's reply, in JSON or msgpack, with the rows written in slices.

One base64 call on 50 MB of rows would hold the interpreter lock for 100 ms, so a body is made of parts that are each
quick to make (R16). Neighbours: `app` (sends these), `common.protocol.replies` (the fields),
`common.routed_experts.codec` (the rows' forms).
"""

import asyncio
import secrets
from collections.abc import Iterator, Sequence
from itertools import islice

from aiohttp import web
from msgspec import Struct

from common.messages import RowBlock
from common.protocol.generate import Sample
from common.protocol.replies import Reply, encode_json, encode_msgpack, sample_reply
from common.routed_experts.codec import RowForm, base64_length, base64_slices, describe, row_fields
from router.combine import Answer

# A body below this is made in one go on the event loop.
_SMALL_BODY_BYTES = 2**20
_PARTS_PER_TRIP = 8


class _JsonBody(Struct, frozen=True):
    """JSON around the base64 of some blocks: `texts[0] blocks[0] texts[1] blocks[1] ... texts[-1]`."""

    texts: list[bytes]
    blocks: list[tuple[RowBlock, RowForm]]

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self.texts)) + sum(base64_length(block.header, form) for block, form in self.blocks)

    def parts(self) -> Iterator[bytes]:
        for text, (block, form) in zip(self.texts, self.blocks, strict=False):
            yield text
            yield from base64_slices(block, form)
        yield self.texts[-1]


def answer_reply(sample: Sample, answer: Answer, e2e_latency_s: float) -> Reply:
    """Build one sample's reply for JSON, its rows as base64; for small rows and for the last event of a stream."""
    form = sample.options.routed_experts_dtype
    rows = None if answer.rows is None else row_fields(answer.rows, form, binary=False)
    return _reply(sample, answer, e2e_latency_s, rows)


def msgpack_body(samples: Sequence[Sample], answers: Sequence[Answer], *, is_list: bool, e2e_latency_s: float) -> bytes:
    """Write the whole body as msgpack, rows as raw bytes."""
    replies = [
        _reply(sample, answer, e2e_latency_s, answer.rows and row_fields(answer.rows, "auto", binary=True))
        for sample, answer in zip(samples, answers, strict=True)
    ]
    return encode_msgpack(replies if is_list else replies[0])


async def send_json(
    request: web.Request, samples: Sequence[Sample], answers: Sequence[Answer], *, is_list: bool, e2e_latency_s: float
) -> web.StreamResponse:
    """Send the reply as JSON; a large one is encoded in a thread and written slice by slice."""
    body = _json_body(samples, answers, is_list=is_list, e2e_latency_s=e2e_latency_s)
    if body.num_bytes <= _SMALL_BODY_BYTES:
        return web.Response(body=b"".join(body.parts()), content_type="application/json")
    response = web.StreamResponse()
    response.content_type = "application/json"
    response.content_length = body.num_bytes
    await response.prepare(request)
    parts = body.parts()
    while batch := await asyncio.to_thread(_take, parts):
        for part in batch:
            await response.write(part)
    await response.write_eof()
    return response


def _take(parts: Iterator[bytes]) -> list[bytes]:
    """Take the next few parts: one trip to a thread for each would cost more than the encoding."""
    return list(islice(parts, _PARTS_PER_TRIP))


def _json_body(
    samples: Sequence[Sample], answers: Sequence[Answer], *, is_list: bool, e2e_latency_s: float
) -> _JsonBody:
    # The rows' place is held by a string that no client can guess, and so cannot put into the text.
    place = secrets.token_hex(16)
    replies: list[Reply] = []
    blocks: list[tuple[RowBlock, RowForm]] = []
    for sample, answer in zip(samples, answers, strict=True):
        rows = None
        if answer.rows is not None:
            form = sample.options.routed_experts_dtype
            rows = {"routed_experts": place, **describe(answer.rows.header, form)}
            blocks.append((answer.rows, form))
        replies.append(_reply(sample, answer, e2e_latency_s, rows))
    texts = encode_json(replies if is_list else replies[0]).split(place.encode())
    assert len(texts) == len(blocks) + 1
    return _JsonBody(texts, blocks)


def _reply(sample: Sample, answer: Answer, e2e_latency_s: float, rows: Reply | None) -> Reply:
    return sample_reply(
        answer.finished,
        text=answer.text,
        options=sample.options,
        weight_version=answer.weight_version,
        e2e_latency_s=e2e_latency_s,
        rows=rows,
    )
