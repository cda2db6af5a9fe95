"""The expert products for few tokens, in Triton.

Few tokens read far more weights than they compute with. So each program streams one slab of one expert's weights past the tokens
that chose it (`few_tokens`); with a token or two, hardly two of which share an expert, past one of them (`single_tokens`). SiLU and
the routing weight are folded in; the sum over a token's experts is left to the norm that follows.

Shape letters: T tokens, D hidden size, E experts, K top-k, I expert width, A = T * K assignments; assignment t * K + k is the
k-th expert of token t. The twin is `common.kernels.reference.moe_experts`; launch parameters are in `configs`.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from common.kernels.triton.launch import overlapped
from common.kernels.triton.routing import Routing
from common.kernels.triton.tuning import Tile, tiles_for

# Of one token's experts on an H200: 13.8 and 7.9 us with these, 17.5 and 10.6 with tiles for the tensor cores.
_SINGLE_GATE_UP_ROWS = 4
_SINGLE_DOWN_ROWS = 16

# ------------------------------------------------------------------------------------------------ few tokens


def few_tokens(
    hidden_TD: torch.Tensor, routing: Routing, gate_up_E2ID: torch.Tensor, down_EDI: torch.Tensor
) -> torch.Tensor:
    """Run tokens through their experts; returns their weighted outputs `[T, K, D]`, not yet added up."""
    num_experts, hidden_size, width = down_EDI.shape
    tiles = tiles_for(
        len(hidden_TD),
        num_experts=num_experts,
        top_k=routing.ids_TK.shape[1],
        hidden_size=hidden_size,
        width=width,
    )
    inner_AI = gate_up(hidden_TD, routing, gate_up_E2ID, tiles.gate_up)
    return down(inner_AI, routing, down_EDI, tiles.down)


def gate_up(hidden_TD: torch.Tensor, routing: Routing, gate_up_E2ID: torch.Tensor, tile: Tile) -> torch.Tensor:
    """`silu(gate) * up` of every assignment, `[A, I]`."""
    total, top_k = routing.ids_TK.shape
    num_experts, width2, hidden_size = gate_up_E2ID.shape
    width = width2 // 2
    inner_AI = torch.empty((total * top_k, width), dtype=hidden_TD.dtype, device=hidden_TD.device)
    num_slabs = triton.cdiv(width, tile.n)
    _gate_up[(num_experts * num_slabs,)](
        hidden_TD,
        TensorDescriptor.from_tensor(gate_up_E2ID.flatten(0, 1), [tile.n, tile.k]),
        inner_AI,
        routing.counts_E,
        routing.members_ET,
        total,
        D=hidden_size,
        I=width,
        K=top_k,
        NUM_SLABS=num_slabs,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **overlapped(),
    )
    return inner_AI


def down(inner_AI: torch.Tensor, routing: Routing, down_EDI: torch.Tensor, tile: Tile) -> torch.Tensor:
    """The experts' second product times the assignments' weights, `[T, K, D]`."""
    total, top_k = routing.ids_TK.shape
    num_experts, hidden_size, width = down_EDI.shape
    out_TKD = torch.empty((total, top_k, hidden_size), dtype=inner_AI.dtype, device=inner_AI.device)
    num_slabs = triton.cdiv(hidden_size, tile.n)
    _down[(num_experts * num_slabs,)](
        inner_AI,
        TensorDescriptor.from_tensor(down_EDI.flatten(0, 1), [tile.n, tile.k]),
        out_TKD,
        routing.weights_TK,
        routing.counts_E,
        routing.members_ET,
        total,
        D=hidden_size,
        I=width,
        NUM_SLABS=num_slabs,
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
    inner,
    counts,
    members,
    capacity,
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    K: tl.constexpr,
    NUM_SLABS: tl.constexpr,
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
            gate = tl.dot(weight.load([expert * 2 * I + first_row, k0]), x, gate)
            up = tl.dot(weight.load([expert * 2 * I + I + first_row, k0]), x, up)
        out = inner + assignments.to(tl.int64)[None, :] * I + rows[:, None]
        activated = (gate * tl.sigmoid(gate) * up).to(inner.dtype.element_ty)
        tl.store(out, activated, mask=is_member[None, :] & (rows < I)[:, None])


@triton.jit(do_not_specialize=["capacity"], do_not_specialize_on_alignment=["counts"])
def _down(
    inner,
    weight,
    out,
    assignment_weights,
    counts,
    members,
    capacity,
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    NUM_SLABS: tl.constexpr,
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
            product = tl.dot(weight.load([expert * D + first_row, k0]), x, product)
        scale = tl.load(assignment_weights + assignments, mask=is_member, other=0.0).to(tl.float32)
        target = out + assignments.to(tl.int64)[None, :] * D + rows[:, None]
        weighted = (product * scale[None, :]).to(out.dtype.element_ty)
        tl.store(target, weighted, mask=is_member[None, :] & (rows < D)[:, None])


# ------------------------------------------------------------------------------------------------ a token or two


def single_tokens(
    hidden_TD: torch.Tensor, routing: Routing, gate_up_E2ID: torch.Tensor, down_EDI: torch.Tensor
) -> torch.Tensor:
    """Do as `few_tokens` does for so few that hardly two of them share an expert: each assignment for itself."""
    ids_TK = routing.ids_TK
    (total, top_k), (_, hidden_size, width) = ids_TK.shape, down_EDI.shape
    num_assignments = total * top_k
    inner_AI = hidden_TD.new_empty((num_assignments, width))
    out_TKD = hidden_TD.new_empty((total, top_k, hidden_size))
    sizes = {"D": hidden_size, "I": width, "K": top_k, "IS_PADDED": routing.num_tokens is not None}
    _single_gate_up[(num_assignments, triton.cdiv(width, _SINGLE_GATE_UP_ROWS))](
        hidden_TD,
        gate_up_E2ID,
        inner_AI,
        ids_TK,
        routing.num_tokens,
        ids_TK.stride(0),
        ROWS=_SINGLE_GATE_UP_ROWS,
        BLOCK=min(1024, triton.next_power_of_2(hidden_size)),
        num_warps=2,
        **sizes,
        **overlapped(),
    )
    _single_down[(num_assignments, triton.cdiv(hidden_size, _SINGLE_DOWN_ROWS))](
        inner_AI,
        down_EDI,
        out_TKD,
        routing.weights_TK,
        ids_TK,
        routing.num_tokens,
        ids_TK.stride(0),
        ROWS=_SINGLE_DOWN_ROWS,
        BLOCK=min(256, triton.next_power_of_2(width)),
        num_warps=2,
        **sizes,
        **overlapped(),
    )
    return out_TKD


@triton.jit(do_not_specialize=["ids_stride"], do_not_specialize_on_alignment=["ids", "num_tokens"])
def _single_gate_up(
    hidden,
    weight,
    inner,
    ids,
    num_tokens,
    ids_stride,
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    K: tl.constexpr,
    IS_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    assignment = tl.program_id(0).to(tl.int64)
    token = assignment // K
    if IS_PADDED:
        if token >= tl.load(num_tokens):
            return
    expert = tl.load(ids + token * ids_stride + assignment % K).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    ks = tl.arange(0, BLOCK)
    gate_rows = weight + expert * (2 * I * D) + rows[:, None] * D
    gate = tl.zeros([ROWS], dtype=tl.float32)
    up = tl.zeros([ROWS], dtype=tl.float32)
    for k0 in tl.static_range(0, D, BLOCK):
        k = k0 + ks
        mask = (rows < I)[:, None] & (k < D)[None, :]
        first = tl.load(gate_rows + k[None, :], mask=mask, other=0.0).to(tl.float32)
        second = tl.load(gate_rows + I * D + k[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(hidden + token * D + k, mask=k < D, other=0.0).to(tl.float32)[None, :]
        gate += tl.sum(first * x, 1)
        up += tl.sum(second * x, 1)
    activated = gate * tl.sigmoid(gate) * up
    tl.store(inner + assignment * I + rows, activated.to(inner.dtype.element_ty), mask=rows < I)


@triton.jit(do_not_specialize=["ids_stride"], do_not_specialize_on_alignment=["ids", "num_tokens"])
def _single_down(
    inner,
    weight,
    out,
    assignment_weights,
    ids,
    num_tokens,
    ids_stride,
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    K: tl.constexpr,
    IS_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    assignment = tl.program_id(0).to(tl.int64)
    token = assignment // K
    if IS_PADDED:
        if token >= tl.load(num_tokens):
            return
    expert = tl.load(ids + token * ids_stride + assignment % K).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    ks = tl.arange(0, BLOCK)
    weight_rows = weight + expert * (D * I) + rows[:, None] * I
    product = tl.zeros([ROWS], dtype=tl.float32)
    for k0 in tl.static_range(0, I, BLOCK):
        k = k0 + ks
        mask = (rows < D)[:, None] & (k < I)[None, :]
        row = tl.load(weight_rows + k[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(inner + assignment * I + k, mask=k < I, other=0.0).to(tl.float32)[None, :]
        product += tl.sum(row * x, 1)
    scale = tl.load(assignment_weights + assignment).to(tl.float32)
    tl.store(out + assignment * D + rows, (product * scale).to(out.dtype.element_ty), mask=rows < D)
