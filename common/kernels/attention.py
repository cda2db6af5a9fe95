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

    def per_token(self, page_size: int) -> "AttentionPlan":
        """The same step with every token a request of its own, whose context ends with it: T requests of one query each."""
        num_queries = np.diff(self.query_starts)
        total = int(self.query_starts[-1])
        if total == len(num_queries):
            return self
        # Counted back from its request's end, token by token.
        to_end = np.repeat(self.query_starts[1:], num_queries) - np.arange(total)
        contexts = np.repeat(self.context_tokens, num_queries) - to_end + 1
        num_pages = -(-contexts // page_size)
        page_starts = np.concatenate(([0], np.cumsum(num_pages)))
        first_pages = np.repeat(self.page_starts[:-1], num_queries)
        index = np.arange(page_starts[-1]) + np.repeat(first_pages - page_starts[:-1], num_pages)
        starts = np.arange(total + 1, dtype=np.int32)
        return AttentionPlan(starts, contexts.astype(np.int32), page_starts.astype(np.int32), self.pages[index])


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
