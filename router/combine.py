"""One answer out of the replies of a sample's legs: who says what, and whose rows go where.

The prefill leg knows the prompt (tokens, cached tokens), the decode leg the output; rows come from both and are
merged. It knows no HTTP. Neighbours: `pair` (runs the legs), `merge`, `common.routed_experts.verify`.
"""

import asyncio

from msgspec import Struct

from common.errors import LegFailed, MissingRows
from common.messages import Finished, Leg, RowBlock
from common.protocol.generate import Sample
from common.protocol.legs import LegReply
from common.routed_experts.verify import verify
from router.merge import merge

# Merging and verifying more than this would keep the event loop from its other requests for too long (R16).
_LARGE_ROWS_BYTES = 2**20


class Answer(Struct, frozen=True):
    """A sample's end as the router tells it: positions, tokens and rows of the whole sequence."""

    finished: Finished
    text: str
    weight_version: str
    rows: RowBlock | None


async def combine_pair(sample: Sample, prefill: LegReply, decode: LegReply, *, verify_rows: bool) -> Answer:
    """Join both legs' replies.

    Raises LegFailed if the legs answer different prompts, RowsError if rows are missing, bad or do not fit together.
    """
    _check_agreement(prefill, decode)
    prompt_tokens, output_ids = prefill.meta_info.prompt_tokens, decode.output_ids
    rows = None
    if sample.options.return_routed_experts:
        start = sample.options.routed_experts_start_len
        stop = max(start, prompt_tokens + len(output_ids) - 1)
        blocks = [_rows_of("prefill", prefill), _rows_of("decode", decode)]
        rows = await _merged(blocks, start=start, stop=stop, verify_rows=verify_rows)
    return _answer(sample, prefill, decode, rows)


async def combine_score(sample: Sample, prefill: LegReply, *, verify_rows: bool) -> Answer:
    """Make the answer of a prompt that was only scored: no output, and rows up to P-1. Raises RowsError."""
    rows = None
    if sample.options.return_routed_experts:
        start = sample.options.routed_experts_start_len
        stop = max(start, prefill.meta_info.prompt_tokens - 1)
        rows = await _merged([_rows_of("prefill", prefill)], start=start, stop=stop, verify_rows=verify_rows)
    return _answer(sample, prefill, prefill, rows)


def _check_agreement(prefill: LegReply, decode: LegReply) -> None:
    ours, theirs = prefill.meta_info.prompt_tokens, decode.meta_info.prompt_tokens
    if ours != theirs:
        raise LegFailed(f"the legs disagree: {ours} prompt tokens in prefill, {theirs} in decode", stage="merge")
    # The first token is the prefill leg's; another one means that these are the legs of two samples.
    if prefill.output_ids[:1] != decode.output_ids[:1]:
        raise LegFailed(
            f"the legs disagree on the first token: {prefill.output_ids[:1]} and {decode.output_ids[:1]}",
            stage="merge",
        )


def _rows_of(leg: Leg, reply: LegReply) -> RowBlock:
    if reply.rows is None:
        raise MissingRows(f"the {leg} leg sent no routed-expert rows", leg=leg, stage="merge")
    return reply.rows


async def _merged(blocks: list[RowBlock], *, start: int, stop: int, verify_rows: bool) -> RowBlock:
    def run() -> RowBlock:
        block = merge(blocks, start=start, stop=stop)
        if verify_rows:
            verify(block)
        return block

    if sum(len(block.data) for block in blocks) > _LARGE_ROWS_BYTES:
        return await asyncio.to_thread(run)
    return run()


def _answer(sample: Sample, prefill: LegReply, decode: LegReply, rows: RowBlock | None) -> Answer:
    finished = Finished(
        rid=sample.rid,
        prompt_tokens=prefill.meta_info.prompt_tokens,
        cached_tokens=prefill.meta_info.cached_tokens,
        token_ids=decode.output_ids,
        logprobs=decode.logprobs,
        finish_reason=decode.meta_info.finish_reason,
        rows=None if rows is None else rows.header,
        timings={**prefill.leg.timings, **decode.leg.timings},
    )
    return Answer(finished, decode.text, decode.meta_info.weight_version, rows)
