"""Routing in Triton: each token's experts, their weights, and who goes where, in one launch that also writes the row.

Both ways through the expert products start from here: `common.kernels.triton.experts` for few tokens,
`common.kernels.triton.grouped_experts` for many. Where tokens of other ranks run through this rank's experts, `choose` and `place`
do the two halves. The twin is `common.kernels.reference.route`.

Shape letters: T tokens, E experts (those that are here), K top-k, M attention groups; assignment t * K + k is the k-th expert of
token t.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from common.kernels.interface import Lanes
from common.kernels.triton.launch import overlapped

_ASSIGNMENTS_A_PROGRAM = 256


@dataclass(frozen=True, slots=True)
class Routing:
    """Who goes where: the result of `route` or of `place`, on the device."""

    weights_TK: torch.Tensor
    """Weights of the chosen experts, in the hidden dtype."""
    ids_TK: torch.Tensor
    """Of `route`: the row of each token, in the capturer's dtype; a strided view of its buffer. Of `place`: int32, from 0 for the
    first expert that is here; -1 for an assignment that goes nowhere, of which all else is unset."""
    places_TK: torch.Tensor
    """int32: which of its expert's assignments this one is, from 0; in no particular order."""
    counts_E: torch.Tensor
    """int32: how many assignments each expert has."""
    members_ET: torch.Tensor
    """int32: each expert's assignments by place; only the first `counts_E` of each are set."""
    num_tokens: torch.Tensor | None
    """One int64: how many of the T are tokens, if the batch is padded."""
    is_partial: bool
    """Whether some of the assignments may go nowhere, as `place` has found."""


def route(
    logits_TE: torch.Tensor,
    ids_TK: torch.Tensor,
    counts_E: torch.Tensor,
    *,
    norm_topk_prob: bool,
    num_tokens: torch.Tensor | None = None,
) -> Routing:
    """Choose each token's K likeliest experts, write them to `ids_TK` (any integer dtype, last dimension contiguous) and
    count them in `counts_E` (int32, zeros). The logits are of 16 bits, at most 65536 experts.

    Softmax and weights are computed in float32; of two equally likely experts the lower id comes first. `num_tokens` (one
    int64 on the device) is for padded batches: tokens from there on go nowhere, and nothing is written for them.
    """
    (total, num_experts), top_k = logits_TE.shape, ids_TK.shape[1]
    device = logits_TE.device
    places_TK = torch.empty((total, top_k), dtype=torch.int32, device=device)
    members_ET = torch.empty((num_experts, total), dtype=torch.int32, device=device)
    tables = places_TK, counts_E, members_ET
    weights_TK = _launch(logits_TE, ids_TK, tables, norm_topk_prob=norm_topk_prob, num_tokens=num_tokens)
    return Routing(weights_TK, ids_TK, *tables, num_tokens, is_partial=False)


def choose(
    logits_TE: torch.Tensor, ids_TK: torch.Tensor, *, norm_topk_prob: bool, num_tokens: torch.Tensor | None = None
) -> torch.Tensor:
    """Do as `route` does, but only choose; returns the weights `[T, K]`."""
    tables = None, None, None
    return _launch(logits_TE, ids_TK, tables, norm_topk_prob=norm_topk_prob, num_tokens=num_tokens)


def _launch(
    logits_TE: torch.Tensor,
    ids_TK: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | tuple[None, None, None],
    *,
    norm_topk_prob: bool,
    num_tokens: torch.Tensor | None,
) -> torch.Tensor:
    (total, num_experts), top_k = logits_TE.shape, ids_TK.shape[1]
    weights_TK = torch.empty((total, top_k), dtype=logits_TE.dtype, device=logits_TE.device)
    _route[(total,)](
        logits_TE,
        weights_TK,
        ids_TK,
        *tables,
        num_tokens,
        ids_TK.stride(0),
        total,
        E=num_experts,
        E_BLOCK=triton.next_power_of_2(num_experts),
        K=top_k,
        K_BLOCK=triton.next_power_of_2(top_k),
        NORMALISE=norm_topk_prob,
        IS_PADDED=num_tokens is not None,
        HAS_TABLES=tables[0] is not None,
        num_warps=1,
        **overlapped(),
    )
    return weights_TK


@triton.jit(
    do_not_specialize=["ids_stride", "capacity"], do_not_specialize_on_alignment=["ids", "num_tokens", "counts"]
)
def _route(
    logits,
    weights,
    ids,
    places,
    counts,
    members,
    num_tokens,
    ids_stride,
    capacity,
    E: tl.constexpr,
    E_BLOCK: tl.constexpr,
    K: tl.constexpr,
    K_BLOCK: tl.constexpr,
    NORMALISE: tl.constexpr,
    IS_PADDED: tl.constexpr,
    HAS_TABLES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    if IS_PADDED:
        if token >= tl.load(num_tokens):
            return
    experts = tl.arange(0, E_BLOCK)
    ranks = tl.arange(0, K_BLOCK)
    source = logits + token * E + experts
    logit = tl.load(source, mask=experts < E, other=-float("inf"))
    # Logit and expert in one number whose order is theirs: a higher logit first, of equal ones the lower expert.
    bits = logit.to(tl.int16, bitcast=True).to(tl.int32)
    key = (bits ^ ((bits >> 31) & 0x7FFF)) * 65536 + (65535 - experts)
    key = tl.where(experts < E, key, -0x80000000)
    best = tl.zeros([K_BLOCK], dtype=tl.int32)
    for k in tl.static_range(K):
        highest = tl.max(key, 0)
        best = tl.where(ranks == k, highest, best)
        key = tl.where(key == highest, -0x80000000, key)
    chosen = 65535 - (best & 0xFFFF)
    bits = best >> 16
    bits = bits ^ ((bits >> 31) & 0x7FFF)
    top = tl.max(logit.to(tl.float32), 0)
    weight = tl.exp(bits.to(tl.int16).to(logits.dtype.element_ty, bitcast=True).to(tl.float32) - top)
    is_rank = ranks < K
    if NORMALISE:
        weight = weight / tl.sum(tl.where(is_rank, weight, 0.0))
    else:
        weight = weight / tl.sum(tl.exp(logit.to(tl.float32) - top))
    tl.store(weights + token * K + ranks, weight, mask=is_rank)
    tl.store(ids + token * ids_stride + ranks, chosen, mask=is_rank)
    if HAS_TABLES:
        place = tl.atomic_add(counts + chosen, 1, mask=is_rank)
        tl.store(places + token * K + ranks, place, mask=is_rank)
        tl.store(members + chosen * capacity + place, (token * K + ranks).to(tl.int32), mask=is_rank)


def place(
    ids_TK: torch.Tensor, weights_TK: torch.Tensor, *, first_expert: int, num_experts: int, lanes: Lanes | None = None
) -> Routing:
    """Find who goes to the experts `[first_expert, first_expert + num_experts)`, which are here; all others go nowhere.

    The ids (any integer dtype, maybe strided) are those that `route` has chosen, maybe on other ranks; with `lanes`, what stands in
    a lane without a token goes nowhere.
    """
    total, top_k = ids_TK.shape
    device = ids_TK.device
    local_TK = torch.empty((total, top_k), dtype=torch.int32, device=device)
    places_TK = torch.empty_like(local_TK)
    counts_E = torch.zeros(num_experts, dtype=torch.int32, device=device)
    members_ET = torch.empty((num_experts, total), dtype=torch.int32, device=device)
    _place[(triton.cdiv(total * top_k, _ASSIGNMENTS_A_PROGRAM),)](
        ids_TK,
        None if lanes is None else lanes.num_tokens_M,
        local_TK,
        places_TK,
        counts_E,
        members_ET,
        first_expert,
        num_experts,
        1 if lanes is None else lanes.per_group,
        *ids_TK.stride(),
        total,
        K=top_k,
        HAS_LANES=lanes is not None,
        BLOCK=_ASSIGNMENTS_A_PROGRAM,
        num_warps=4,
        **overlapped(),
    )
    return Routing(weights_TK, local_TK, places_TK, counts_E, members_ET, None, is_partial=True)


@triton.jit(
    do_not_specialize=["first_expert", "num_experts", "per_group", "token_stride", "capacity"],
    do_not_specialize_on_alignment=["ids", "num_tokens"],
)
def _place(
    ids,
    num_tokens,
    local,
    places,
    counts,
    members,
    first_expert,
    num_experts,
    per_group,
    token_stride,
    rank_stride,
    capacity,
    K: tl.constexpr,
    HAS_LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    assignment = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = assignment // K
    is_assignment = token < capacity
    is_here = is_assignment
    if HAS_LANES:
        held = tl.load(num_tokens + token // per_group, mask=is_assignment, other=0)
        is_here = is_here & (token % per_group < held)
    source = ids + token.to(tl.int64) * token_stride + assignment % K * rank_stride
    expert = tl.load(source, mask=is_here, other=0).to(tl.int32) - first_expert
    is_here = is_here & (expert >= 0) & (expert < num_experts)
    tl.store(local + assignment, tl.where(is_here, expert, -1), mask=is_assignment)
    place = tl.atomic_add(counts + expert, 1, mask=is_here)
    tl.store(places + assignment, place, mask=is_here)
    tl.store(members + expert * capacity + place, assignment, mask=is_here)
