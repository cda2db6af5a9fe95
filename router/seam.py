"""Where a retracted sample goes on: what is asked of the next legs, and how their answer is joined to what there is.

    first legs   prompt [0, P)  output [P, P+G)
    next legs    prompt [0, P+G)               output [P+G, P+G+G')
    rows         [s ............ P+G-1)[P+G-1 ...... P+G+G'-1)

The output so far becomes the end of the next prompt, so its KV is computed anew, by whatever weights there are; its tokens,
logprobs and rows stay those of the passes that drew it. A draw depends on seed and position alone, so under the same weights
nothing shows. Pure. Neighbours: `resume` (runs the legs), `attempts` (starts others again), `combine`.
"""

from typing import Any

import msgspec
from msgspec.structs import replace

from common.errors import LegFailed
from common.messages import FinishReason
from common.protocol.generate import Sample
from common.protocol.replies import Reply
from common.versions import cut, names
from router.combine import Answer, Logprobs, joined_versions, merged_rows

_NUM_SEEDS = 2**63


def starts_over(sample: Sample, answer: Answer) -> bool:
    """Say whether a sample that nobody was told of was retracted, and starts again: it has nothing, or may not mix weights."""
    return answer.finish_reason.is_retracted and not (answer.output_ids and sample.options.allow_mixed_versions)


def sample_alone(sample: Sample, index: int) -> Sample:
    """Ask for one of a prompt's samples, from its beginning."""
    sampling = sample.options.sampling
    sampling = replace(sampling, n=1, seed=(sampling.seed + index) % _NUM_SEEDS)
    return replace(sample, options=replace(sample.options, sampling=sampling))


def continuation(sample: Sample, index: int, answer: Answer) -> Sample:
    """Ask for the rest of one of a prompt's samples, of which `answer` is the beginning. Raises LegFailed if that is nothing."""
    if answer.prompt_ids is None:
        raise LegFailed("a sample that the client knows of was retracted without its tokens", stage="merge")
    alone, num_tokens = sample_alone(sample, index), len(answer.output_ids)
    options, input_ids = alone.options, (*answer.prompt_ids, *answer.output_ids)
    options = replace(
        options,
        sampling=replace(
            options.sampling,
            max_new_tokens=options.sampling.max_new_tokens - num_tokens,
            min_new_tokens=max(0, options.sampling.min_new_tokens - num_tokens),
        ),
        logprob_start_len=-1,
        routed_experts_start_len=max(options.routed_experts_start_len, len(input_ids) - 1),
        resumed_tokens=options.resumed_tokens + num_tokens,
        resumed_versions=tuple(dict.fromkeys((*options.resumed_versions, *names(answer.weight_versions)))),
    )
    return replace(alone, options=options, text=None, messages=None, chat_template_kwargs={}, input_ids=input_ids)


async def joined(sample: Sample, earlier: Answer, later: Answer) -> Answer:
    """Make one answer of a sample's beginning and what its next legs have added; one that added nothing says how it ended.

    Raises LegFailed if it is another prompt's, MixedVersions if weights of several versions have computed it and may not,
    RowsError if the rows do not fit together.
    """
    reason = later.finish_reason
    if not later.output_ids:
        return replace(earlier, finish_reason=reason)
    seam = earlier.prompt_tokens + len(earlier.output_ids)
    if later.prompt_tokens != seam:
        raise LegFailed(f"a sample of {seam} tokens goes on from {later.prompt_tokens}", stage="merge")
    output_ids = earlier.output_ids + later.output_ids
    last = earlier.prompt_tokens + len(output_ids) - 1
    # Position P+G-1 had not been computed when the first legs ended; all before it are computed twice, and count once.
    spans = [*earlier.weight_versions, *cut(later.weight_versions, seam - 1, last)]
    versions = joined_versions(sample, spans)
    rows = None
    if earlier.rows is not None and later.rows is not None:
        start = earlier.rows.header.start
        rows = await merged_rows([earlier.rows, later.rows], versions, start=start, stop=max(start, last))
    if reason.type == "length":
        reason = FinishReason(type="length", length=len(output_ids))
    return replace(
        earlier,
        text=later.text,
        output_ids=output_ids,
        finish_reason=reason,
        weight_version=later.weight_version,
        weight_versions=versions,
        logprobs=_joined_logprobs(earlier.logprobs, later.logprobs),
        rows=rows,
        timings={**earlier.timings, **later.timings},
    )


def joined_event(earlier: Answer, event: Reply) -> Reply:
    """Put a sample's beginning in front of what a stream says of the rest; the text begins there already.

    Raises LegFailed if the worker's event cannot be read.
    """
    try:
        told = msgspec.convert(event, _Event)
    except msgspec.ValidationError as error:
        raise LegFailed(f"an event cannot be read: {error}", stage="reply") from error
    output_ids = [*earlier.output_ids, *told.output_ids]
    meta = {**told.meta_info, "prompt_tokens": earlier.prompt_tokens, "completion_tokens": len(output_ids)}
    for name in ("output_token_logprobs", "output_top_logprobs"):
        items = getattr(earlier.logprobs, name)
        if items is not None:
            meta[name] = [*items, *told.meta_info.get(name, ())]
    return {**event, "output_ids": output_ids, "meta_info": meta}


class _Event(msgspec.Struct, frozen=True):
    """What is joined of a stream's event."""

    output_ids: list[int]
    meta_info: dict[str, Any]


def _joined_logprobs(earlier: Logprobs, later: Logprobs) -> Logprobs:
    """Append the output's; what was not asked for is in neither."""
    if earlier.output_token_logprobs is None:
        return earlier
    tops = earlier.output_top_logprobs
    return replace(
        earlier,
        output_token_logprobs=earlier.output_token_logprobs + (later.output_token_logprobs or []),
        output_top_logprobs=None if tops is None else tops + (later.output_top_logprobs or []),
    )
