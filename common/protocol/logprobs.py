"""Logprobs as the fields of `meta_info`: `[logprob, token id, text or null]` for each position, exactly three.

    input_token_logprobs    positions [logprob_start_len, P); position 0 has no logprob
    output_token_logprobs   positions [P, P+G), one for each output token
    *_top_logprobs          the likeliest tokens of the same positions, likeliest first; null at position 0

It knows no tokenizer: whoever has one passes a function that gives a token's text. Neighbour: `replies`.
"""

from collections.abc import Callable, Sequence

from common.messages import Finished, RequestOptions, TopLogprobs

LogprobItem = tuple[float | None, int, str | None]
TextOf = Callable[[int], str]


def logprob_fields(finished: Finished, options: RequestOptions, text_of: TextOf | None = None) -> dict[str, object]:
    """Make all the logprob fields that `options` ask for and `finished` has; the prompt's are a prefill leg's alone.

    `text_of` gives the text of a token id; it is used when the texts were asked for.
    """
    fields = output_logprob_fields(finished.token_ids, finished.logprobs, finished.top_logprobs, options, text_of)
    prompt = finished.prompt_logprobs
    if prompt is None or options.logprob_start_len < 0:
        return fields
    text_of = text_of if options.return_text_in_logprobs else None
    fields["input_token_logprobs"] = _items(prompt.logprobs, prompt.token_ids, text_of)
    if options.top_logprobs_num > 0:
        fields["input_top_logprobs"] = _top_items(prompt.top_logprobs, text_of)
    return fields


def output_logprob_fields(
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    top_logprobs: Sequence[TopLogprobs],
    options: RequestOptions,
    text_of: TextOf | None,
) -> dict[str, object]:
    """Make the fields of the output tokens; there must be a logprob for each of them."""
    text_of = text_of if options.return_text_in_logprobs else None
    fields: dict[str, object] = {"output_token_logprobs": _items(logprobs, token_ids, text_of)}
    if options.top_logprobs_num > 0:
        fields["output_top_logprobs"] = _top_items(top_logprobs, text_of)
    return fields


def _items(logprobs: Sequence[float | None], token_ids: Sequence[int], text_of: TextOf | None) -> list[LogprobItem]:
    if text_of is None:
        return [(logprob, token_id, None) for logprob, token_id in zip(logprobs, token_ids, strict=True)]
    return [(logprob, token_id, text_of(token_id)) for logprob, token_id in zip(logprobs, token_ids, strict=True)]


def _top_items(positions: Sequence[TopLogprobs | None], text_of: TextOf | None) -> list[list[LogprobItem] | None]:
    return [
        None
        if top is None
        else [(logprob, token_id, None if text_of is None else text_of(token_id)) for logprob, token_id in top]
        for top in positions
    ]
