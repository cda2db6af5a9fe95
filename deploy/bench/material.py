"""What the benchmarks are made of: rows of 48 layers and 8 of 128 experts, and the replies of workers that answer with them.

It measures nothing. Neighbours: `stub_workers` (serves these replies), `start_len` and `reply_format` (use the rows).
"""

from typing import Final, Literal

import numpy as np
from msgspec import Struct

from common.messages import Finished, FinishReason, Leg, RequestOptions, RowBlock
from common.protocol.replies import SSE_DONE, Reply, encode_json, encode_msgpack, sample_reply, sse_event
from common.routed_experts.codec import RowForm, Rows, block_of, row_fields
from common.routed_experts.spec import RowSpec
from common.versions import whole

SPEC: Final = RowSpec(num_experts=128, top_k=8, layer_ids=tuple(range(48)), num_hidden_layers=48)
LONG_TOKENS: Final = 32768
WEIGHT_VERSION: Final = "bench"

LegForm = Literal["msgpack", "json", "stream"]


def make_rows(num_rows: int, spec: RowSpec = SPEC) -> Rows:
    """Make good rows `[num_rows, L, K]`, no two neighbours alike; the same ones every time."""
    first = np.random.default_rng(0).integers(spec.num_experts, size=(num_rows, spec.num_layers, 1), dtype=np.uint16)
    # An odd step meets no expert twice where their number is a power of two.
    return ((first + 5 * np.arange(spec.top_k, dtype=np.uint16)) % spec.num_experts).astype(spec.numpy_dtype)


def make_block(start: int, stop: int) -> RowBlock:
    """Make the block of positions `[start, stop)`."""
    header = SPEC.header(start=start, stop=stop, weight_versions=whole(start, stop, WEIGHT_VERSION))
    return block_of(header, make_rows(stop - start))


class Exchange(Struct, frozen=True):
    """What a pair of workers answers: P prompt tokens, G output tokens, and all P+G-1 rows if they are asked for."""

    prompt_tokens: int
    output_tokens: int

    def leg_body(self, leg: Leg, form: LegForm, *, rows: bool) -> bytes:
        """Write the body of one leg's reply: rows are bytes in msgpack, int32 in JSON, and compact in a stream."""
        block = make_block(*self._positions(leg)) if rows else None
        if form == "msgpack":
            return encode_msgpack(self._reply(leg, block, "auto", binary=True))
        if form == "json":
            return encode_json(self._reply(leg, block, "int32", binary=False))
        return sse_event(self._reply(leg, block, "auto", binary=False)) + SSE_DONE

    def _positions(self, leg: Leg) -> tuple[int, int]:
        handover = self.prompt_tokens
        return (0, handover) if leg == "prefill" else (handover, handover + self.output_tokens - 1)

    def _reply(self, leg: Leg, block: RowBlock | None, form: RowForm, *, binary: bool) -> Reply:
        finished = Finished(
            rid="bench",
            prompt_tokens=self.prompt_tokens,
            cached_tokens=0,
            token_ids=list(range(100, 100 + (1 if leg == "prefill" else self.output_tokens))),
            logprobs=[],
            finish_reason=FinishReason(type="length", length=self.output_tokens),
            rows=None if block is None else block.header,
            weight_versions=whole(*self._positions(leg), WEIGHT_VERSION),
        )
        return sample_reply(
            finished,
            text="" if leg == "prefill" else "some words" * self.output_tokens,
            options=RequestOptions(return_routed_experts=block is not None),
            weight_version=WEIGHT_VERSION,
            e2e_latency_s=0.0,
            rows=None if block is None else row_fields(block, form, binary=binary),
            is_leg=True,
        )
