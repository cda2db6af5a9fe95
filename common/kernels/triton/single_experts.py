"""The expert products for a token or two, in Triton: each assignment for itself, past the rows of its expert's weights.

Hardly two of so few tokens share an expert, so little is read twice, and no tensor core is waited for. Activations stay as they
are for float8 weights too. What goes nowhere is skipped as in `common.kernels.triton.experts`, whose shape letters these are too.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from common.kernels.interface import FP8_BLOCK, ExpertMatrices
from common.kernels.triton.launch import overlapped
from common.kernels.triton.routing import Routing

# Of one token's experts of 16 bits on an H200: 13.8 and 7.9 us with these, 17.5 and 10.6 with tiles for the tensor cores.
_GATE_UP_ROWS = 4
_DOWN_ROWS = 16


def single_tokens(
    hidden_TD: torch.Tensor, routing: Routing, gate_up_E2ID: ExpertMatrices, down_EDI: ExpertMatrices
) -> torch.Tensor:
    """Run tokens through their experts; returns their weighted outputs `[T, K, D]`, not yet added up."""
    ids_TK = routing.ids_TK
    (total, top_k), (_, hidden_size, width) = ids_TK.shape, down_EDI.weight.shape
    num_assignments = total * top_k
    inner_AI = hidden_TD.new_empty((num_assignments, width))
    out_TKD = hidden_TD.new_empty((total, top_k, hidden_size))
    sizes = {"D": hidden_size, "I": width, "K": top_k, "FP8_BLOCK": FP8_BLOCK}
    _single_gate_up[(num_assignments, triton.cdiv(width, _GATE_UP_ROWS))](
        hidden_TD,
        gate_up_E2ID.weight,
        gate_up_E2ID.scale,
        inner_AI,
        ids_TK,
        routing.num_tokens,
        ids_TK.stride(0),
        ROWS=_GATE_UP_ROWS,
        BLOCK=min(1024, triton.next_power_of_2(hidden_size)),
        IS_FP8=down_EDI.scale is not None,
        IS_PADDED=routing.num_tokens is not None,
        num_warps=2,
        **sizes,
        **overlapped(),
    )
    _single_down[(num_assignments, triton.cdiv(hidden_size, _DOWN_ROWS))](
        inner_AI,
        down_EDI.weight,
        down_EDI.scale,
        out_TKD,
        routing.weights_TK,
        ids_TK,
        routing.num_tokens,
        ids_TK.stride(0),
        ROWS=_DOWN_ROWS,
        BLOCK=min(256, triton.next_power_of_2(width)),
        IS_FP8=down_EDI.scale is not None,
        IS_PADDED=routing.num_tokens is not None,
        num_warps=2,
        **sizes,
        **overlapped(),
    )
    return out_TKD


@triton.jit(do_not_specialize=["ids_stride"], do_not_specialize_on_alignment=["ids", "num_tokens"])
def _single_gate_up(
    hidden,
    weight,
    scales,
    inner,
    ids,
    num_tokens,
    ids_stride,
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    K: tl.constexpr,
    FP8_BLOCK: tl.constexpr,
    IS_FP8: tl.constexpr,
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
    if expert < 0:
        return
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
        if IS_FP8:
            # All rows of a program are in one row of blocks.
            block = (expert * (2 * I) + tl.program_id(1) * ROWS) // FP8_BLOCK * (D // FP8_BLOCK) + k0 // FP8_BLOCK
            num_blocks = (D - k0) // FP8_BLOCK
            gate += _sum_scaled(first * x, scales + block, num_blocks, ROWS, BLOCK, FP8_BLOCK)
            block += I // FP8_BLOCK * (D // FP8_BLOCK)
            up += _sum_scaled(second * x, scales + block, num_blocks, ROWS, BLOCK, FP8_BLOCK)
        else:
            gate += tl.sum(first * x, 1)
            up += tl.sum(second * x, 1)
    activated = gate * tl.sigmoid(gate) * up
    tl.store(inner + assignment * I + rows, activated.to(inner.dtype.element_ty), mask=rows < I)


@triton.jit(do_not_specialize=["ids_stride"], do_not_specialize_on_alignment=["ids", "num_tokens"])
def _single_down(
    inner,
    weight,
    scales,
    out,
    assignment_weights,
    ids,
    num_tokens,
    ids_stride,
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    K: tl.constexpr,
    FP8_BLOCK: tl.constexpr,
    IS_FP8: tl.constexpr,
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
    if expert < 0:
        return
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    ks = tl.arange(0, BLOCK)
    weight_rows = weight + expert * (D * I) + rows[:, None] * I
    product = tl.zeros([ROWS], dtype=tl.float32)
    for k0 in tl.static_range(0, I, BLOCK):
        k = k0 + ks
        mask = (rows < D)[:, None] & (k < I)[None, :]
        row = tl.load(weight_rows + k[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(inner + assignment * I + k, mask=k < I, other=0.0).to(tl.float32)[None, :]
        if IS_FP8:
            block = (expert * D + tl.program_id(1) * ROWS) // FP8_BLOCK * (I // FP8_BLOCK) + k0 // FP8_BLOCK
            num_blocks = (I - k0) // FP8_BLOCK
            product += _sum_scaled(row * x, scales + block, num_blocks, ROWS, BLOCK, FP8_BLOCK)
        else:
            product += tl.sum(row * x, 1)
    scale = tl.load(assignment_weights + assignment).to(tl.float32)
    tl.store(out + assignment * D + rows, (product * scale).to(out.dtype.element_ty), mask=rows < D)


@triton.jit
def _sum_scaled(products, scales, num_blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FP8_BLOCK: tl.constexpr):
    """Add up each row, every block of its columns times its scale."""
    blocks = tl.arange(0, COLUMNS // FP8_BLOCK)
    scale = tl.load(scales + blocks, mask=blocks < num_blocks, other=0.0)
    sums = tl.sum(tl.reshape(products, [ROWS, COLUMNS // FP8_BLOCK, FP8_BLOCK]), 2)
    return tl.sum(sums * scale[None, :], 1)
