"""The expert products for many tokens with float8 weights, in Triton: quantised and sorted by expert, then tile by tile.

Which rows of which expert a tile has is a table made on the device, of as many tiles as any counts could need; those that are left
over end at once. Activations are quantised where they are written: on their way into order, and after SiLU.

Shape letters as in `common.kernels.triton.experts`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from common.kernels.interface import FP8_BLOCK, ExpertMatrices
from common.kernels.triton.fp8 import quantise
from common.kernels.triton.grouped_experts import gather_sum
from common.kernels.triton.routing import Routing
from common.kernels.triton.tuning import ExpertShape, Tile, Tiles, best_of, tuned_for

_TILES_AT_A_TIME = 64


def many_tokens(
    hidden_TD: torch.Tensor, routing: Routing, gate_up_E2ID: ExpertMatrices, down_EDI: ExpertMatrices
) -> torch.Tensor:
    """Run tokens through their experts, sorted by expert; returns the sums of their weighted outputs `[T, D]`."""
    shape = ExpertShape.of(down_EDI, routing.ids_TK.shape[1])
    return in_tiles(hidden_TD, routing, gate_up_E2ID, down_EDI, best_of(tuned_for(shape).grouped, len(hidden_TD)))


def in_tiles(
    hidden_TD: torch.Tensor, routing: Routing, gate_up_E2ID: ExpertMatrices, down_EDI: ExpertMatrices, tiles: Tiles
) -> torch.Tensor:
    """Do what `many_tokens` does in tiles of these sizes."""
    assert tiles.gate_up.m == tiles.down.m
    order = make_order(routing, tiles.gate_up.m)
    inner = gate_up(scatter(hidden_TD, routing, order), order, gate_up_E2ID, tiles.gate_up, hidden_TD.dtype)
    out_AD = down(inner, order, down_EDI, tiles.down, hidden_TD.dtype)
    return gather_sum(out_AD, order.places_TK, routing.weights_TK)


class Order(NamedTuple):
    """Where everything is among the assignments sorted by expert. What goes nowhere has no row: as many of the last are unset."""

    starts_E: torch.Tensor
    """int32: each expert's first row."""
    tiles: torch.Tensor
    """int32 `[3, tiles]`: expert (-1: there is no such tile), first row, and where the expert's rows end."""
    places_TK: torch.Tensor
    """int32: each assignment's row, -1 for what goes nowhere; set by `scatter`."""


class Quantised(NamedTuple):
    """Activations of all assignments in order: float8, and float32 scales, group by group."""

    stored_AD: torch.Tensor
    scale: torch.Tensor
    """`[D / FP8_BLOCK, A]`."""


def make_order(routing: Routing, tile_rows: int) -> Order:
    """Divide each expert's rows into tiles of `tile_rows`."""
    num_experts, num_assignments = len(routing.counts_E), routing.places_TK.numel()
    num_tiles = num_assignments // tile_rows + min(num_experts, num_assignments)
    starts_E = torch.empty_like(routing.counts_E)
    tiles = torch.empty((3, num_tiles), dtype=torch.int32, device=starts_E.device)
    _make_order[(num_experts,)](
        routing.counts_E,
        starts_E,
        tiles,
        num_tiles,
        E=num_experts,
        E_BLOCK=triton.next_power_of_2(num_experts),
        BLOCK_M=tile_rows,
        BLOCK=_TILES_AT_A_TIME,
        num_warps=1,
    )
    return Order(starts_E, tiles, torch.empty_like(routing.places_TK))


def scatter(hidden_TD: torch.Tensor, routing: Routing, order: Order) -> Quantised:
    """Quantise each token once and write it to the rows of all of its assignments."""
    (total, hidden_size), top_k = hidden_TD.shape, routing.ids_TK.shape[1]
    sorted_x = empty(total * top_k, hidden_size, hidden_TD.device)
    _quantise_scatter[(total,)](
        hidden_TD,
        *sorted_x,
        routing.ids_TK,
        routing.places_TK,
        order.starts_E,
        order.places_TK,
        routing.ids_TK.stride(0),
        total * top_k,
        D=hidden_size,
        GROUPS=hidden_size // FP8_BLOCK,
        GROUPS_BLOCK=triton.next_power_of_2(hidden_size // FP8_BLOCK),
        FP8_BLOCK=FP8_BLOCK,
        K=top_k,
        num_warps=4,
    )
    return sorted_x


def gate_up(x: Quantised, order: Order, gate_up_E2ID: ExpertMatrices, tile: Tile, dtype: torch.dtype) -> Quantised:
    """`silu(gate) * up` of every assignment, rounded to `dtype` as everywhere and then quantised. Tiles have `n` FP8_BLOCK."""
    (num_rows, hidden_size), width = x.stored_AD.shape, gate_up_E2ID.weight.shape[1] // 2
    inner = empty(num_rows, width, x.stored_AD.device)
    num_slabs = width // tile.n
    _grouped_gate_up[(order.tiles.shape[1] * num_slabs,)](
        TensorDescriptor.from_tensor(x.stored_AD, [tile.m, tile.k]),
        x.scale,
        TensorDescriptor.from_tensor(gate_up_E2ID.weight.flatten(0, 1), [tile.n, tile.k]),
        gate_up_E2ID.scale,
        *inner,
        order.tiles,
        order.tiles.shape[1],
        num_rows,
        D=hidden_size,
        I=width,
        IS_BFLOAT16=dtype == torch.bfloat16,
        NUM_SLABS=num_slabs,
        BLOCK_M=tile.m,
        FP8_BLOCK=FP8_BLOCK,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return inner


def down(inner: Quantised, order: Order, down_EDI: ExpertMatrices, tile: Tile, dtype: torch.dtype) -> torch.Tensor:
    """The experts' second product, `[A, D]` in order, not yet times the assignments' weights."""
    (num_rows, width), hidden_size = inner.stored_AD.shape, down_EDI.weight.shape[1]
    out_AD = torch.empty((num_rows, hidden_size), dtype=dtype, device=inner.stored_AD.device)
    num_slabs = hidden_size // tile.n
    _grouped_down[(order.tiles.shape[1] * num_slabs,)](
        TensorDescriptor.from_tensor(inner.stored_AD, [tile.m, tile.k]),
        inner.scale,
        TensorDescriptor.from_tensor(down_EDI.weight.flatten(0, 1), [tile.n, tile.k]),
        down_EDI.scale,
        out_AD,
        order.tiles,
        order.tiles.shape[1],
        num_rows,
        D=hidden_size,
        I=width,
        NUM_SLABS=num_slabs,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        FP8_BLOCK=FP8_BLOCK,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out_AD


def empty(num_rows: int, columns: int, device: torch.device) -> Quantised:
    """Room for activations of `num_rows` assignments."""
    return Quantised(
        torch.empty((num_rows, columns), dtype=torch.float8_e4m3fn, device=device),
        torch.empty((columns // FP8_BLOCK, num_rows), dtype=torch.float32, device=device),
    )


# Each program writes the tiles of one expert; the last one also those that do not exist.


@triton.jit(do_not_specialize=["num_tiles"], do_not_specialize_on_alignment=["counts"])
def _make_order(
    counts,
    starts,
    tiles,
    num_tiles,
    E: tl.constexpr,
    E_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    expert = tl.program_id(0)
    experts = tl.arange(0, E_BLOCK)
    before = tl.load(counts + experts, mask=experts < expert, other=0)
    start = tl.sum(before, 0)
    first_tile = tl.sum((before + BLOCK_M - 1) // BLOCK_M, 0)
    count = tl.load(counts + expert)
    end_tile = first_tile + (count + BLOCK_M - 1) // BLOCK_M
    tl.store(starts + expert, start)
    for first in range(first_tile, end_tile, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        is_own = tile < end_tile
        tl.store(tiles + tile, tl.zeros([BLOCK], dtype=tl.int32) + expert, mask=is_own)
        tl.store(tiles + num_tiles + tile, start + (tile - first_tile) * BLOCK_M, mask=is_own)
        tl.store(tiles + 2 * num_tiles + tile, tl.zeros([BLOCK], dtype=tl.int32) + start + count, mask=is_own)
    if expert == E - 1:
        for first in range(end_tile, num_tiles, BLOCK):
            tile = first + tl.arange(0, BLOCK)
            tl.store(tiles + tile, tl.full([BLOCK], -1, dtype=tl.int32), mask=tile < num_tiles)


@triton.jit(
    do_not_specialize=["ids_stride", "num_rows"],
    do_not_specialize_on_alignment=["ids"],
)
def _quantise_scatter(
    hidden,
    sorted_hidden,
    sorted_scales,
    ids,
    places,
    starts,
    sorted_places,
    ids_stride,
    num_rows,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_BLOCK: tl.constexpr,
    FP8_BLOCK: tl.constexpr,
    K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, GROUPS_BLOCK)
    is_group = groups < GROUPS
    columns = groups[:, None] * FP8_BLOCK + tl.arange(0, FP8_BLOCK)[None, :]
    x = tl.load(hidden + token * D + columns, mask=is_group[:, None], other=0.0)
    x, scale = quantise(x, 1)
    for k in tl.static_range(K):
        expert = tl.load(ids + token * ids_stride + k).to(tl.int32)
        if expert >= 0:
            place = tl.load(starts + expert) + tl.load(places + token * K + k)
            tl.store(sorted_hidden + place.to(tl.int64) * D + columns, x, mask=is_group[:, None])
            tl.store(sorted_scales + groups * num_rows + place, scale, mask=is_group)
            tl.store(sorted_places + token * K + k, place)
        else:
            tl.store(sorted_places + token * K + k, -1)


# A program has BLOCK_M rows of one expert and BLOCK_N rows of its weights. Tiles of activations come by the copy engine too and
# may reach into the next expert's rows: what comes of those is never stored.


@triton.jit(do_not_specialize=["num_tiles", "num_rows"])
def _grouped_gate_up(
    x,
    x_scales,
    weight,
    scales,
    inner,
    inner_scales,
    tiles,
    num_tiles,
    num_rows,
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    IS_BFLOAT16: tl.constexpr,
    NUM_SLABS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    FP8_BLOCK: tl.constexpr,
):
    tile, slab = tl.program_id(0) // NUM_SLABS, tl.program_id(0) % NUM_SLABS
    expert = tl.load(tiles + tile)
    if expert < 0:
        return
    first_row = tl.load(tiles + num_tiles + tile)
    rows = first_row + tl.arange(0, BLOCK_M)
    is_row = rows < tl.load(tiles + 2 * num_tiles + tile)
    gate_row = expert * 2 * I + slab * FP8_BLOCK
    gate_scales = scales + gate_row // FP8_BLOCK * (D // FP8_BLOCK)
    up_scales = gate_scales + I // FP8_BLOCK * (D // FP8_BLOCK)
    gate = tl.zeros([BLOCK_M, FP8_BLOCK], dtype=tl.float32)
    up = tl.zeros([BLOCK_M, FP8_BLOCK], dtype=tl.float32)
    for group in range(D // FP8_BLOCK):
        x_scale = tl.load(x_scales + group * num_rows + rows, mask=is_row, other=0.0)
        gate_scale, up_scale = tl.load(gate_scales + group), tl.load(up_scales + group)
        tokens = x.load([first_row, group * FP8_BLOCK])
        gate_product = tl.dot(tokens, weight.load([gate_row, group * FP8_BLOCK]).T)
        gate += gate_product * x_scale[:, None] * gate_scale
        up_product = tl.dot(tokens, weight.load([gate_row + I, group * FP8_BLOCK]).T)
        up += up_product * x_scale[:, None] * up_scale
    activated = (gate * tl.sigmoid(gate) * up).to(tl.bfloat16 if IS_BFLOAT16 else tl.float16)
    stored, scale = quantise(activated, 1)
    columns = slab * FP8_BLOCK + tl.arange(0, FP8_BLOCK)
    tl.store(inner + rows.to(tl.int64)[:, None] * I + columns[None, :], stored, mask=is_row[:, None])
    tl.store(inner_scales + slab * num_rows + rows, scale, mask=is_row)


@triton.jit(do_not_specialize=["num_tiles", "num_rows"])
def _grouped_down(
    x,
    x_scales,
    weight,
    scales,
    out,
    tiles,
    num_tiles,
    num_rows,
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    NUM_SLABS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FP8_BLOCK: tl.constexpr,
):
    tl.static_assert(FP8_BLOCK % BLOCK_N == 0)
    tile, slab = tl.program_id(0) // NUM_SLABS, tl.program_id(0) % NUM_SLABS
    expert = tl.load(tiles + tile)
    if expert < 0:
        return
    first_row = tl.load(tiles + num_tiles + tile)
    rows = first_row + tl.arange(0, BLOCK_M)
    is_row = rows < tl.load(tiles + 2 * num_tiles + tile)
    row = expert * D + slab * BLOCK_N
    row_scales = scales + row // FP8_BLOCK * (I // FP8_BLOCK)
    product = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for group in range(I // FP8_BLOCK):
        x_scale = tl.load(x_scales + group * num_rows + rows, mask=is_row, other=0.0)
        scale = tl.load(row_scales + group)
        part = tl.dot(x.load([first_row, group * FP8_BLOCK]), weight.load([row, group * FP8_BLOCK]).T)
        product += part * (scale * x_scale)[:, None]
    columns = slab * BLOCK_N + tl.arange(0, BLOCK_N)
    target = out + rows.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(target, product.to(out.dtype.element_ty), mask=is_row[:, None])
