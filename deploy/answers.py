"""What /generate answers, as it comes over the wire: replies, events of a stream, error bodies; and their rows as an array.

Either form of a reply is read into the same structs: msgpack with the rows as bytes, JSON with the rows as base64. The
numpy part, which makes rows of bytes, shares no code with the server on purpose: a mistake made there is not repeated here.

Shape letters: R positions, L entries of the layer axis, K top-k. Neighbours: `deploy.client` (receives these),
`deploy.replies` (one reply, read strictly), `deploy.replay.check` (whether the rows are possible ones).
"""

import math
from typing import Any, Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from common.errors import TandemError
from common.messages import ErrorReport, FinishReason, VersionSpan
from common.protocol.replies import MSGPACK

Ids = npt.NDArray[Any]
ReplyForm = Literal["msgpack", "int32"]
"""msgpack with compact rows, or JSON with int32 rows as base64, which is what a client gets that asks for nothing."""
ROW_DTYPES: Final = ("uint8", "uint16", "int32")
_QUOTED_CHARS: Final = 300


class MalformedReplyError(TandemError, ValueError):
    """A reply that cannot be read, or whose parts contradict each other or what was asked for."""


class MalformedRowsError(MalformedReplyError):
    """The reply's rows and what it says about them do not fit together."""


class MetaInfo(Struct, frozen=True, kw_only=True):
    """The part of a reply's meta_info that is looked at."""

    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    weight_versions: tuple[VersionSpan, ...] = ()
    routed_experts: bytes | None = None
    routed_experts_start_len: int = 0
    routed_experts_shape: tuple[int, int, int] | None = None
    routed_experts_dtype: str | None = None
    routed_experts_layer_ids: list[int] | None = None
    routed_experts_moe_layer_ids: list[int] | None = None


class WireReply(Struct, frozen=True):
    """One sample's reply, or its last event in a stream. `index` is there in streams."""

    text: str
    output_ids: list[int]
    meta_info: MetaInfo
    index: int = 0


class Progress(Struct, frozen=True):
    """A stream's event for a sample that goes on: text and tokens so far."""

    index: int = 0
    text: str = ""
    output_ids: list[int] = []


class Answer(Struct, frozen=True):
    """A whole body with a good status, and its media type."""

    content: bytes
    content_type: str


class _EventMeta(Struct, frozen=True):
    finish_reason: FinishReason | None = None


class _EventKind(Struct, frozen=True):
    """The part of an event that tells of what kind it is."""

    meta_info: _EventMeta


# ------------------------------------------------------------------------------------------------ bodies


def accept_of(form: ReplyForm) -> str:
    """The media type to ask for."""
    return MSGPACK if form == "msgpack" else "application/json"


def decode_replies(answer: Answer, *, is_list: bool = False) -> list[WireReply]:
    """Read the reply of one sample, or the list of those of several. Raises MalformedReplyError."""
    decode = msgspec.msgpack.decode if answer.content_type == MSGPACK else msgspec.json.decode
    try:
        return decode(answer.content, type=list[WireReply]) if is_list else [decode(answer.content, type=WireReply)]
    except msgspec.DecodeError as error:
        raise MalformedReplyError(f"the reply cannot be read: {error}") from error


def decode_object(answer: Answer) -> Any:
    """Read a body of whatever form into plain objects. Raises MalformedReplyError."""
    decode = msgspec.msgpack.decode if answer.content_type == MSGPACK else msgspec.json.decode
    try:
        return decode(answer.content)
    except msgspec.DecodeError as error:
        raise MalformedReplyError(f"the reply cannot be read: {error}") from error


def as_reply(body: object) -> WireReply:
    """Type one reply that `decode_object` has read; its rows are not copied, but base64 is undone."""
    try:
        return msgspec.convert(body, WireReply)
    except msgspec.ValidationError as error:
        raise MalformedReplyError(f"the reply cannot be read: {error}") from error


def as_event(body: object) -> Progress | WireReply:
    """Type one event of a stream: a sample's progress, or its end. Raises MalformedReplyError."""
    try:
        kind = msgspec.convert(body, _EventKind)
        if kind.meta_info.finish_reason is None:
            return msgspec.convert(body, Progress)
        return msgspec.convert(body, WireReply)
    except msgspec.ValidationError as error:
        raise MalformedReplyError(f"an event cannot be read: {error}") from error


def read_error(status: int, content: bytes) -> ErrorReport:
    """Read an error's body, or an event of the same form; any other is quoted, with the code `unreadable`."""
    try:
        fields = msgspec.json.decode(content)["error"]
        return msgspec.convert({"code": "", **fields, "status": status}, ErrorReport)
    except (msgspec.DecodeError, KeyError, TypeError):
        quoted = content[:_QUOTED_CHARS].decode(errors="replace") or "no body"
        return ErrorReport(status=status, message=quoted, code="unreadable")


# ------------------------------------------------------------------------------------------------ rows


def read_rows(meta: MetaInfo) -> Ids | None:
    """The reply's ids as `[R, L, K]`, None if there are none; raises MalformedRowsError. They share the reply's memory."""
    if meta.routed_experts is None:
        return None
    shape, dtype = meta.routed_experts_shape, meta.routed_experts_dtype
    if shape is None or dtype not in ROW_DTYPES:
        raise MalformedRowsError(f"rows of shape {shape} and dtype {dtype}")
    expected_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if min(shape) < 0 or len(meta.routed_experts) != expected_bytes:
        raise MalformedRowsError(f"{len(meta.routed_experts)} bytes of rows, {expected_bytes} for shape {list(shape)}")
    return np.frombuffer(meta.routed_experts, np.dtype(dtype).newbyteorder("<")).reshape(shape)


def moe_layers_of(meta: MetaInfo, num_layers: int) -> npt.NDArray[np.bool_]:
    """Which entries of the layer axis are MoE layers, `[L]`; raises MalformedRowsError if the reply leaves it open."""
    layer_ids, moe_layer_ids = meta.routed_experts_layer_ids, meta.routed_experts_moe_layer_ids
    if layer_ids is None or moe_layer_ids is None or len(layer_ids) != num_layers:
        raise MalformedRowsError(f"layer ids {layer_ids} for {num_layers} layers")
    if len(set(layer_ids)) != len(layer_ids) or not set(moe_layer_ids) <= set(layer_ids):
        raise MalformedRowsError(f"layer ids {layer_ids} do not hold the MoE layers {moe_layer_ids} once each")
    return np.isin(layer_ids, moe_layer_ids)


def num_expected_rows(prompt_tokens: int, output_tokens: int, start_len: int) -> int:
    """P+G-1-s, floor 0: the last sampled token never enters a forward pass."""
    return max(0, prompt_tokens + output_tokens - 1 - start_len)
