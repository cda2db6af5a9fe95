"""The expert products for few tokens, in Triton.

Few tokens read far more weights than they compute with. So each program streams one slab of one expert's weights past the tokens
that chose it. SiLU and the routing weight are folded in; the sum over a token's experts is left to the norm that follows. What goes
nowhere (see `place` in `common.kernels.triton.routing`) is skipped and its part of the result unset:
`common.kernels.triton.layer.add_up` skips it too. Of float8 weights half the bytes are streamed, past tokens that every program
quantises for itself: there are few of them, and a launch that did it once would cost more.

Neighbours: `common.kernels.triton.single_experts` (still fewer), `common.kernels.triton.grouped_experts` and
`common.kernels.triton.grouped_fp8` (more).

Shape letters: T tokens, D hidden size, E experts, K top-k, I expert width, A = T * K assignments; assignment t * K + k is the
k-th expert of token t. The twin is `common.kernels.reference.moe_experts`; launch parameters are in `configs`.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from common.kernels.interface import FP8_BLOCK, ExpertMatrices
from common.kernels.triton.fp8 import quantise
from common.kernels.triton.launch import overlapped
from common.kernels.triton.routing import Routing
from common.kernels.triton.tuning import ExpertShape, Tile, best_of, tuned_for


def few_tokens(
    hidden_TD: torch.Tensor, routing: Routing, gate_up_E2ID: ExpertMatrices, down_EDI: ExpertMatrices
) -> torch.Tensor:
    """Run tokens through their experts; returns their weighted outputs `[T, K, D]`, not yet added up."""
    shape = ExpertShape.of(down_EDI, routing.ids_TK.shape[1])
    tiles = best_of(tuned_for(shape).tiles, len(hidden_TD))
    inner_AI = gate_up(hidden_TD, routing, gate_up_E2ID, tiles.gate_up)
    return down(inner_AI, routing, down_EDI, tiles.down)


def gate_up(hidden_TD: torch.Tensor, routing: Routing, gate_up_E2ID: ExpertMatrices, tile: Tile) -> torch.Tensor:
    """`silu(gate) * up` of every assignment, `[A, I]`."""
    total, top_k = routing.ids_TK.shape
    num_experts, width2, hidden_size = gate_up_E2ID.weight.shape
    width = width2 // 2
    inner_AI = torch.empty((total * top_k, width), dtype=hidden_TD.dtype, device=hidden_TD.device)
    num_slabs = triton.cdiv(width, tile.n)
    _gate_up[(num_experts * num_slabs,)](
        hidden_TD,
        TensorDescriptor.from_tensor(gate_up_E2ID.weight.flatten(0, 1), [tile.n, tile.k]),
        gate_up_E2ID.scale,
        inner_AI,
        routing.counts_E,
        routing.members_ET,
        total,
        D=hidden_size,
        I=width,
        K=top_k,
        NUM_SLABS=num_slabs,
        FP8_BLOCK=FP8_BLOCK,
        IS_FP8=gate_up_E2ID.scale is not None,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **overlapped(),
    )
    return inner_AI


def down(inner_AI: torch.Tensor, routing: Routing, down_EDI: ExpertMatrices, tile: Tile) -> torch.Tensor:
    """The experts' second product times the assignments' weights, `[T, K, D]`."""
    total, top_k = routing.ids_TK.shape
    num_experts, hidden_size, width = down_EDI.weight.shape
    out_TKD = torch.empty((total, top_k, hidden_size), dtype=inner_AI.dtype, device=inner_AI.device)
    num_slabs = triton.cdiv(hidden_size, tile.n)
    _down[(num_experts * num_slabs,)](
        inner_AI,
        TensorDescriptor.from_tensor(down_EDI.weight.flatten(0, 1), [tile.n, tile.k]),
        down_EDI.scale,
        out_TKD,
        routing.weights_TK,
        routing.counts_E,
        routing.members_ET,
        total,
        D=hidden_size,
        I=width,
        NUM_SLABS=num_slabs,
        FP8_BLOCK=FP8_BLOCK,
        IS_FP8=down_EDI.scale is not None,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **overlapped(),
    )
    return out_TKD


# A program owns BLOCK_N rows of one expert's weights and takes them past that expert's tokens, BLOCK_M at a time. The product
# is weights by tokens, not tokens by weights: that puts the long side where the tensor cores want 64 rows, and few tokens cost
# no padding. The weights' tiles come by the copy engine, and may reach into the next expert: those rows are never stored.


@triton.jit(do_not_specialize=["capacity"], do_not_specialize_on_alignment=["counts"])
def _gate_up(
    hidden,
    weight,
    scales,
    inner,
    counts,
    members,
    capacity,
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    K: tl.constexpr,
    NUM_SLABS: tl.constexpr,
    FP8_BLOCK: tl.constexpr,
    IS_FP8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.program_id(0) // NUM_SLABS
    count = tl.load(counts + expert)
    if count == 0:
        return
    first_row = (tl.program_id(0) % NUM_SLABS) * BLOCK_N
    rows = first_row + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    if IS_FP8:
        tl.static_assert(BLOCK_K == FP8_BLOCK and FP8_BLOCK % BLOCK_N == 0)
        gate_scales = scales + (expert * 2 * I + first_row) // FP8_BLOCK * (D // FP8_BLOCK)
        up_scales = gate_scales + I // FP8_BLOCK * (D // FP8_BLOCK)
    for first in range(0, count, BLOCK_M):
        places = first + tl.arange(0, BLOCK_M)
        is_member = places < count
        assignments = tl.load(members + expert * capacity + places, mask=is_member, other=0)
        tokens = hidden + (assignments // K).to(tl.int64)[None, :] * D
        gate = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        up = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        for k0 in range(0, D, BLOCK_K):
            k = k0 + ks
            mask = is_member[None, :] if D % BLOCK_K == 0 else is_member[None, :] & (k < D)[:, None]
            x = tl.load(tokens + k[:, None], mask=mask, other=0.0)
            if IS_FP8:
                gate_scale = tl.load(gate_scales + k0 // FP8_BLOCK)
                up_scale = tl.load(up_scales + k0 // FP8_BLOCK)
                x, x_scale = quantise(x, 0)
                gate_product = tl.dot(weight.load([expert * 2 * I + first_row, k0]), x)
                up_product = tl.dot(weight.load([expert * 2 * I + I + first_row, k0]), x)
                gate += gate_product * x_scale[None, :] * gate_scale
                up += up_product * x_scale[None, :] * up_scale
            else:
                gate = tl.dot(weight.load([expert * 2 * I + first_row, k0]), x, gate)
                up = tl.dot(weight.load([expert * 2 * I + I + first_row, k0]), x, up)
        out = inner + assignments.to(tl.int64)[None, :] * I + rows[:, None]
        activated = (gate * tl.sigmoid(gate) * up).to(inner.dtype.element_ty)
        tl.store(out, activated, mask=is_member[None, :] & (rows < I)[:, None])


@triton.jit(do_not_specialize=["capacity"], do_not_specialize_on_alignment=["counts"])
def _down(
    inner,
    weight,
    scales,
    out,
    assignment_weights,
    counts,
    members,
    capacity,
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    NUM_SLABS: tl.constexpr,
    FP8_BLOCK: tl.constexpr,
    IS_FP8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.program_id(0) // NUM_SLABS
    count = tl.load(counts + expert)
    if count == 0:
        return
    first_row = (tl.program_id(0) % NUM_SLABS) * BLOCK_N
    rows = first_row + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    if IS_FP8:
        tl.static_assert(BLOCK_K == FP8_BLOCK and FP8_BLOCK % BLOCK_N == 0)
        row_scales = scales + (expert * D + first_row) // FP8_BLOCK * (I // FP8_BLOCK)
    for first in range(0, count, BLOCK_M):
        places = first + tl.arange(0, BLOCK_M)
        is_member = places < count
        assignments = tl.load(members + expert * capacity + places, mask=is_member, other=0)
        inputs = inner + assignments.to(tl.int64)[None, :] * I
        product = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        for k0 in range(0, I, BLOCK_K):
            k = k0 + ks
            mask = is_member[None, :] if I % BLOCK_K == 0 else is_member[None, :] & (k < I)[:, None]
            x = tl.load(inputs + k[:, None], mask=mask, other=0.0)
            if IS_FP8:
                scale = tl.load(row_scales + k0 // FP8_BLOCK)
                x, x_scale = quantise(x, 0)
                product += tl.dot(weight.load([expert * D + first_row, k0]), x) * (scale * x_scale)[None, :]
            else:
                product = tl.dot(weight.load([expert * D + first_row, k0]), x, product)
        factor = tl.load(assignment_weights + assignments, mask=is_member, other=0.0).to(tl.float32)
        target = out + assignments.to(tl.int64)[None, :] * D + rows[:, None]
        weighted = (product * factor[None, :]).to(out.dtype.element_ty)
        tl.store(target, weighted, mask=is_member[None, :] & (rows < D)[:, None])
