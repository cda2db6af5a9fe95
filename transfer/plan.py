"""Which pages a chunk of a prompt completes, and how a write is named; pure, for both ends of a transfer."""

import struct
from typing import NamedTuple

from common.memory.layout import num_pages_for

_TAG = struct.Struct("<QII")
MAX_GENERATION = 2**32 - 1


class WriteTag(NamedTuple):
    """Names one write: its room, the room's generation, and its place among the room's writes, from 0."""

    room: int
    generation: int
    serial: int

    def encode(self) -> bytes:
        """16 bytes, carried by the write's notification."""
        return _TAG.pack(*self)

    @classmethod
    def decode(cls, data: bytes) -> "WriteTag | None":
        """None if these are not the bytes of a tag."""
        return cls(*_TAG.unpack(data)) if len(data) == _TAG.size else None


def complete_pages(computed_tokens: int, prompt_tokens: int, page_size: int) -> int:
    """How many of a prompt's pages will not change any more: the full ones, and the last one once the prompt is done."""
    if computed_tokens >= prompt_tokens:
        return num_pages_for(prompt_tokens, page_size)
    return computed_tokens // page_size
