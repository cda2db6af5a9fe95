"""From a step's layout to the tensors of its forward pass, and of what follows it.

Neighbours: `common.engine.step_layout` (where it comes from), `common.engine.engine` (runs it), `common.engine.cuda_graphs` (has
the forward pass' tensors in place already). Shape letters: T tokens, S draws, N scored positions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from common.engine.device import StepStaging
from common.engine.sampler import SamplingBatch
from common.engine.step_layout import ON_DEVICE, PerDraw, PerToken, ScoredLayout, StepLayout, split_ints
from common.kernels.attention import AttentionBackend, AttentionPlan
from common.kernels.collectives import Gathering
from common.memory.kv_pool import KvPool
from common.memory.layout import num_pages_for
from common.models.forward import ForwardBatch, RoutingSink


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """A `ScoredLayout` on the device."""

    hidden_N: torch.Tensor
    """int64: where in the step they stand."""
    next_tokens_N: torch.Tensor
    """int64: the prompt's own token at the position after each."""
    top_count: int


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What a step's logits and draws need, in tensors that belong to this step."""

    draws: PerDraw[torch.Tensor]
    sampling: SamplingBatch | None
    """None when no entry samples."""
    scored: ScoredBatch | None
    """None when no prompt logprobs are wanted."""


def upload_layout(
    layout: StepLayout,
    staging: StepStaging,
    last_tokens_R: torch.Tensor,
    attention: AttentionBackend,
    routing: RoutingSink,
    gathering: Gathering | None = None,
) -> tuple[ForwardBatch, StepBatch]:
    """Put a layout onto the device, and the tokens that the host does not know into their places."""
    tokens, draws = split_ints(staging.upload(layout.ints), layout.num_tokens, layout.num_draws)
    forward = ForwardBatch(
        token_ids_T=tokens.token_ids if layout.all_known else known_or_last(tokens, last_tokens_R),
        positions_T=tokens.positions,
        slots_T=tokens.slots,
        attention=attention.plan(layout.attention, staging.upload),
        routing=routing,
        gathering=gathering,
    )
    return forward, batch_of(layout, draws, staging)


def batch_of(layout: StepLayout, draws: PerDraw[torch.Tensor], staging: StepStaging) -> StepBatch:
    """Put what follows the forward pass onto the device; `draws` are the layout's, there already."""
    return StepBatch(
        draws=draws,
        sampling=None if layout.num_draws == 0 else sampling_of(layout, draws, staging.upload(layout.params_3S)),
        scored=None if layout.scored is None else _upload_scored(layout.scored, staging),
    )


def nothing_drawn(staging: StepStaging) -> StepBatch:
    """What follows a step without tokens."""
    nothing = staging.upload(np.zeros(0, dtype=np.int64))
    return StepBatch(PerDraw(*[nothing] * len(PerDraw._fields)), sampling=None, scored=None)


def padding_batch(
    num_tokens: int,
    kv_pool: KvPool,
    attention: AttentionBackend,
    upload: Callable[[npt.NDArray[Any]], torch.Tensor],
    routing: RoutingSink,
    gathering: Gathering | None = None,
) -> ForwardBatch:
    """One request of `num_tokens` zeros whose every page is the padding page: a step for compiling and measuring."""
    page_size = kv_pool.layout.page_size
    starts = np.array([0, num_tokens], dtype=np.int32)
    pages = np.full(num_pages_for(num_tokens, page_size), kv_pool.padding_page, dtype=np.int32)
    plan = AttentionPlan(starts, starts[1:], np.array([0, len(pages)], dtype=np.int32), pages)
    zeros_T = upload(np.zeros(num_tokens, dtype=np.int64))
    slots_T = zeros_T + kv_pool.padding_page * page_size
    return ForwardBatch(zeros_T, zeros_T, slots_T, attention.plan(plan, upload), routing, gathering=gathering)


def known_or_last(tokens: PerToken[torch.Tensor], last_tokens_R: torch.Tensor) -> torch.Tensor:
    """The tokens of a step, int64 `[T]`: those that only the device knows come from the table as it is when the step runs."""
    return torch.where(tokens.token_ids == ON_DEVICE, last_tokens_R[tokens.rows], tokens.token_ids)


def sampling_of(layout: StepLayout, draws: PerDraw[torch.Tensor], params_3S: torch.Tensor) -> SamplingBatch:
    """Put together what the sampler needs to know of the draws; `draws` and `params_3S` are the layout's, on the device."""
    temperatures_S, top_ps_S, min_ps_S = params_3S
    return SamplingBatch(
        temperatures_S=temperatures_S,
        top_ks_S=draws.top_ks,
        top_ps_S=top_ps_S,
        min_ps_S=min_ps_S,
        seeds_S=draws.seeds,
        positions_S=draws.positions,
        all_greedy=layout.all_greedy,
        any_filtered=layout.any_filtered,
    )


def _upload_scored(scored: ScoredLayout, staging: StepStaging) -> ScoredBatch:
    hidden_N, next_tokens_N = staging.upload(scored.ints_2N)
    return ScoredBatch(hidden_N, next_tokens_N, scored.top_count)
