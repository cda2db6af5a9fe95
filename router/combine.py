"""One answer out of the replies of a sample's legs: who says what, and whose rows and logprobs go where.

The prefill leg knows the prompt (tokens, cached tokens, logprobs) and the first token of every sample, a sample's decode
reply the output; rows come from both and are merged, for each sample of a prompt with the same prefill leg. It knows no
HTTP. Neighbours: `pair` (runs the legs), `ahead` (checks their rows), `merge`.
"""

import asyncio
from collections.abc import Sequence

from msgspec import Struct

from common.errors import LegFailed, MissingRows
from common.messages import FinishReason, Leg, RowBlock
from common.protocol.generate import Sample
from common.protocol.legs import LegReply, TopLogprobItems
from common.protocol.logprobs import LogprobItem
from router.ahead import Arrived
from router.merge import merge

# Merging more than this would keep the event loop from its other requests for too long (R16).
_LARGE_ROWS_BYTES = 2**20


class Logprobs(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The logprob fields of `meta_info`, as the workers wrote them; None for what was not asked for."""

    input_token_logprobs: list[LogprobItem] | None = None
    input_top_logprobs: TopLogprobItems | None = None
    output_token_logprobs: list[LogprobItem] | None = None
    output_top_logprobs: TopLogprobItems | None = None


class Answer(Struct, frozen=True, kw_only=True):
    """A sample's end as the router tells it: positions, tokens, logprobs and rows of the whole sequence."""

    rid: str
    prompt_tokens: int
    cached_tokens: int
    text: str
    output_ids: list[int]
    finish_reason: FinishReason
    weight_version: str
    logprobs: Logprobs
    rows: RowBlock | None
    lead: Sequence[bytes] = ()
    """The first slices of the rows' base64, in the form that the sample asks for, as far as they were made ahead."""
    timings: dict[str, float]


async def combine_pair(
    sample: Sample, index: int, prefill_leg: Arrived, decode_leg: Arrived, lead: Sequence[bytes] = ()
) -> Answer:
    """Join the prefill leg's reply and the decode leg's one for sample `index` of the prompt.

    `lead` is base64 of the prefill leg's rows. Raises LegFailed if the legs answer different prompts or their logprobs are
    not whole, RowsError if rows are missing or do not fit together.
    """
    prefill, decode = prefill_leg.reply, decode_leg.reply
    if is_unfinished(decode):
        return combine_unfinished(sample, decode)
    _check_agreement(sample, index, prefill, decode)
    _check_logprobs(sample, "decode", decode)
    _check_prompt_logprobs(sample, "prefill", prefill)
    prompt_tokens, output_ids = prefill.meta_info.prompt_tokens, decode.output_ids
    rows = None
    if sample.options.return_routed_experts:
        start = sample.options.routed_experts_start_len
        stop = max(start, prompt_tokens + len(output_ids) - 1)
        blocks = [_rows_of("prefill", prefill_leg), _rows_of("decode", decode_leg)]
        rows = await _merged(blocks, start=start, stop=stop)
    return _answer(sample, prefill, decode, rows, lead)


async def combine_whole(sample: Sample, leg: Leg | None, arrived: Arrived) -> Answer:
    """Make the answer of a sample that one worker has run alone: of an aggregated one, or a prompt that was only scored.

    Raises LegFailed if its logprobs are not whole, RowsError if rows are missing.
    """
    reply = arrived.reply
    if is_unfinished(reply):
        return combine_unfinished(sample, reply)
    _check_logprobs(sample, leg, reply)
    _check_prompt_logprobs(sample, leg, reply)
    rows = None
    if sample.options.return_routed_experts:
        start = sample.options.routed_experts_start_len
        stop = max(start, reply.meta_info.prompt_tokens + len(reply.output_ids) - 1)
        rows = await _merged([_rows_of(leg, arrived)], start=start, stop=stop)
    return _answer(sample, reply, reply, rows)


def combine_unfinished(sample: Sample, aborted: LegReply) -> Answer:
    """Make the answer of a sample that somebody aborted before it had a token: no output, and no rows at all."""
    assert is_unfinished(aborted)
    meta = aborted.meta_info
    return Answer(
        rid=sample.rid,
        prompt_tokens=meta.prompt_tokens,
        cached_tokens=meta.cached_tokens,
        text="",
        output_ids=[],
        finish_reason=meta.finish_reason,
        weight_version=meta.weight_version,
        logprobs=Logprobs(output_token_logprobs=[] if sample.options.return_logprob else None),
        rows=None,
        timings=aborted.leg.timings,
    )


def is_unfinished(leg: LegReply) -> bool:
    """Say whether the leg was ended by an abort before it had a token."""
    return leg.is_aborted and not leg.output_ids


def _check_agreement(sample: Sample, index: int, prefill: LegReply, decode: LegReply) -> None:
    ours, theirs = prefill.meta_info.prompt_tokens, decode.meta_info.prompt_tokens
    if ours != theirs:
        raise LegFailed(f"the legs disagree: {ours} prompt tokens in prefill, {theirs} in decode", stage="merge")
    if len(prefill.output_ids) != sample.options.sampling.n:
        raise LegFailed(
            f"the prefill leg has {len(prefill.output_ids)} first tokens for {sample.options.sampling.n} samples",
            leg="prefill",
            stage="merge",
        )
    # The first token is the prefill leg's; another one means that these are the legs of two samples.
    first = prefill.output_ids[index : index + 1]
    if first != decode.output_ids[:1]:
        raise LegFailed(f"the legs disagree on the first token: {first} and {decode.output_ids[:1]}", stage="merge")


def _check_logprobs(sample: Sample, leg: Leg | None, reply: LegReply) -> None:
    """Check that there is a logprob for every output token, and top logprobs if they were asked for."""
    options, meta, num_tokens = sample.options, reply.meta_info, len(reply.output_ids)
    if not options.return_logprob:
        return
    if [token_id for _, token_id, _ in meta.output_token_logprobs or ()] != reply.output_ids:
        raise _incomplete(leg, f"output_token_logprobs are not those of the {num_tokens} output tokens")
    if options.top_logprobs_num > 0 and len(meta.output_top_logprobs or ()) != num_tokens:
        raise _incomplete(leg, f"{len(meta.output_top_logprobs or ())} output_top_logprobs for {num_tokens} tokens")


def _check_prompt_logprobs(sample: Sample, leg: Leg | None, reply: LegReply) -> None:
    options, meta = sample.options, reply.meta_info
    if not options.return_logprob or options.logprob_start_len < 0:
        return
    expected = max(0, meta.prompt_tokens - options.logprob_start_len)
    given = {"input_token_logprobs": len(meta.input_token_logprobs or ())}
    if options.top_logprobs_num > 0:
        given["input_top_logprobs"] = len(meta.input_top_logprobs or ())
    for name, count in given.items():
        if count != expected:
            raise _incomplete(leg, f"{count} {name} for {expected} prompt tokens")


def _incomplete(leg: Leg | None, what: str) -> LegFailed:
    return LegFailed(f"the {_name_of(leg)}'s logprobs are not whole: {what}", leg=leg, stage="merge")


def _name_of(leg: Leg | None) -> str:
    return "aggregated worker" if leg is None else f"{leg} leg"


def _rows_of(leg: Leg | None, arrived: Arrived) -> RowBlock:
    if arrived.rows is None:
        raise MissingRows(f"the {_name_of(leg)} sent no routed-expert rows", leg=leg, stage="merge")
    return arrived.rows


async def _merged(blocks: list[RowBlock], *, start: int, stop: int) -> RowBlock:
    if sum(len(block.data) for block in blocks) > _LARGE_ROWS_BYTES:
        return await asyncio.to_thread(merge, blocks, start=start, stop=stop)
    return merge(blocks, start=start, stop=stop)


def _answer(
    sample: Sample, prefill: LegReply, decode: LegReply, rows: RowBlock | None, lead: Sequence[bytes] = ()
) -> Answer:
    prompt, output = prefill.meta_info, decode.meta_info
    return Answer(
        rid=sample.rid,
        prompt_tokens=prompt.prompt_tokens,
        cached_tokens=prompt.cached_tokens,
        text=decode.text,
        output_ids=decode.output_ids,
        finish_reason=output.finish_reason,
        weight_version=output.weight_version,
        logprobs=Logprobs(
            input_token_logprobs=prompt.input_token_logprobs,
            input_top_logprobs=prompt.input_top_logprobs,
            output_token_logprobs=output.output_token_logprobs,
            output_top_logprobs=output.output_top_logprobs,
        ),
        rows=rows,
        lead=lead,
        timings={**prefill.leg.timings, **decode.leg.timings},
    )
