"""The router's side of a leg: the body it sends to a worker, and typed reading of what the worker answers.

A leg's reply is a sample's reply with one more key, `leg`: `{"rows": RowHeader | null, "timings": {...}}`. As msgpack
its rows are raw bytes; in the last event of a stream they are base64 of the same bytes ("auto"). Neighbours:
`generate` (parses these bodies on the worker), `replies` (writes these answers).
"""

import msgspec
from msgspec import Struct

from common.messages import Bootstrap, ErrorReport, FinishReason, RequestOptions, RowBlock, RowHeader
from common.protocol.generate import Sample


class LegExtras(Struct, frozen=True):
    """What only the router reads."""

    rows: RowHeader | None = None
    timings: dict[str, float] = {}


class LegMeta(Struct, frozen=True, kw_only=True):
    """The part of `meta_info` that the router uses."""

    prompt_tokens: int
    cached_tokens: int
    weight_version: str
    finish_reason: FinishReason
    output_token_logprobs: list[tuple[float, int, str | None]] | None = None
    # Shares the memory of the reply if that is msgpack; decoded from base64 if it is JSON.
    routed_experts: memoryview | None = None


class LegReply(Struct, frozen=True):
    """A worker's reply to a leg that has ended."""

    text: str
    output_ids: list[int]
    meta_info: LegMeta
    leg: LegExtras

    @property
    def rows(self) -> RowBlock | None:
        """The leg's rows, if it sent any; their bytes are still unchecked."""
        data, header = self.meta_info.routed_experts, self.leg.rows
        return None if data is None or header is None else RowBlock(header, data)

    @property
    def logprobs(self) -> list[float]:
        """The logprob of each output id; empty if not asked for."""
        return [logprob for logprob, _, _ in self.meta_info.output_token_logprobs or ()]


class _ErrorFields(Struct, frozen=True, kw_only=True):
    message: str
    code: str = "leg_failed"
    leg: str | None = None
    stage: str | None = None


class _ErrorBody(Struct, frozen=True):
    error: _ErrorFields


def encode_leg(sample: Sample, *, rid: str, bootstrap: Bootstrap | None, stream: bool) -> bytes:
    """Write the body of one leg; both legs of a pair have the same, but for `stream`.

    Rows are asked for in their smallest form whatever the client wants: the router makes the client's form after the
    merge.
    """
    options = sample.options
    body: dict[str, object] = {
        "rid": rid,
        "stream": stream,
        "sampling_params": _sampling_fields(options),
        "return_logprob": options.return_logprob,
        "return_routed_experts": options.return_routed_experts,
        "routed_experts_start_len": options.routed_experts_start_len,
        "routed_experts_dtype": "auto",
        sample.prompt_field: sample.text if sample.input_ids is None else sample.input_ids,
    }
    if bootstrap is not None:
        body |= {"bootstrap_host": bootstrap.host, "bootstrap_port": bootstrap.port, "bootstrap_room": bootstrap.room}
    return msgspec.json.encode(body)


def decode_leg(body: bytes) -> LegReply:
    """Read a leg's msgpack reply; ValueError if it is none. The result's rows borrow the memory of `body`."""
    return msgspec.msgpack.decode(body, type=LegReply)


def decode_last_event(data: bytes) -> LegReply:
    """Read the last event of a stream; ValueError if it is none."""
    return msgspec.json.decode(data, type=LegReply)


def decode_error(status: int, body: bytes) -> ErrorReport:
    """Read a worker's error body, or an event of the same form; what is no such body is quoted as it is."""
    try:
        error = msgspec.json.decode(body, type=_ErrorBody).error
    except ValueError:
        quoted = body[:200].decode("utf-8", "replace").strip() or "no body"
        return ErrorReport(status=status, message=f"HTTP {status}: {quoted}", code="leg_failed")
    return ErrorReport(status=status, message=error.message, code=error.code, leg=error.leg, stage=error.stage)


def _sampling_fields(options: RequestOptions) -> dict[str, object]:
    fields = msgspec.structs.asdict(options.sampling)
    fields["sampling_seed"] = fields.pop("seed")
    return fields
