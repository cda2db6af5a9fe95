"""Which worker last got which prefix of a prompt: a bounded guess at whose prefix cache holds it.

A prompt is cut into chunks of a fixed size, and each prefix of whole chunks has a digest, made from that of the prefix
before it: equal digests mean equal prefixes. Neighbour: `policy`.
"""

from array import array
from collections import OrderedDict
from collections.abc import Container, Sequence
from hashlib import blake2b
from typing import Final

import msgspec

from common.protocol.generate import Sample

CHUNK_TOKENS: Final = 64
CHUNK_CHARS: Final = 256
_MAX_CHUNKS: Final = 1024
"""What comes after so many chunks of a prompt is not looked at: this runs on the router's event loop."""


def prefixes_of(sample: Sample) -> list[bytes]:
    """Make the digests of a prompt's prefixes, shortest first. A prompt shorter than a chunk has none."""
    if sample.input_ids is not None:
        tokens = array("q", sample.input_ids[: _MAX_CHUNKS * CHUNK_TOKENS])
        return _digests(b"ids", tokens.tobytes(), CHUNK_TOKENS * tokens.itemsize)
    text = msgspec.json.encode(sample.messages).decode() if sample.text is None else sample.text
    # UTF-32 has all characters of one size; half a surrogate pair is a character too.
    encoded = text[: _MAX_CHUNKS * CHUNK_CHARS].encode("utf-32-le", errors="surrogatepass")
    return _digests(sample.prompt_field.encode(), encoded, CHUNK_CHARS * 4)


def _digests(kind: bytes, data: bytes, chunk_bytes: int) -> list[bytes]:
    digest, digests = kind, list[bytes]()
    for start in range(0, len(data) - chunk_bytes + 1, chunk_bytes):
        digest = blake2b(digest + data[start : start + chunk_bytes], digest_size=16).digest()
        digests.append(digest)
    return digests


class Prefixes:
    """The last worker of each prefix, by its URL; what was not seen for the longest time is forgotten first."""

    def __init__(self, max_prefixes: int) -> None:
        self._max_prefixes = max_prefixes
        self._urls: OrderedDict[bytes, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._urls)

    def find(self, prefixes: Sequence[bytes], urls: Container[str]) -> str | None:
        """Find which of `urls` last got the longest of these prefixes; None if none has."""
        known = (self._urls.get(prefix) for prefix in reversed(prefixes))
        return next((url for url in known if url is not None and url in urls), None)

    def note(self, prefixes: Sequence[bytes], url: str) -> None:
        """Note who gets them. Longer ones are older: they are of no use without the shorter ones."""
        for prefix in reversed(prefixes):
            self._urls[prefix] = url
            self._urls.move_to_end(prefix)
        while len(self._urls) > self._max_prefixes:
            self._urls.popitem(last=False)
