"""The expert products for many tokens: sorted by expert in Triton, then through torch's grouped product.

Shape letters as in `common.kernels.triton.experts`.
"""

import torch
import torch.nn.functional as F  # noqa: N812
import triton
import triton.language as tl

from common.kernels.interface import ExpertMatrices
from common.kernels.triton.routing import Routing


def many_tokens(
    hidden_TD: torch.Tensor, routing: Routing, gate_up_E2ID: ExpertMatrices, down_EDI: ExpertMatrices
) -> torch.Tensor:
    """Run tokens through their experts, sorted by expert; returns the sums of their weighted outputs `[T, D]`.

    What goes nowhere has no row among the sorted: as many of the last ones are unset, and nobody reads them.
    """
    (total, hidden_size), top_k = hidden_TD.shape, routing.ids_TK.shape[1]
    width = down_EDI.weight.shape[2]
    ends_E = routing.counts_E.cumsum(0, dtype=torch.int32)
    sorted_AD = hidden_TD.new_empty((total * top_k, hidden_size))
    # Becomes the places among all assignments; -1 for what goes nowhere.
    places_TK = torch.empty_like(routing.places_TK)
    block = triton.next_power_of_2(hidden_size)
    ids_TK = routing.ids_TK
    _scatter[(total,)](
        hidden_TD,
        sorted_AD,
        ids_TK,
        routing.places_TK,
        routing.counts_E,
        ends_E,
        places_TK,
        ids_TK.stride(0),
        D=hidden_size,
        D_BLOCK=block,
        K=top_k,
        num_warps=4,
    )
    gate_up_A2I = F.grouped_mm(sorted_AD, gate_up_E2ID.weight.transpose(1, 2), offs=ends_E)
    inner_AI = hidden_TD.new_empty((total * top_k, width))
    _silu_and_mul[(total * top_k,)](
        gate_up_A2I,
        inner_AI,
        ends_E[-1:] if routing.is_partial else None,
        I=width,
        I_BLOCK=triton.next_power_of_2(width),
        IS_PARTIAL=routing.is_partial,
        num_warps=4,
    )
    out_AD = F.grouped_mm(inner_AI, down_EDI.weight.transpose(1, 2), offs=ends_E)
    return gather_sum(out_AD, places_TK, routing.weights_TK)


def gather_sum(out_AD: torch.Tensor, places_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """The sums of each token's outputs times their weights, `[T, D]`; outputs are sorted, and places of -1 are nowhere."""
    (total, top_k), hidden_size = places_TK.shape, out_AD.shape[1]
    out_TD = out_AD.new_empty((total, hidden_size))
    _gather_sum[(total,)](
        out_AD,
        out_TD,
        places_TK,
        weights_TK,
        D=hidden_size,
        D_BLOCK=triton.next_power_of_2(hidden_size),
        K=top_k,
        num_warps=4,
    )
    return out_TD


@triton.jit(do_not_specialize=["ids_stride"], do_not_specialize_on_alignment=["ids", "counts"])
def _scatter(
    hidden,
    sorted_hidden,
    ids,
    places,
    counts,
    ends,
    sorted_places,
    ids_stride,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, D_BLOCK)
    is_column = columns < D
    x = tl.load(hidden + token * D + columns, mask=is_column)
    for k in tl.static_range(K):
        expert = tl.load(ids + token * ids_stride + k).to(tl.int32)
        if expert >= 0:
            place = tl.load(ends + expert) - tl.load(counts + expert) + tl.load(places + token * K + k)
            tl.store(sorted_hidden + place.to(tl.int64) * D + columns, x, mask=is_column)
            tl.store(sorted_places + token * K + k, place)
        else:
            tl.store(sorted_places + token * K + k, -1)


@triton.jit(do_not_specialize_on_alignment=["num_rows"])
def _silu_and_mul(
    gate_up,
    inner,
    num_rows,
    I: tl.constexpr,  # noqa: E741
    I_BLOCK: tl.constexpr,
    IS_PARTIAL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if IS_PARTIAL:
        if row >= tl.load(num_rows):
            return
    columns = tl.arange(0, I_BLOCK)
    is_column = columns < I
    gate = tl.load(gate_up + row * 2 * I + columns, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * I + I + columns, mask=is_column, other=0.0).to(tl.float32)
    tl.store(inner + row * I + columns, (gate * tl.sigmoid(gate) * up).to(inner.dtype.element_ty), mask=is_column)


@triton.jit
def _gather_sum(outputs, out, places, weights, D: tl.constexpr, D_BLOCK: tl.constexpr, K: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, D_BLOCK)
    is_column = columns < D
    total = tl.zeros([D_BLOCK], dtype=tl.float32)
    for k in tl.static_range(K):
        place = tl.load(places + token * K + k).to(tl.int64)
        is_here = place >= 0
        weight = tl.load(weights + token * K + k, mask=is_here, other=0.0).to(tl.float32)
        is_read = columns < tl.where(is_here, D, 0)
        total += weight * tl.load(outputs + place * D + columns, mask=is_read, other=0.0).to(tl.float32)
    tl.store(out + token * D + columns, total.to(out.dtype.element_ty), mask=is_column)
