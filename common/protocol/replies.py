"""Answers to POST /generate: the reply of one sample, the events of a stream, and errors; as JSON or msgpack.

It knows no rows: `common.routed_experts.codec.row_fields` makes their fields, and whoever answers passes them in.
Neighbours: `generate` (the requests), `logprobs` (the fields of logprobs), `legs` (how the router reads what a worker
wrote with this module).
"""

from collections.abc import Mapping, Sequence

import msgspec

from common.errors import RequestError
from common.messages import ErrorReport, Finished, RequestOptions, TopLogprobs, VersionSpan
from common.protocol.logprobs import TextOf, logprob_fields, output_logprob_fields

MSGPACK = "application/msgpack"
SSE_DONE = b"data: [DONE]\n\n"

Reply = dict[str, object]


def wants_msgpack(accept: str | None, *, stream: bool) -> bool:
    """Say whether the `Accept` header asks for msgpack; RequestError if a stream does."""
    asked = accept is not None and any(part.split(";")[0].strip().lower() == MSGPACK for part in accept.split(","))
    if asked and stream:
        raise RequestError("stream", f"a stream cannot be {MSGPACK}; ask for one or the other")
    return asked


def sample_reply(
    finished: Finished,
    *,
    text: str,
    options: RequestOptions,
    weight_version: str,
    e2e_latency_s: float,
    rows: Mapping[str, object] | None = None,
    logprobs: Mapping[str, object] | None = None,
    prompt_ids: Sequence[int] | None = None,
    is_leg: bool = False,
) -> Reply:
    """Build the reply of one sample that has ended.

    `rows` are the fields of `codec.row_fields`, and must be there exactly when the sample asked for rows; only an abort
    may have none. `logprobs` are the fields of `logprobs.logprob_fields`, by default those of `finished` without texts.
    `weight_version` is that of the worker now, for a sample without any position that was computed.
    `is_leg`, set by workers, adds what only the router reads: the rows' header, the timings, and the prompt's ids of a sample
    that is to go on, under the key `leg`.
    """
    is_complete = finished.finish_reason.type != "abort"
    assert rows is None or options.return_routed_experts, "rows belong to a reply only when they were asked for"
    assert rows is not None or not (options.return_routed_experts and is_complete), "the rows are missing"
    meta = _meta(finished.rid, finished.prompt_tokens, len(finished.token_ids))
    meta["finish_reason"] = finished.finish_reason
    meta |= {"cached_tokens": finished.cached_tokens, "e2e_latency": e2e_latency_s}
    meta |= version_fields(finished.weight_versions, weight_version)
    meta |= finished.timings
    if options.return_logprob:
        meta |= logprob_fields(finished, options) if logprobs is None else logprobs
    meta |= rows or {}
    reply: Reply = {"text": text, "output_ids": finished.token_ids, "meta_info": meta}
    if is_leg:
        reply["leg"] = {"rows": finished.rows, "timings": finished.timings, "prompt_ids": prompt_ids}
    return reply


def version_fields(spans: Sequence[VersionSpan], weight_version: str) -> Reply:
    """Make the fields that say which weights have computed a sample: all of them, and the last ones, or `weight_version`."""
    return {
        "weight_version": spans[-1].weight_version if spans else weight_version,
        "weight_versions": spans,
    }


def progress_reply(
    rid: str,
    *,
    text: str,
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    prompt_tokens: int,
    options: RequestOptions,
    top_logprobs: Sequence[TopLogprobs] = (),
    text_of: TextOf | None = None,
) -> Reply:
    """Build a stream's event for a sample that goes on; text, ids and logprobs are cumulative."""
    meta = _meta(rid, prompt_tokens, len(token_ids))
    if options.return_logprob:
        meta |= output_logprob_fields(token_ids, logprobs, top_logprobs, options, text_of)
    return {"text": text, "output_ids": token_ids, "meta_info": meta}


def encode_json(reply: Reply | Sequence[Reply]) -> bytes:
    """Write a reply, or a list of them, as JSON."""
    return msgspec.json.encode(reply)


def encode_msgpack(reply: Reply | Sequence[Reply]) -> bytes:
    """Write a reply, or a list of them, as msgpack; rows must be bytes."""
    return msgspec.msgpack.encode(reply)


def sse_event(reply: Mapping[str, object]) -> bytes:
    """Write one event of a stream."""
    return b"data: " + msgspec.json.encode(reply) + b"\n\n"


def error_fields(report: ErrorReport) -> Reply:
    """Build `{"error": {...}}`, a reply's body or a stream's event."""
    return {
        "error": {
            "message": report.message,
            "type": _error_type(report.status),
            "code": report.code,
            "leg": report.leg,
            "stage": report.stage,
            "rid": report.rid,
        }
    }


def error_body(report: ErrorReport) -> bytes:
    """Write the body of an error reply; its status is the report's."""
    return msgspec.json.encode(error_fields(report))


def _meta(rid: str, prompt_tokens: int, completion_tokens: int) -> Reply:
    return {
        "id": rid,
        "finish_reason": None,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
    }


def _error_type(status: int) -> str:
    match status:
        case 401:
            return "authentication_error"
        case 404:
            return "not_found_error"
        case 429:
            return "rate_limit_error"
        case _:
            return "invalid_request_error" if 400 <= status < 500 else "server_error"
