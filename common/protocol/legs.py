"""The router's side of a leg: the body it sends to a worker, and typed reading of what the worker answers.

One prompt has one pair of legs, however many samples were asked for. The prefill leg answers with one reply, whose output
ids are the first token of each sample; the decode leg with a list of one reply for each sample if there is more than one, or
with a stream whose events have the sample's `index`.
An aggregated worker, which has no other leg beside it, is asked and answers as a decode leg, without a room.

A leg's reply is a sample's reply with one more key, `leg`: `{"rows": RowHeader | null, "timings": {...}, "prompt_ids": [...]
| null}`. As msgpack its rows are raw bytes; in the last event of a stream they are base64 of the same bytes ("auto"). Of a leg
that resumes tokens (`resumed_tokens`) the text begins with theirs; ids, logprobs and rows are the new tokens' alone. Neighbours:
`generate` (parses these bodies on the worker), `replies` (writes these answers).
"""

import base64
import re
from collections.abc import Callable
from typing import Annotated, Final, TypeVar

import msgspec
from msgspec import Meta, Struct

from common.messages import Bootstrap, ErrorReport, FinishReason, Leg, RequestOptions, RowBlock, RowHeader, VersionSpan
from common.protocol.generate import Sample
from common.protocol.logprobs import LogprobItem

Reading = TypeVar("Reading")

# Numbers of another size were never counted by a worker, and would not fit into the reply to the client.
Count = Annotated[int, Meta(ge=0, lt=2**31)]
TopLogprobItems = list[list[LogprobItem] | None]

# Base64 of this many characters is decoded at a time: one call on many megabytes would hold the interpreter lock (R16).
_SLICE_CHARS: Final = 4 * 48 * 2**10
# No string of a JSON document can hold these bytes: its quotes would be escaped.
_ROWS_KEY: Final = re.compile(rb'"routed_experts":\s*"')


class LegExtras(Struct, frozen=True):
    """What only the router reads."""

    rows: RowHeader | None = None
    timings: dict[str, float] = {}
    prompt_ids: list[Count] | None = None
    """Of a decode or aggregated leg that was retracted and has tokens: what its sample goes on from, before them."""


class LegMeta(Struct, frozen=True, kw_only=True):
    """The part of `meta_info` that the router uses."""

    prompt_tokens: Count
    cached_tokens: Count
    weight_version: str
    weight_versions: tuple[VersionSpan, ...] = ()
    finish_reason: FinishReason
    input_token_logprobs: list[LogprobItem] | None = None
    input_top_logprobs: TopLogprobItems | None = None
    output_token_logprobs: list[LogprobItem] | None = None
    output_top_logprobs: TopLogprobItems | None = None
    # Shares the memory of the reply if that is msgpack; decoded from base64 if it is JSON.
    routed_experts: memoryview | None = None


class LegReply(Struct, frozen=True):
    """A worker's reply to a leg that has ended."""

    text: str
    output_ids: list[Count]
    meta_info: LegMeta
    leg: LegExtras
    index: Count = 0

    @property
    def is_aborted(self) -> bool:
        """Say whether the leg was ended because somebody asked for it."""
        return self.meta_info.finish_reason.is_requested

    @property
    def is_retracted(self) -> bool:
        """Say whether the leg was ended to go on later."""
        return self.meta_info.finish_reason.is_retracted

    @property
    def is_unfinished(self) -> bool:
        """Say whether the leg was ended, to go on or not, before it had a token."""
        return (self.is_aborted or self.is_retracted) and not self.output_ids

    @property
    def rows(self) -> RowBlock | None:
        """The leg's rows, if it sent any; their bytes are still unchecked."""
        data, header = self.meta_info.routed_experts, self.leg.rows
        return None if data is None or header is None else RowBlock(header, data)


class _ErrorFields(Struct, frozen=True, kw_only=True):
    message: str
    code: str = "leg_failed"
    leg: str | None = None
    stage: str | None = None


class _ErrorBody(Struct, frozen=True):
    error: _ErrorFields


_REPLY_MSGPACK: Final = msgspec.msgpack.Decoder(LegReply)
_REPLIES_MSGPACK: Final = msgspec.msgpack.Decoder(LegReply | list[LegReply])
_REPLY_JSON: Final = msgspec.json.Decoder(LegReply)
_ERROR_JSON: Final = msgspec.json.Decoder(_ErrorBody)


def encode_leg(sample: Sample, leg: Leg | None, *, rid: str, bootstrap: Bootstrap | None, stream: bool) -> bytes:
    """Write the body of one leg; None: of a whole request, for an aggregated worker.

    Rows are asked for in their smallest form whatever the client wants: the router makes the client's form after the
    merge. The group that the client named is one of whoever generates; on a prefill worker the room says which.
    """
    options = sample.options
    body: dict[str, object] = {
        "rid": rid,
        "stream": stream,
        "sampling_params": _sampling_fields(options),
        "return_logprob": options.return_logprob,
        "logprob_start_len": options.logprob_start_len,
        "top_logprobs_num": options.top_logprobs_num,
        "return_text_in_logprobs": options.return_text_in_logprobs,
        "return_routed_experts": options.return_routed_experts,
        "routed_experts_start_len": options.routed_experts_start_len,
        "routed_experts_dtype": "auto",
        "allow_mixed_versions": options.allow_mixed_versions,
        "resumed_tokens": options.resumed_tokens,
        "resumed_versions": options.resumed_versions,
        **_prompt_fields(sample),
    }
    if leg != "prefill":
        body["data_parallel_rank"] = options.data_parallel_rank
    if bootstrap is not None:
        rooms = bootstrap.rooms
        body |= {
            "bootstrap_host": bootstrap.host,
            "bootstrap_port": bootstrap.port,
            "bootstrap_room": rooms[0] if len(rooms) == 1 else rooms,
        }
    return msgspec.json.encode(body)


def decode_leg(body: bytes) -> LegReply:
    """Read a leg's one msgpack reply; ValueError if it is none. The result's rows borrow the memory of `body`."""
    return _decoded(_REPLY_MSGPACK.decode, body)


def decode_samples(body: bytes | bytearray) -> list[LegReply]:
    """Read a decode leg's msgpack reply, one for each sample; ValueError and memory as for `decode_leg`."""
    replies: LegReply | list[LegReply] = _decoded(_REPLIES_MSGPACK.decode, body)
    return replies if isinstance(replies, list) else [replies]


def decode_last_event(data: bytes | bytearray) -> LegReply:
    """Read a sample's last event in a stream; ValueError if it is none. It may take long, but lets other threads run."""
    found = _ROWS_KEY.search(data)
    if found is None or len(data) < _SLICE_CHARS:
        return _decoded(_REPLY_JSON.decode, data)
    begin, end = found.end(), data.find(b'"', found.end())
    reply = _decoded(_REPLY_JSON.decode, data[:begin] + data[end:])
    encoded = memoryview(data)[begin:end]
    slices = range(0, len(encoded), _SLICE_CHARS)
    rows = b"".join([base64.b64decode(encoded[lo : lo + _SLICE_CHARS], validate=True) for lo in slices])
    meta = msgspec.structs.replace(reply.meta_info, routed_experts=memoryview(rows))
    return msgspec.structs.replace(reply, meta_info=meta)


def decode_error(status: int, body: bytes | bytearray) -> ErrorReport:
    """Read a worker's error body, or an event of the same form; what is no such body is quoted as it is."""
    try:
        error = _decoded(_ERROR_JSON.decode, body).error
    except ValueError:
        quoted = body[:200].decode("utf-8", "replace").strip() or "no body"
        return ErrorReport(status=status, message=f"HTTP {status}: {quoted}", code="leg_failed")
    return ErrorReport(status=status, message=error.message, code=error.code, leg=error.leg, stage=error.stage)


def _decoded(decode: Callable[[bytes | bytearray], Reading], data: bytes | bytearray) -> Reading:
    """Decode; what is nested without an end is a ValueError like everything else that cannot be read."""
    try:
        return decode(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _prompt_fields(sample: Sample) -> dict[str, object]:
    if sample.messages is not None:
        return {"messages": sample.messages, "chat_template_kwargs": sample.chat_template_kwargs}
    return {sample.prompt_field: sample.text if sample.input_ids is None else sample.input_ids}


def _sampling_fields(options: RequestOptions) -> dict[str, object]:
    fields = msgspec.structs.asdict(options.sampling)
    fields["sampling_seed"] = fields.pop("seed")
    return fields
