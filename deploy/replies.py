"""One sample as a user has it: what was asked, and the reply to it, read strictly.

Strictly: tokens, positions, shape, dtype, layers and length must be those that were asked for, or the reply is an error.
Whoever trains on rows must never meet one position too few. Neighbours: `deploy.answers` (the wire), `deploy.client`
(asks), `deploy.session` (replies that follow each other).

Shape letters: R positions, L entries of the layer axis, K top-k; P, G, s as everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from msgspec import Struct

from common.ids import new_seed
from common.messages import FinishReason, SamplingParams
from common.versions import Spans, cover, cut, join
from deploy.answers import (
    Ids,
    MalformedReplyError,
    MalformedRowsError,
    ReplyForm,
    as_reply,
    moe_layers_of,
    num_expected_rows,
    read_rows,
)

RowKind = tuple[tuple[int, ...], int, np.dtype[Any]]
"""The layers on rows' layer axis, their top-k, their dtype."""


class Ask(Struct, frozen=True, kw_only=True):
    """One prompt's request: its body, and what its replies must agree with. `seed` is the first sample's."""

    body: dict[str, Any]
    seed: int
    n: int
    rows: bool
    start: int
    num_prompt_tokens: int | None
    dtype: Literal["auto", "int32"]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Reply:
    """One sample's reply. `rows` are the ids `[P+G-1-start, L, K]`, None if there are none; `layer_ids` name their L axis.

    `weight_versions` are of all positions `[0, P+G-1)`, if the server says them. `meta` is meta_info without the rows.
    `seed` repeats this very sample. `num_bytes` is the length of the answer that it came in.
    """

    text: str
    output_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    seed: int
    meta: dict[str, Any]
    num_bytes: int
    rows: Ids | None = None
    start: int = 0
    layer_ids: tuple[int, ...] = ()
    weight_versions: Spans = ()
    index: int = 0

    @property
    def is_partial(self) -> bool:
        """Whether somebody ended it before it was done."""
        return self.finish_reason.type == "abort"

    @property
    def stop(self) -> int:
        """The end of its rows' positions: P+G-1."""
        return self.prompt_tokens + len(self.output_ids) - 1

    @property
    def row_kind(self) -> RowKind | None:
        """What must be alike in rows that are joined; None without rows."""
        return None if self.rows is None else (self.layer_ids, self.rows.shape[2], self.rows.dtype)


def make_ask(
    *,
    input_ids: Sequence[int] | None = None,
    text: str | None = None,
    sampling_params: dict[str, Any] | None = None,
    rows: bool = True,
    start_len: int = 0,
    form: ReplyForm = "msgpack",
    **fields: Any,
) -> Ask:
    """Write a request's body, with `fields` in it. A seed that is not given is drawn here: a second try repeats the first."""
    if (input_ids is None) == (text is None):
        raise ValueError("give input_ids or text, one of them")
    sampling = dict(sampling_params or {})
    # Half of the range: the n-th sample's seed, n - 1 higher, must be a seed too.
    seed = sampling.setdefault("sampling_seed", new_seed() // 2)
    body: dict[str, Any] = {**fields, "sampling_params": sampling}
    body |= {"text": text} if input_ids is None else {"input_ids": list(input_ids)}
    dtype: Literal["auto", "int32"] = "auto" if form == "msgpack" else "int32"
    if rows:
        body |= {
            "return_routed_experts": True,
            "routed_experts_start_len": start_len,
            "routed_experts_dtype": dtype,
        }
    return Ask(
        body=body,
        seed=seed,
        n=sampling.get("n", 1),
        rows=rows,
        start=start_len if rows else 0,
        num_prompt_tokens=None if input_ids is None else len(input_ids),
        dtype=dtype,
    )


def read_reply(body: object, ask: Ask, *, num_bytes: int, index: int | None = None) -> Reply:
    """Read one sample's reply, plain objects, that must be the answer to `ask`. Raises MalformedReplyError.

    `index` says which sample it is, None that the reply itself does. Only one that was ended early may lack the rows.
    """
    wire = as_reply(body)
    assert isinstance(body, dict)
    meta, index = wire.meta_info, wire.index if index is None else index
    num_tokens = len(wire.output_ids)
    if num_tokens != meta.completion_tokens:
        raise MalformedReplyError(f"{num_tokens} output_ids, but completion_tokens is {meta.completion_tokens}")
    if ask.num_prompt_tokens not in (None, meta.prompt_tokens):
        raise MalformedReplyError(f"a prompt of {meta.prompt_tokens} tokens, but {ask.num_prompt_tokens} were sent")
    if not 0 <= index < ask.n:
        raise MalformedReplyError(f"sample {index} of {ask.n}")
    reply = Reply(
        text=wire.text,
        output_ids=wire.output_ids,
        finish_reason=meta.finish_reason,
        prompt_tokens=meta.prompt_tokens,
        seed=ask.seed + index,
        meta={name: value for name, value in body["meta_info"].items() if name != "routed_experts"},
        num_bytes=num_bytes,
        start=ask.start,
        weight_versions=join(meta.weight_versions),
        index=index,
    )
    rows = read_rows(meta)
    if rows is None:
        if ask.rows and (num_tokens > 0 or not reply.is_partial):
            raise MalformedRowsError("there are no rows, and they were asked for")
        return reply
    num_expected = num_expected_rows(meta.prompt_tokens, num_tokens, ask.start)
    moe_layers_of(meta, rows.shape[1])
    if not ask.rows:
        raise MalformedRowsError("there are rows, and none were asked for")
    if (meta.routed_experts_start_len, len(rows)) != (ask.start, num_expected):
        raise MalformedRowsError(
            f"{len(rows)} rows from {meta.routed_experts_start_len} on; {num_expected} from {ask.start} on were due"
        )
    if (meta.routed_experts_dtype == "int32") != (ask.dtype == "int32") or rows.shape[2] == 0:
        raise MalformedRowsError(f"rows of {meta.routed_experts_dtype} with top-{rows.shape[2]}")
    stop = ask.start + num_expected
    if reply.weight_versions and not cover(cut(reply.weight_versions, ask.start, stop), ask.start, stop):
        raise MalformedReplyError(f"the versions of [{ask.start}, {stop}) are {reply.weight_versions}")
    return replace(reply, rows=rows, layer_ids=tuple(meta.routed_experts_layer_ids or ()))


# ------------------------------------------------------------------------------------------------ partial replies


def rest_of(partial: Reply, sampling_params: dict[str, Any] | None) -> dict[str, Any]:
    """What to ask for behind a partial reply: the same draws, and as many tokens as are left."""
    sampling, num_there = dict(sampling_params or {}), len(partial.output_ids)
    defaults = SamplingParams()
    return sampling | {
        "n": 1,
        "sampling_seed": partial.seed,
        "max_new_tokens": sampling.get("max_new_tokens", defaults.max_new_tokens) - num_there,
        "min_new_tokens": max(0, sampling.get("min_new_tokens", defaults.min_new_tokens) - num_there),
    }


def join_replies(partial: Reply, rest: Reply) -> Reply:
    """Make one reply of a partial one and of the one that went on behind it: as if nobody had ended it.

    Each position has its row once. `text`, `finish_reason` and `meta` are the later one's. Raises MalformedRowsError for
    rows that do not fit together.
    """
    joined = replace(rest, num_bytes=partial.num_bytes + rest.num_bytes, index=partial.index)
    if not partial.output_ids:
        return joined
    if not rest.output_ids:
        # Ended again, before it had a token.
        return replace(partial, num_bytes=joined.num_bytes, finish_reason=rest.finish_reason)
    if partial.row_kind != rest.row_kind:
        raise MalformedRowsError(f"rows of two kinds (layers, top-k, dtype): {partial.row_kind} and {rest.row_kind}")
    rows = None
    if partial.rows is not None and rest.rows is not None:
        if rest.start != partial.stop:
            raise MalformedRowsError(f"rows from {rest.start} on do not follow rows up to {partial.stop}")
        rows = np.concatenate((partial.rows, rest.rows))
    return replace(
        joined,
        output_ids=[*partial.output_ids, *rest.output_ids],
        prompt_tokens=partial.prompt_tokens,
        rows=rows,
        start=partial.start,
        weight_versions=join_versions(partial.weight_versions, rest.weight_versions, partial.stop),
    )


def join_versions(earlier: Spans, later: Spans, at: int) -> Spans:
    """The versions of rows that were held up to `at`, and of those that came then, from there on."""
    stop = max((span.stop for span in later), default=at)
    return join((*cut(earlier, 0, at), *cut(later, at, stop)))
