"""From a step's plan to host arrays: one place where positions become slots and pages.

A few array operations whatever the number of entries. `common.engine.batch` makes tensors of a layout, and
`common.engine.cuda_graphs` pads it. Shape letters: n entries of the plan, T tokens, S draws, N scored positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from common.kernels.attention import AttentionPlan
from common.kernels.reference import GREEDY_BELOW
from common.memory.request_table import RequestTable
from common.scheduling.step_plan import StepEntry, StepPlan

Ints = npt.NDArray[np.int64]
Column = TypeVar("Column", Ints, torch.Tensor)

ON_DEVICE = -1
"""In place of a token id that the host does not know."""


class PerToken(NamedTuple, Generic[Column]):
    """Int64 columns `[T]`, on the host or on the device."""

    token_ids: Column
    """`[0, V)`; `ON_DEVICE` for the last token of the token's table row."""
    positions: Column
    slots: Column
    rows: Column
    """Request-table rows."""


class PerDraw(NamedTuple, Generic[Column]):
    """Int64 columns `[S]`, on the host or on the device."""

    last_tokens: Column
    """`[0, T)`: where in the step the token stands whose logits are drawn from."""
    rows: Column
    """Request-table rows."""
    seeds: Column
    positions: Column
    """Of the tokens that are drawn."""
    top_ks: Column


def split_ints(ints: Column, num_tokens: int, num_draws: int) -> tuple[PerToken[Column], PerDraw[Column]]:
    """View a step's packed int64 `[4 * T + 5 * S]` by its columns. With T = S it is a matrix `[9, T]` of them."""
    num_token_ints = len(PerToken._fields) * num_tokens
    return (
        PerToken(*ints[:num_token_ints].reshape(len(PerToken._fields), num_tokens)),
        PerDraw(*ints[num_token_ints:].reshape(len(PerDraw._fields), num_draws)),
    )


@dataclass(frozen=True, slots=True)
class ScoredLayout:
    """The positions of a step whose next prompt token's logprob is wanted, N in all."""

    ints_2N: Ints
    """Where in the step they stand, and the prompt's own token at the position after each."""
    top_count: int
    counts: tuple[int, ...]
    """`[n]`: how many of the N belong to each entry of the plan."""


@dataclass(frozen=True, slots=True)
class StepLayout:
    """A plan in host arrays, which belong to this step: the entries' tokens one after the other, then their draws likewise."""

    ints: Ints
    """`[4 * T + 5 * S]`: `tokens` and `draws` are views of it (`split_ints`)."""
    tokens: PerToken[Ints]
    draws: PerDraw[Ints]
    params_3S: npt.NDArray[np.float32]
    """Temperature, top-p and min-p of each draw."""
    attention: AttentionPlan
    draw_entries: Ints
    """`[S]`: the plan's entry that each draw belongs to; one with n samples stands here n times."""
    all_known: bool
    """No token is `ON_DEVICE`."""
    all_greedy: bool
    any_filtered: bool
    any_logit_changes: bool
    top_count: int
    """The most likeliest tokens that a draw has to come with."""
    scored: ScoredLayout | None
    """None when no prompt logprobs are wanted."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.tokens.slots)

    @property
    def num_draws(self) -> int:
        """S."""
        return len(self.draws.rows)


def lay_out(plan: StepPlan, table: RequestTable, page_size: int) -> StepLayout:
    """Describe a plan in arrays; entries and table may change afterwards."""
    described = [(e.request.row, e.start, e.stop, e.samples, e.request.num_known_tokens) for e in plan.entries]
    rows, starts, stops, samples, known = np.array(described, dtype=np.int64).reshape(-1, 5).T
    num_queries = stops - starts
    query_starts = _starts_of(num_queries)
    draw_entries = np.repeat(np.arange(len(rows)), samples)
    ints = np.empty(len(PerToken._fields) * query_starts[-1] + len(PerDraw._fields) * len(draw_entries), dtype=np.int64)
    tokens, draws = split_ints(ints, int(query_starts[-1]), len(draw_entries))

    tokens.rows[:] = np.repeat(rows, num_queries)
    tokens.positions[:] = _ranges(starts, num_queries)
    page_index, slot_in_page = np.divmod(tokens.positions, page_size)
    tokens.slots[:] = table.pages[tokens.rows, page_index].astype(np.int64) * page_size + slot_in_page
    tokens.token_ids.fill(ON_DEVICE)
    for i in np.flatnonzero(starts < known).tolist():
        _put_known_tokens(plan.entries[i], tokens.token_ids[query_starts[i] : query_starts[i + 1]])

    draws.last_tokens[:] = query_starts[1:][draw_entries] - 1
    draws.rows[:] = rows[draw_entries]
    draws.seeds[:] = (table.seeds[draws.rows] + _ranges(np.zeros_like(samples), samples)) & (2**63 - 1)
    draws.positions[:] = stops[draw_entries]
    draws.top_ks[:] = table.top_ks[draws.rows]
    params_3S = table.params_3R[:, draws.rows]

    num_pages = -(-stops // page_size)
    width = int(num_pages.max(initial=0))
    return StepLayout(
        ints=ints,
        tokens=tokens,
        draws=draws,
        params_3S=params_3S,
        attention=AttentionPlan(
            query_starts=query_starts.astype(np.int32),
            context_tokens=stops.astype(np.int32),
            page_starts=_starts_of(num_pages).astype(np.int32),
            pages=table.pages[:, :width][rows][np.arange(width) < num_pages[:, None]],
        ),
        draw_entries=draw_entries,
        all_known=bool((tokens.token_ids != ON_DEVICE).all()),
        all_greedy=bool((params_3S[0] < GREEDY_BELOW).all()),
        any_filtered=bool(table.is_filtered[draws.rows].any()),
        any_logit_changes=bool(table.changes_logits[draws.rows].any()),
        top_count=int(table.num_top_logprobs[draws.rows].max(initial=0)),
        scored=_lay_out_scored(plan.entries, table, rows, starts, stops, query_starts),
    )


def _put_known_tokens(entry: StepEntry, token_ids: Ints) -> None:
    """Fill in what the host knows of an entry's tokens: the prompt's, then those generated."""
    request, start = entry.request, entry.start
    num_prompt_tokens = request.num_prompt_tokens
    if start < num_prompt_tokens:
        prompt = request.prompt[start : entry.stop]
        token_ids[: len(prompt)] = prompt
    for position in range(max(start, num_prompt_tokens), min(entry.stop, request.num_known_tokens)):
        token_ids[position - start] = request.output_ids[position - num_prompt_tokens]


def _lay_out_scored(
    entries: Sequence[StepEntry], table: RequestTable, rows: Ints, starts: Ints, stops: Ints, query_starts: Ints
) -> ScoredLayout | None:
    """Find the positions that predict a prompt token whose logprob is wanted: token p + 1 is predicted at position p."""
    first = np.maximum(starts, table.scored_from[rows])
    counts = np.maximum(0, np.minimum(stops, table.scored_to[rows]) - first)
    scored = np.flatnonzero(counts)
    if len(scored) == 0:
        return None
    prompts = [entries[i].request.prompt[first[i] + 1 : first[i] + 1 + counts[i]] for i in scored.tolist()]
    return ScoredLayout(
        ints_2N=np.stack((_ranges(query_starts[:-1] + first - starts, counts), np.concatenate(prompts))),
        top_count=int(table.num_top_logprobs[rows[scored]].max()),
        counts=tuple(counts.tolist()),
    )


def _starts_of(counts: Ints) -> Ints:
    """`[n + 1]`: where each of n runs begins if they stand one after the other, and the end of the last."""
    starts = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts


def _ranges(starts: Ints, counts: Ints) -> Ints:
    """The numbers `[starts[i], starts[i] + counts[i])` of all i, one run after the other."""
    run_starts = _starts_of(counts)
    return np.arange(run_starts[-1]) + np.repeat(starts - run_starts[:-1], counts)
