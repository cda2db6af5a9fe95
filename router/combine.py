"""One answer out of the replies of a sample's legs: who says what, and whose rows and logprobs go where.

The prefill leg knows the prompt (tokens, cached tokens, logprobs) and the first token of every sample, a sample's decode
reply the output; rows come from both and are merged, for each sample of a prompt with the same prefill leg. It knows no
HTTP. Neighbours: `pair` (runs the legs), `ahead` (checks their rows), `merge`.
"""

import asyncio
from collections.abc import Iterable, Sequence

from msgspec import Struct

from common.errors import LegFailed, MissingRows, MixedVersions, RowsMismatch
from common.messages import FinishReason, Leg, RowBlock, VersionSpan
from common.protocol.generate import Sample
from common.protocol.legs import LegReply, TopLogprobItems
from common.protocol.logprobs import LogprobItem
from common.versions import Spans, cover, cut, join, names
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
    """The last ones' of `weight_versions`, or the worker's."""
    weight_versions: Spans
    """Which weights have computed the positions `[0, P+G-1)`."""
    logprobs: Logprobs
    rows: RowBlock | None
    lead: Sequence[bytes] = ()
    """The first slices of the rows' base64, in the form that the sample asks for, as far as they were made ahead."""
    prompt_ids: list[int] | None = None
    """Of a sample that was retracted and has tokens: the prompt, in the worker's words."""
    timings: dict[str, float]


async def combine_pair(
    sample: Sample, index: int, prefill_leg: Arrived, decode_leg: Arrived, lead: Sequence[bytes] = ()
) -> Answer:
    """Join the prefill leg's reply and the decode leg's one for sample `index` of the prompt.

    `lead` is base64 of the prefill leg's rows. Raises LegFailed if the legs answer different prompts, or their logprobs or
    weight versions are not whole, MixedVersions if these are several and may not be, RowsError if rows are missing or do not
    fit together.
    """
    prefill, decode = prefill_leg.reply, decode_leg.reply
    if decode.is_unfinished:
        return combine_unfinished(sample, decode)
    _check_agreement(sample, index, prefill, decode)
    _check_logprobs(sample, "decode", decode)
    _check_prompt_logprobs(sample, "prefill", prefill)
    _check_prompt_ids("decode", decode)
    prompt_tokens, output_ids = prefill.meta_info.prompt_tokens, decode.output_ids
    last = prompt_tokens + len(output_ids) - 1
    _check_versions("prefill", prefill, 0, prompt_tokens)
    _check_versions("decode", decode, prompt_tokens, last)
    versions = joined_versions(sample, [*prefill.meta_info.weight_versions, *decode.meta_info.weight_versions])
    rows = None
    if sample.options.return_routed_experts:
        start = sample.options.routed_experts_start_len
        blocks = [_rows_of("prefill", prefill_leg), _rows_of("decode", decode_leg)]
        rows = await merged_rows(blocks, versions, start=start, stop=max(start, last))
    return _answer(sample, prefill, decode, versions, rows, lead)


async def combine_whole(sample: Sample, leg: Leg | None, arrived: Arrived) -> Answer:
    """Make the answer of a sample that one worker has run alone: of an aggregated one, or a prompt that was only scored.

    Raises LegFailed if its logprobs or weight versions are not whole, MixedVersions if these are several and may not be,
    RowsError if rows are missing.
    """
    reply = arrived.reply
    if reply.is_unfinished:
        return combine_unfinished(sample, reply)
    _check_logprobs(sample, leg, reply)
    _check_prompt_logprobs(sample, leg, reply)
    _check_prompt_ids(leg, reply)
    last = reply.meta_info.prompt_tokens + len(reply.output_ids) - 1
    _check_versions(leg, reply, 0, last)
    versions = joined_versions(sample, reply.meta_info.weight_versions)
    rows = None
    if sample.options.return_routed_experts:
        start = sample.options.routed_experts_start_len
        rows = await merged_rows([_rows_of(leg, arrived)], versions, start=start, stop=max(start, last))
    return _answer(sample, reply, reply, versions, rows)


def combine_unfinished(sample: Sample, aborted: LegReply) -> Answer:
    """Make the answer of a sample that was ended, for good or for later, before it had a token: no output and no rows."""
    assert aborted.is_unfinished
    meta = aborted.meta_info
    return Answer(
        rid=sample.rid,
        prompt_tokens=meta.prompt_tokens,
        cached_tokens=meta.cached_tokens,
        text="",
        output_ids=[],
        finish_reason=meta.finish_reason,
        weight_version=meta.weight_version,
        weight_versions=(),
        logprobs=Logprobs(output_token_logprobs=[] if sample.options.return_logprob else None),
        rows=None,
        timings=aborted.leg.timings,
    )


def never_begun(sample: Sample) -> Answer:
    """Make the answer of a sample that somebody aborted while no worker had it: of a text nobody has counted the tokens."""
    return Answer(
        rid=sample.rid,
        prompt_tokens=len(sample.input_ids or ()),
        cached_tokens=0,
        text="",
        output_ids=[],
        finish_reason=FinishReason.early("requested", "in the router"),
        weight_version="",
        weight_versions=(),
        logprobs=Logprobs(output_token_logprobs=[] if sample.options.return_logprob else None),
        rows=None,
        timings={},
    )


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


def _check_prompt_ids(leg: Leg | None, reply: LegReply) -> None:
    """Check that a sample that is to go on says what its prompt was."""
    num_ids = len(reply.leg.prompt_ids or ())
    if reply.is_retracted and num_ids != reply.meta_info.prompt_tokens:
        message = (
            f"the {_name_of(leg)} was retracted with {num_ids} ids of {reply.meta_info.prompt_tokens} prompt tokens"
        )
        raise LegFailed(message, leg=leg, stage="merge")


def _check_versions(leg: Leg | None, reply: LegReply, start: int, stop: int) -> None:
    """Check that the leg says of each of its positions which weights have computed it."""
    if not cover(reply.meta_info.weight_versions, start, stop):
        message = f"the {_name_of(leg)}'s weight versions do not cover its positions [{start}, {stop})"
        raise LegFailed(message, leg=leg, stage="merge")


def joined_versions(sample: Sample, versions: Iterable[VersionSpan]) -> Spans:
    """Join what the legs say of their weights. Raises MixedVersions if the sample may not have been computed so."""
    spans = join(versions)
    if len(spans) > 1 and not sample.options.allow_mixed_versions:
        raise MixedVersions(names(spans))
    return spans


def _incomplete(leg: Leg | None, what: str) -> LegFailed:
    return LegFailed(f"the {_name_of(leg)}'s logprobs are not whole: {what}", leg=leg, stage="merge")


def _name_of(leg: Leg | None) -> str:
    return "aggregated worker" if leg is None else f"{leg} leg"


def _rows_of(leg: Leg | None, arrived: Arrived) -> RowBlock:
    if arrived.rows is None:
        raise MissingRows(f"the {_name_of(leg)} sent no routed-expert rows", leg=leg, stage="merge")
    return arrived.rows


async def merged_rows(blocks: list[RowBlock], versions: Spans, *, start: int, stop: int) -> RowBlock:
    """Merge the legs' rows, whose headers must name the same weights as the legs do."""
    if sum(len(block.data) for block in blocks) > _LARGE_ROWS_BYTES:
        rows = await asyncio.to_thread(merge, blocks, start=start, stop=stop)
    else:
        rows = merge(blocks, start=start, stop=stop)
    if rows.header.weight_versions != cut(versions, start, stop):
        raise RowsMismatch(f"the rows [{start}, {stop}) name other weight versions than their legs", stage="merge")
    return rows


def _answer(
    sample: Sample,
    prefill: LegReply,
    decode: LegReply,
    versions: Spans,
    rows: RowBlock | None,
    lead: Sequence[bytes] = (),
) -> Answer:
    prompt, output = prefill.meta_info, decode.meta_info
    return Answer(
        rid=sample.rid,
        prompt_tokens=prompt.prompt_tokens,
        cached_tokens=prompt.cached_tokens,
        text=decode.text,
        output_ids=decode.output_ids,
        finish_reason=output.finish_reason,
        weight_version=versions[-1].weight_version if versions else output.weight_version,
        weight_versions=versions,
        logprobs=Logprobs(
            input_token_logprobs=prompt.input_token_logprobs,
            input_top_logprobs=prompt.input_top_logprobs,
            output_token_logprobs=output.output_token_logprobs,
            output_top_logprobs=output.output_top_logprobs,
        ),
        rows=rows,
        lead=lead,
        prompt_ids=decode.leg.prompt_ids,
        timings={**prefill.leg.timings, **decode.leg.timings},
    )
