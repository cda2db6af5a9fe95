"""What stands around attention and experts in a layer, in Triton: one launch where the torch twins take many.

Arithmetic is in float32 and is rounded once, where the twins in `common.kernels.torch_kernels` round after every operation.

Shape letters: T tokens, D hidden size, H query heads, h key/value heads, d head size, K top-k, P positions.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from common.kernels.interface import PeerArea
from common.kernels.triton.launch import overlapped

_HEADS_A_PROGRAM = 8


def add_norm(
    x_TD: torch.Tensor, delta: torch.Tensor | None, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `delta` (`[T, D]`, or `[T, K, D]` to be added up over K) to `x_TD`; returns the sum and its RMS norm, both `[T, D]`."""
    total, hidden_size = x_TD.shape
    normed_TD = torch.empty_like(x_TD)
    sum_TD = x_TD if delta is None else torch.empty_like(x_TD)
    _add_norm[(total,)](
        x_TD,
        delta,
        weight_D,
        sum_TD,
        normed_TD,
        eps,
        D=hidden_size,
        D_BLOCK=triton.next_power_of_2(hidden_size),
        K=0 if delta is None else delta.numel() // x_TD.numel(),
        num_warps=8,
        **overlapped(),
    )
    return sum_TD, normed_TD


@triton.jit
def _add_norm(
    x,
    delta,
    weight,
    sums,
    normed,
    eps,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, D_BLOCK)
    is_column = columns < D
    value = tl.load(x + token * D + columns, mask=is_column, other=0.0).to(tl.float32)
    if K > 0:
        added = tl.zeros([D_BLOCK], dtype=tl.float32)
        for k in tl.static_range(K):
            added += tl.load(delta + (token * K + k) * D + columns, mask=is_column, other=0.0).to(tl.float32)
        value = _store_sum(value + added, sums, token, columns, is_column, D)
    _store_normed(value, weight, normed, token, columns, is_column, eps, D)


@triton.jit
def _store_sum(value, sums, token, columns, is_column, D: tl.constexpr):
    """Round and store a sum; the one that is normed is the one that the next layer gets."""
    rounded = value.to(sums.dtype.element_ty)
    tl.store(sums + token * D + columns, rounded, mask=is_column)
    return rounded.to(tl.float32)


@triton.jit
def _store_normed(value, weight, normed, token, columns, is_column, eps, D: tl.constexpr):
    scale = tl.rsqrt(tl.sum(value * value) / D + eps)
    weights = tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32)
    tl.store(normed + token * D + columns, (value * scale * weights).to(normed.dtype.element_ty), mask=is_column)


def add_norm_over(
    x_TD: torch.Tensor, area: PeerArea, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the parts of all ranks in `area` to `x_TD`, in the ranks' order; returns the sum and its RMS norm, both `[T, D]`.

    All ranks of the group launch this. A token's program waits for the programs of the same token on the other GPUs.
    """
    total, hidden_size = x_TD.shape
    sum_TD, normed_TD = torch.empty_like(x_TD), torch.empty_like(x_TD)
    _add_norm_over[(total,)](
        x_TD,
        area.addresses_R,
        area.signals_R,
        weight_D,
        sum_TD,
        normed_TD,
        eps,
        area.place,
        R=len(area.addresses_R),
        D=hidden_size,
        D_BLOCK=triton.next_power_of_2(hidden_size),
        num_warps=8,
        **overlapped(),
    )
    return sum_TD, normed_TD


@triton.jit
def _add_norm_over(
    x,
    addresses,
    signals,
    weight,
    sums,
    normed,
    eps,
    index,
    R: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, D_BLOCK)
    is_column = columns < D
    # Say on every other GPU that this rank's part is there, then wait until all have said so here. A signal is 1 for as long as
    # nobody has taken it.
    for r in tl.static_range(R):
        if r != index:
            theirs = tl.load(signals + r).to(tl.pointer_type(tl.int32))
            while tl.atomic_cas(theirs + token * R + index, 0, 1, sem="release", scope="sys") != 0:
                pass
    own = tl.load(signals + index).to(tl.pointer_type(tl.int32))
    for r in tl.static_range(R):
        if r != index:
            while tl.atomic_cas(own + token * R + r, 1, 0, sem="acquire", scope="sys") != 1:
                pass
    added = tl.zeros([D_BLOCK], dtype=tl.float32)
    for r in tl.static_range(R):
        part = tl.load(addresses + r).to(tl.pointer_type(x.dtype.element_ty))
        # Not from this GPU's cache, which may have the sum before the last.
        added += tl.load(part + token * D + columns, mask=is_column, other=0.0, cache_modifier=".cv").to(tl.float32)
    value = tl.load(x + token * D + columns, mask=is_column, other=0.0).to(tl.float32)
    value = _store_sum(value + added, sums, token, columns, is_column, D)
    _store_normed(value, weight, normed, token, columns, is_column, eps, D)


def add_up(delta_TKD: torch.Tensor, ids_TK: torch.Tensor | None = None) -> torch.Tensor:
    """Add up over K in float32 and round once; returns `[T, D]`.

    With `ids_TK` (int32), only what has an id of 0 or more is read: zeros where nothing has.
    """
    total, top_k, hidden_size = delta_TKD.shape
    sum_TD = delta_TKD.new_empty((total, hidden_size))
    _add_up[(total,)](
        delta_TKD,
        ids_TK,
        sum_TD,
        D=hidden_size,
        D_BLOCK=triton.next_power_of_2(hidden_size),
        K=top_k,
        HAS_IDS=ids_TK is not None,
        num_warps=4,
        **overlapped(),
    )
    return sum_TD


@triton.jit
def _add_up(
    delta,
    ids,
    sums,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    K: tl.constexpr,
    HAS_IDS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, D_BLOCK)
    is_column = columns < D
    total = tl.zeros([D_BLOCK], dtype=tl.float32)
    for k in tl.static_range(K):
        is_read = is_column
        if HAS_IDS:
            is_read = columns < tl.where(tl.load(ids + token * K + k) >= 0, D, 0)
        total += tl.load(delta + (token * K + k) * D + columns, mask=is_read, other=0.0).to(tl.float32)
    tl.store(sums + token * D + columns, total.to(sums.dtype.element_ty), mask=is_column)


def norm_rotate_store(
    qkv: torch.Tensor,
    q_norm_d: torch.Tensor,
    k_norm_d: torch.Tensor,
    eps: float,
    cos_Pd: torch.Tensor,
    sin_Pd: torch.Tensor,
    positions_T: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots_T: torch.Tensor,
) -> torch.Tensor:
    """Norm and rotate the queries and keys of `qkv` `[T, (H + 2h) * d]`, write keys and values to their slots of the caches.

    Returns the queries `[T, H, d]`. The caches are one layer's `[page, h, slot in page, d]` views, d contiguous.
    """
    total = qkv.shape[0]
    _, num_kv_heads, page_size, head_dim = k_cache.shape
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    q_THd = qkv.new_empty((total, num_heads, head_dim))
    num_groups = triton.cdiv(num_heads + 2 * num_kv_heads, _HEADS_A_PROGRAM)
    _norm_rotate_store[(total, num_groups)](
        qkv,
        q_norm_d,
        k_norm_d,
        eps,
        cos_Pd,
        sin_Pd,
        positions_T,
        slots_T,
        q_THd,
        k_cache,
        v_cache,
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        H=num_heads,
        KV_HEADS=num_kv_heads,
        PAGE_SIZE=page_size,
        HALF=head_dim // 2,
        HALF_BLOCK=triton.next_power_of_2(head_dim // 2),
        HEADS=_HEADS_A_PROGRAM,
        num_warps=4,
        **overlapped(),
    )
    return q_THd


@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])
def _norm_rotate_store(
    qkv,
    q_norm,
    k_norm,
    eps,
    cos,
    sin,
    positions,
    slots,
    q_out,
    k_cache,
    v_cache,
    page_stride,
    head_stride,
    slot_stride,
    H: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dims = tl.arange(0, HALF_BLOCK)
    is_dim = dims < HALF
    is_head = heads < H + 2 * KV_HEADS
    is_query, is_value = heads < H, heads >= H + KV_HEADS
    mask = is_head[:, None] & is_dim[None, :]
    source = qkv + token * ((H + 2 * KV_HEADS) * 2 * HALF) + heads[:, None] * (2 * HALF) + dims[None, :]
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)

    scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF) + eps)[:, None]
    q_first = tl.load(q_norm + dims, mask=is_dim, other=0.0).to(tl.float32)[None, :]
    q_second = tl.load(q_norm + HALF + dims, mask=is_dim, other=0.0).to(tl.float32)[None, :]
    k_first = tl.load(k_norm + dims, mask=is_dim, other=0.0).to(tl.float32)[None, :]
    k_second = tl.load(k_norm + HALF + dims, mask=is_dim, other=0.0).to(tl.float32)[None, :]
    normed_first = first * scale * tl.where(is_query[:, None], q_first, k_first)
    normed_second = second * scale * tl.where(is_query[:, None], q_second, k_second)
    # Both halves of the tables are the same.
    position = tl.load(positions + token)
    cosine = tl.load(cos + position * (2 * HALF) + dims, mask=is_dim, other=0.0).to(tl.float32)[None, :]
    sine = tl.load(sin + position * (2 * HALF) + dims, mask=is_dim, other=0.0).to(tl.float32)[None, :]
    first = tl.where(is_value[:, None], first, normed_first * cosine - normed_second * sine)
    second = tl.where(is_value[:, None], second, normed_second * cosine + normed_first * sine)
    first = first.to(q_out.dtype.element_ty)
    second = second.to(q_out.dtype.element_ty)

    q_target = q_out + token * (H * 2 * HALF) + heads[:, None] * (2 * HALF) + dims[None, :]
    q_mask = mask & is_query[:, None]
    tl.store(q_target, first, mask=q_mask)
    tl.store(q_target + HALF, second, mask=q_mask)
    slot = tl.load(slots + token)
    place = (slot // PAGE_SIZE) * page_stride + (slot % PAGE_SIZE) * slot_stride
    k_target = k_cache + place + (heads - H)[:, None] * head_stride + dims[None, :]
    k_mask = mask & (~is_query & ~is_value)[:, None]
    tl.store(k_target, first, mask=k_mask)
    tl.store(k_target + HALF, second, mask=k_mask)
    v_target = v_cache + place + (heads - H - KV_HEADS)[:, None] * head_stride + dims[None, :]
    v_mask = mask & is_value[:, None]
    tl.store(v_target, first, mask=v_mask)
    tl.store(v_target + HALF, second, mask=v_mask)
