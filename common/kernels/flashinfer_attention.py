"""Paged attention by flashinfer: planned once a step on the host, the same plan in every layer.

`FlashinferAttention` plans eager steps of any shape with the prefill kernels (`fa3` on Hopper). `FixedDecode` is one batch size
of one-token steps inside a CUDA graph, with the decode kernels on tensor cores: its buffers stay where they are, and each step's
plan is written into them.

flashinfer stages a plan in pinned memory and copies it asynchronously. That memory rotates and each piece has an event, so none
is rewritten while its copy is pending (R3). Written against flashinfer 0.6.
"""

from collections.abc import Callable
from itertools import cycle
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flashinfer import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper
from flashinfer.decode import fast_decode_plan

from common.kernels.attention import AttentionPlan

_LEAST_WORKSPACE_BYTES = 256 * 2**20
_PLAN_BYTES = 8 * 2**20  # flashinfer's own size for the integer part of a plan
_NUM_STAGINGS = 4
_LAYOUT = "HND"  # how a page's block is indexed: head, slot, dim


class _PlanStaging:
    """Pinned pieces for plans on their way to the device."""

    def __init__(self) -> None:
        pieces = [
            (torch.empty(_PLAN_BYTES, dtype=torch.uint8, pin_memory=True), torch.cuda.Event())  # type: ignore[no-untyped-call]
            for _ in range(_NUM_STAGINGS)
        ]
        self._pieces = cycle(pieces)

    def plan(self, wrapper: Any, plan: Callable[[], None]) -> None:
        """Call `plan`, which stages in the wrapper's pinned memory, with a piece of which no copy is pending."""
        piece, copied = next(self._pieces)
        copied.synchronize()
        wrapper._pin_memory_int_workspace_buffer = piece  # flashinfer has no public way to say this
        plan()
        copied.record()


class FlashinferAttention:
    """A backend for one engine; heads and sizes are those of one layer, equal in all."""

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        max_batch_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`max_batch_size` is the largest that `fixed_decode` is asked for."""
        self._sizes = (num_heads, num_kv_heads, head_dim, page_size)
        self._dtype = dtype
        self._staging = _PlanStaging()
        # One step runs at a time, and plans follow each other in stream order: all wrappers share these.
        workspace_bytes = max(
            _LEAST_WORKSPACE_BYTES, _decode_workspace_bytes(num_heads, num_kv_heads, head_dim, max_batch_size)
        )
        self._workspace = torch.zeros(workspace_bytes, dtype=torch.uint8, device=device)
        self._plan_buffer = torch.empty(_PLAN_BYTES, dtype=torch.uint8, device=device)
        is_hopper = torch.cuda.get_device_capability(device)[0] == 9
        self._prefill = BatchPrefillWithPagedKVCacheWrapper(
            self._workspace, _LAYOUT, backend="fa3" if is_hopper else "fa2"
        )
        self._prefill.reset_workspace_buffer(self._workspace, self._plan_buffer)

    @property
    def workspaces(self) -> list[torch.Tensor]:
        """Device memory that each step writes before it reads it, but for the zeros that flashinfer asks for at first."""
        return [self._workspace, self._plan_buffer]

    def plan(self, plan: AttentionPlan, upload: Callable[[npt.NDArray[Any]], torch.Tensor]) -> "_PlannedPrefill":
        """Plan one eager step."""
        pages = upload(plan.pages)
        last_page_tokens = (plan.context_tokens - 1) % self._sizes[3] + 1

        def call() -> None:
            self._prefill.plan(
                torch.from_numpy(plan.query_starts),
                torch.from_numpy(plan.page_starts),
                pages,
                torch.from_numpy(last_page_tokens.astype(np.int32)),
                *self._sizes,
                causal=True,
                q_data_type=self._dtype,
                kv_data_type=self._dtype,
            )

        self._staging.plan(self._prefill, call)
        return _PlannedPrefill(self._prefill)

    def fixed_decode(self, batch_size: int, buffer: torch.Tensor) -> "FixedDecode":
        """Make the attention of one-token steps of `batch_size` requests; it reads its pages from `buffer`, int32 on the device."""
        split = 2 * batch_size + 1
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            _LAYOUT,
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=buffer[: batch_size + 1],
            paged_kv_last_page_len_buffer=buffer[batch_size + 1 : split],
            paged_kv_indices_buffer=buffer[split:],
        )
        wrapper.reset_workspace_buffer(self._workspace, self._plan_buffer)
        return FixedDecode(wrapper, self._sizes, self._dtype, batch_size, self._staging)


class _PlannedPrefill:
    def __init__(self, wrapper: BatchPrefillWithPagedKVCacheWrapper) -> None:
        self._wrapper = wrapper

    def __call__(self, q_THd: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        # Its own would be filled with zeros first.
        out: torch.Tensor = self._wrapper.run(q_THd, (k_cache, v_cache), out=torch.empty_like(q_THd))
        return out


class FixedDecode:
    """The attention of one-token steps of one batch size, capturable in a CUDA graph; `plan` is called before each replay."""

    def __init__(
        self,
        wrapper: BatchDecodeWithPagedKVCacheWrapper,
        sizes: tuple[int, int, int, int],
        dtype: torch.dtype,
        batch_size: int,
        staging: _PlanStaging,
    ) -> None:
        self._wrapper, self._sizes, self._dtype = wrapper, sizes, dtype
        self._batch_size, self._staging = batch_size, staging
        self._is_planned = False

    def pack(self, plan: AttentionPlan, padding_page: int) -> npt.NDArray[np.int32]:
        """Lay a plan of at most the batch size out as the buffer holds it; the rest are contexts of one token on `padding_page`."""
        num_padding = self._batch_size - len(plan.context_tokens)
        page_size = self._sizes[3]
        page_starts = np.concatenate((plan.page_starts, plan.page_starts[-1] + np.arange(1, num_padding + 1)))
        last_page_tokens = np.concatenate(((plan.context_tokens - 1) % page_size + 1, np.ones(num_padding)))
        pages = np.concatenate((plan.pages, np.full(num_padding, padding_page)))
        return np.concatenate((page_starts, last_page_tokens, pages)).astype(np.int32)

    def plan(self, packed: npt.NDArray[np.int32]) -> None:
        """Plan for what `pack` returned; the caller has queued its copy into the buffer."""
        split = self._batch_size + 1
        page_starts = torch.from_numpy(packed[:split])
        last_page_tokens = torch.from_numpy(packed[split : split + self._batch_size])

        def call() -> None:
            if not self._is_planned:
                pages = torch.from_numpy(packed[split + self._batch_size :])
                self._wrapper.plan(
                    page_starts,
                    pages,
                    last_page_tokens,
                    *self._sizes,
                    q_data_type=self._dtype,
                    kv_data_type=self._dtype,
                )
                self._is_planned = True
                return
            # The buffers are filled already; only the schedule is new.
            fast_decode_plan(
                self._wrapper,
                page_starts,
                page_starts,
                last_page_tokens,
                *self._sizes,
                q_data_type=self._dtype,
                kv_data_type=self._dtype,
                global_override_indptr_cpu=page_starts,
            )

        self._staging.plan(self._wrapper, call)

    def __call__(self, q_THd: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        """Attend; see `common.kernels.attention.Attention`."""
        out: torch.Tensor = self._wrapper.run(q_THd, (k_cache, v_cache))
        return out


def _decode_workspace_bytes(num_heads: int, num_kv_heads: int, head_dim: int, batch_size: int) -> int:
    """What flashinfer keeps of a fixed batch whose contexts are split: a partial sum in float32 for each tile of queries.

    Its tiles hold 16 rows, or 64 where more than 16 query heads share a key head.
    """
    group = num_heads // num_kv_heads
    rows = 16 if group <= 16 else 64
    num_tiles = max(264, -(-batch_size * group // rows) + batch_size)
    return num_heads * num_tiles * rows * (head_dim + 1) * 4 + 2**20
