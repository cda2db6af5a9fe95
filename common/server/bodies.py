"""Bodies with rows in them, written in parts that are each quick to make (R16).

One base64 call on 50 MB of rows would hold the interpreter lock for 100 ms, and one copy of them into a msgpack body for
10 ms. So a reply is encoded with a mark in the place of each block of rows, and cut there. Bytes are written from where
they lie, and base64 may be there already as far as somebody has made it ahead. It knows no field but those of the rows.
Neighbours: `replies` and `openai_api` (build the replies), `common.routed_experts.codec` (the rows' forms).
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import islice

from aiohttp import web
from msgspec import Struct

from common.messages import RowBlock
from common.protocol.replies import MSGPACK, Reply
from common.routed_experts.codec import RowForm, base64_length, base64_slices, describe, num_full_slices, view
from common.server.writing import ClientWriter

# What is smaller is made in one go on the event loop.
_SMALL_BYTES = 256 * 2**10
_SLICE_BYTES = 2**17
# One trip to a thread for each part would cost more than the encoding.
_PARTS_PER_TRIP = 8
# So much is written before others have their turn, even if the client takes it at once.
_BYTES_PER_TURN = 2**20


class Body(Struct, frozen=True):
    """Encoded text around blocks of rows: `texts[0] blocks[0] texts[1] blocks[1] ... texts[-1]`."""

    texts: list[bytes]
    blocks: list["EncodedRows"]

    @property
    def num_bytes(self) -> int:
        """Length of all of it."""
        return sum(map(len, self.texts)) + sum(block.num_bytes for block in self.blocks)

    def parts(self) -> Iterator[bytes | memoryview]:
        """Make the parts, one after the other."""
        for text, block in zip(self.texts, self.blocks, strict=False):
            yield text
            yield from block.ready()
            yield from block.made()
        yield self.texts[-1]

    async def written(self) -> AsyncIterator[bytes | memoryview]:
        """Make the parts, off the event loop unless they are small or there already."""
        if self.num_bytes <= _SMALL_BYTES:
            yield b"".join(self.parts())
            return
        num_bytes = 0
        async for part in self._parts_off_loop():
            yield part
            num_bytes += len(part)
            if num_bytes >= _BYTES_PER_TURN:
                num_bytes = 0
                await asyncio.sleep(0)

    async def _parts_off_loop(self) -> AsyncIterator[bytes | memoryview]:
        for text, block in zip(self.texts, self.blocks, strict=False):
            yield text
            for part in block.ready():
                yield part
            if block.num_bytes_to_make <= _SMALL_BYTES:
                for part in block.made():
                    yield part
            else:
                async for batch in in_trips(block.made()):
                    for part in batch:
                        yield part
        yield self.texts[-1]


class EncodedRows(Struct, frozen=True):
    """One block in the form in which it goes out; as base64 without the quotes, as msgpack with the length before it."""

    block: RowBlock
    form: RowForm
    binary: bool
    lead: Sequence[bytes] = ()
    """The first slices of the base64, if somebody has made them before."""

    @property
    def num_bytes(self) -> int:
        """Length of what `ready` and `made` give in all."""
        header, data = self.block
        return len(_bin_header(len(data))) + len(data) if self.binary else base64_length(header, self.form)

    @property
    def num_bytes_to_make(self) -> int:
        """Length of what `made` gives."""
        return 0 if self.binary else self.num_bytes - sum(map(len, self.lead))

    def ready(self) -> Iterator[bytes | memoryview]:
        """Give the parts that cost nothing, which are the first; they borrow the block's memory."""
        if not self.binary:
            yield from self.lead
            return
        data = memoryview(self.block.data)
        yield _bin_header(len(data))
        for lo in range(0, len(data), _SLICE_BYTES):
            yield data[lo : lo + _SLICE_BYTES]

    def made(self) -> Iterator[bytes]:
        """Make the other parts, one after the other."""
        if not self.binary:
            yield from base64_slices(self.block, self.form, first=len(self.lead))


class BodyWriter:
    """Makes one body: `rows` gives the fields of each block, in the order in which they will stand in it; `body` the whole.

    `binary` rows are msgpack's; others are base64 in JSON.
    """

    def __init__(self, *, binary: bool = False) -> None:
        self._binary = binary
        # No client can guess the mark, and so put it into a text. Its hexadecimal digits are the same bytes in JSON.
        self._mark = secrets.token_hex(16)
        self._blocks: list[EncodedRows] = []

    def rows(self, block: RowBlock, form: RowForm, lead: Sequence[bytes] = ()) -> Reply:
        """Give a reply's `routed_experts` fields, for now with a mark instead of the rows. Raises RowsMismatch.

        `lead` are the first slices of the block's base64 in `form`, as many as there are already.
        """
        view(block)  # checks the length of the data, while an error can still be answered
        form = "auto" if self._binary else form
        lead = () if self._binary else lead[: num_full_slices(block.header, form)]
        self._blocks.append(EncodedRows(block, form, self._binary, lead))
        mark = self._mark.encode() if self._binary else self._mark
        return {"routed_experts": mark, **describe(block.header, form)}

    def body(self, encoded: bytes) -> Body:
        """Cut what was encoded of the replies, as JSON or as msgpack, where rows belong."""
        mark = self._mark.encode()
        texts = encoded.split(_bin_header(len(mark)) + mark if self._binary else mark)
        assert len(texts) == len(self._blocks) + 1
        return Body(texts, self._blocks)


async def send_body(request: web.Request, body: Body, *, binary: bool) -> web.StreamResponse:
    """Answer with a body, a large one part by part."""
    content_type = MSGPACK if binary else "application/json"
    response = web.StreamResponse()
    response.content_type = content_type
    response.content_length = body.num_bytes
    writer = ClientWriter(request, response)
    async for part in body.written():
        await writer.write(part)
    await writer.end()
    return response


async def in_trips(parts: Iterator[bytes]) -> AsyncIterator[list[bytes]]:
    """Make parts in a thread, some at a time: between them the thread rests, and lets the event loop have its turn."""
    while batch := await asyncio.to_thread(lambda: list(islice(parts, _PARTS_PER_TRIP))):
        yield batch


def _bin_header(num_bytes: int) -> bytes:
    """Write what stands before that many bytes in msgpack."""
    if num_bytes < 2**8:
        return b"\xc4" + num_bytes.to_bytes(1, "big")
    if num_bytes < 2**16:
        return b"\xc5" + num_bytes.to_bytes(2, "big")
    return b"\xc6" + num_bytes.to_bytes(4, "big")
