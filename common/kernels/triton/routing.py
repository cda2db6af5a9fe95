"""Routing in Triton: each token's experts, their weights, and who goes where, in one launch that also writes the row.

Both ways through the expert products start from here: `common.kernels.triton.experts` for few tokens,
`common.kernels.triton.grouped_experts` for many. The twin is `common.kernels.reference.route`.

Shape letters: T tokens, E experts, K top-k; assignment t * K + k is the k-th expert of token t.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from common.kernels.triton.launch import overlapped


@dataclass(frozen=True, slots=True)
class Routing:
    """Who goes where: the result of `route`, on the device."""

    weights_TK: torch.Tensor
    """Weights of the chosen experts, in the hidden dtype."""
    ids_TK: torch.Tensor
    """The row of each token, in the capturer's dtype; a strided view of its buffer."""
    places_TK: torch.Tensor
    """int32: which of its expert's assignments this one is, from 0; in no particular order."""
    counts_E: torch.Tensor
    """int32: how many assignments each expert has."""
    members_ET: torch.Tensor
    """int32: each expert's assignments by place; only the first `counts_E` of each are set."""
    num_tokens: torch.Tensor | None
    """One int64: how many of the T are tokens, if the batch is padded."""


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
    weights_TK = torch.empty((total, top_k), dtype=logits_TE.dtype, device=device)
    places_TK = torch.empty((total, top_k), dtype=torch.int32, device=device)
    members_ET = torch.empty((num_experts, total), dtype=torch.int32, device=device)
    _route[(total,)](
        logits_TE,
        weights_TK,
        ids_TK,
        places_TK,
        counts_E,
        members_ET,
        num_tokens,
        ids_TK.stride(0),
        total,
        E=num_experts,
        E_BLOCK=triton.next_power_of_2(num_experts),
        K=top_k,
        K_BLOCK=triton.next_power_of_2(top_k),
        NORMALISE=norm_topk_prob,
        IS_PADDED=num_tokens is not None,
        num_warps=1,
        **overlapped(),
    )
    return Routing(weights_TK, ids_TK, places_TK, counts_E, members_ET, num_tokens)


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
    place = tl.atomic_add(counts + chosen, 1, mask=is_rank)
    tl.store(places + token * K + ranks, place, mask=is_rank)
    tl.store(members + chosen * capacity + place, (token * K + ranks).to(tl.int32), mask=is_rank)
