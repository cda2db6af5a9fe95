"""Answers on their way to the client, in the form of POST /generate: replies, lists of them, and a stream's events.

Neighbours: `generate_api` (sends these), `bodies` (the rows in them), `combine` (where the answers come from).
"""

from collections.abc import Sequence

import msgspec

from common.messages import ErrorReport
from common.protocol.generate import Sample
from common.protocol.replies import Reply, encode_json, encode_msgpack, error_fields, sse_event, version_fields
from common.server.bodies import Body, BodyWriter
from router.combine import Answer


def sample_meta(sample: Sample, answer: Answer, e2e_latency_s: float, writer: BodyWriter) -> Reply:
    """Build one sample's `meta_info`; its rows are `writer`'s."""
    meta: Reply = {
        "id": answer.rid,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": len(answer.output_ids),
        "cached_tokens": answer.cached_tokens,
        **version_fields(answer.weight_versions, answer.weight_version),
        "e2e_latency": e2e_latency_s,
        **msgspec.to_builtins(answer.logprobs),
        **answer.timings,
    }
    if answer.rows is not None:
        meta |= writer.rows(answer.rows, sample.options.routed_experts_dtype, answer.lead)
    return meta


def generate_body(
    answers: Sequence[tuple[Sample, Answer]], *, is_list: bool, as_msgpack: bool, e2e_latency_s: float
) -> Body:
    """Write the reply to a request that does not stream."""
    writer = BodyWriter(binary=as_msgpack)
    replies = [_reply(sample, answer, e2e_latency_s, writer) for sample, answer in answers]
    encode = encode_msgpack if as_msgpack else encode_json
    return writer.body(encode(replies if is_list else replies[0]))


class GenerateEvents:
    """The events of a stream. They have an `index` if the answer is a list."""

    def __init__(self, *, is_list: bool) -> None:
        self._is_list = is_list

    def progress(self, index: int, event: Reply) -> bytes:
        """Write the event of a sample that goes on."""
        return sse_event(self._indexed(event, index))

    def last(self, index: int, sample: Sample, answer: Answer, e2e_latency_s: float) -> Body:
        """Write a sample's last event."""
        writer = BodyWriter()
        return writer.body(sse_event(self._indexed(_reply(sample, answer, e2e_latency_s, writer), index)))

    def error(self, report: ErrorReport) -> bytes:
        """Write the event that ends a stream that failed."""
        return sse_event(error_fields(report))

    def _indexed(self, event: Reply, index: int) -> Reply:
        return {**event, "index": index} if self._is_list else event


def _reply(sample: Sample, answer: Answer, e2e_latency_s: float, writer: BodyWriter) -> Reply:
    meta = sample_meta(sample, answer, e2e_latency_s, writer)
    return {"text": answer.text, "output_ids": answer.output_ids, "meta_info": meta}
