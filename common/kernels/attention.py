"""Paged attention: what a step's plan says of it, and what a backend makes of the plan.

`common.kernels.torch_attention` is the backend that runs anywhere. Shape letters: n requests, T tokens, H query heads, d head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Which queries of a step see which pages, for n requests; the query at position p sees the keys of positions `[0, p]`.

    Request i's queries are the step's tokens `[query_starts[i], query_starts[i + 1])`, the last ones of a context of
    `context_tokens[i]` tokens whose pages are `pages[page_starts[i] : page_starts[i + 1]]`, in order. Host data.
    """

    query_starts: npt.NDArray[np.int32]
    """`[n + 1]`, from 0 to T."""
    context_tokens: npt.NDArray[np.int32]
    """`[n]`."""
    page_starts: npt.NDArray[np.int32]
    """`[n + 1]`, from 0."""
    pages: npt.NDArray[np.int32]
    """`[page_starts[-1]]`."""


class Attention(Protocol):
    """The attention of one planned step, the same in every layer."""

    def __call__(self, q_THd: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        """Attend each query to its own request's keys up to its own position; returns `[T, H, d]` in the queries' dtype.

        The caches are one layer's `[page, kv_head, slot in page, d]` views, with the step's keys and values in them already.
        """


class AttentionBackend(Protocol):
    """Turns plans into attention; one for each engine."""

    def plan(self, plan: AttentionPlan, upload: Callable[[npt.NDArray[Any]], torch.Tensor]) -> Attention:
        """Prepare a step's attention; `upload` queues a host array's copy onto the device. Valid until the next step's plan."""
