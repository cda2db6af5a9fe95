"""Answers to POST /v1/completions and /v1/chat/completions: whole replies, and the chunks of a stream.

Pure: texts and logprobs in, OpenAI's objects out. It knows no rows; `sglext` and `meta_info`, which hold them, are the
caller's. Neighbours: `openai` (the requests), `router.openai_api`.
"""

import time
from collections.abc import Sequence

from common.messages import FinishReason
from common.protocol.legs import TopLogprobItems
from common.protocol.logprobs import LogprobItem
from common.protocol.openai import OpenAICall
from common.protocol.replies import Reply

# What OpenAI writes for a logprob that is not finite, and JSON cannot hold.
_MINUS_INFINITY = -9999.0


class Progress:
    """How much of one choice has been sent. Texts and logprobs come cumulative and leave as what is new."""

    def __init__(self) -> None:
        self.num_chars = 0
        self.num_tokens = 0
        self.text_offset = 0
        self.has_begun = False


def finish_reason(reason: FinishReason) -> str:
    """Say why a choice ended, in OpenAI's words: they have none for an abort, which cuts an answer short as `length` does."""
    return "stop" if reason.type == "stop" else "length"


def usage(*, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Reply:
    """Count a request's tokens; a prompt counts once, however many choices it has."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def envelope(call: OpenAICall, choices: list[Reply], created: int, *, is_chunk: bool) -> Reply:
    """Build what stands around the choices of a reply or of a chunk."""
    kind = "text_completion"
    if call.is_chat:
        kind = "chat.completion.chunk" if is_chunk else "chat.completion"
    return {"id": call.id, "object": kind, "created": created, "model": call.model, "choices": choices}


def choice(
    call: OpenAICall,
    index: int,
    text: str,
    reason: FinishReason,
    logprobs: Sequence[LogprobItem] | None,
    top_logprobs: TopLogprobItems | None,
) -> Reply:
    """Build one choice of a whole reply."""
    content: Reply = {"text": text}
    if call.is_chat:
        content = {"message": {"role": "assistant", "content": text, "refusal": None}}
    shaped = _logprobs(call, logprobs, top_logprobs, 0) if call.return_logprob else None
    return {"index": index, **content, "logprobs": shaped, "finish_reason": finish_reason(reason)}


def delta_choices(
    call: OpenAICall,
    index: int,
    progress: Progress,
    text: str,
    logprobs: Sequence[LogprobItem] | None,
    top_logprobs: TopLogprobItems | None,
) -> list[Reply]:
    """Build the choices, each for a chunk of its own, that tell what is new since `progress`, and move that on."""
    new_text = text[progress.num_chars :]
    progress.num_chars = max(progress.num_chars, len(text))
    shaped = None
    if call.return_logprob and logprobs is not None and len(logprobs) > progress.num_tokens:
        new = logprobs[progress.num_tokens :]
        tops = None if top_logprobs is None else top_logprobs[progress.num_tokens :]
        shaped = _logprobs(call, new, tops, progress.text_offset)
        progress.num_tokens += len(new)
        progress.text_offset += sum(len(_text(item)) for item in new)
    choices: list[Reply] = []
    if call.is_chat and not progress.has_begun:
        choices.append(_delta(index, {"role": "assistant", "content": "", "refusal": None}))
    progress.has_begun = True
    if new_text or shaped is not None:
        content: Reply = {"content": new_text}
        choices.append(
            {**_delta(index, content), "logprobs": shaped}
            if call.is_chat
            else {"index": index, "text": new_text, "logprobs": shaped, "finish_reason": None}
        )
    return choices


def final_choice(call: OpenAICall, index: int, reason: FinishReason) -> Reply:
    """Build the choice of the chunk that ends it, with no text of its own."""
    begun = _delta(index, {}) if call.is_chat else {"index": index, "text": "", "logprobs": None}
    return {**begun, "finish_reason": finish_reason(reason)}


def now() -> int:
    """Tell the time as `created` has it."""
    return int(time.time())


def _delta(index: int, delta: Reply) -> Reply:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _logprobs(
    call: OpenAICall, items: Sequence[LogprobItem] | None, tops: TopLogprobItems | None, text_offset: int
) -> Reply:
    items = items or ()
    if call.is_chat:
        places = [None] * len(items) if tops is None else tops
        content = [
            {**_token(item), "top_logprobs": [_token(other) for other in top or ()]}
            for item, top in zip(items, places, strict=True)
        ]
        return {"content": content, "refusal": None}
    offsets = []
    for item in items:
        offsets.append(text_offset)
        text_offset += len(_text(item))
    return {
        "tokens": [_text(item) for item in items],
        "token_logprobs": [_value(item) for item in items],
        # The drawn token is always among them.
        "top_logprobs": None
        if tops is None
        else [_by_text([*(top or ()), item]) for item, top in zip(items, tops, strict=True)],
        "text_offset": offsets,
    }


def _by_text(items: Sequence[LogprobItem]) -> dict[str, float]:
    """Key logprobs by the tokens' texts; of two tokens of one text the likelier counts."""
    values: dict[str, float] = {}
    for item in items:
        values.setdefault(_text(item), _value(item))
    return values


def _token(item: LogprobItem) -> Reply:
    text = _text(item)
    return {"token": text, "logprob": _value(item), "bytes": list(text.encode(errors="replace"))}


def _text(item: LogprobItem) -> str:
    _, token_id, text = item
    return f"token_id:{token_id}" if text is None else text


def _value(item: LogprobItem) -> float:
    logprob = item[0]
    return _MINUS_INFINITY if logprob is None else logprob
