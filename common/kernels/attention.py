"""Paged attention: what a step's plan says of it. The torch twin is in `common.kernels.reference`."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Which queries of a step see which pages, for n requests; the query at position p sees the keys of positions `[0, p]`.

    Request i's queries are the step's tokens `[query_starts[i], query_starts[i + 1])`, the last ones of a context of
    `context_tokens[i]` tokens whose pages are `pages[page_starts[i] : page_starts[i + 1]]`, in order.
    """

    query_starts: tuple[int, ...]
    context_tokens: tuple[int, ...]
    page_starts: tuple[int, ...]
    pages: torch.Tensor
    """int64 `[page_starts[-1]]`, on the model's device."""
