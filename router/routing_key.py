"""The routing key of a request: a header that sends all requests with the same one to the same workers.

Neighbours: `generate_api` and `openai_api` (call this), `policy` (hashes it).
"""

from collections.abc import Mapping
from typing import Final

from msgspec.structs import replace

from common.errors import RequestError
from common.protocol.generate import GenerateCall

_HEADERS: Final = ("X-SMG-Routing-Key", "x-session-id")
_MAX_KEY_CHARS: Final = 512


def keyed(call: GenerateCall, headers: Mapping[str, str]) -> GenerateCall:
    """Give a request's samples its routing key, that of the first header which is there. Raises RequestError."""
    for name in _HEADERS:
        if key := headers.get(name):
            if len(key) > _MAX_KEY_CHARS:
                raise RequestError(name, f"has {len(key)} characters, more than {_MAX_KEY_CHARS}")
            return replace(call, samples=tuple(replace(sample, routing_key=key) for sample in call.samples))
    return call
