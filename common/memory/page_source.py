"""Where pages for requests come from: the free ones, and behind them those that the prefix cache can give up.

Torch-free. Neighbours: `page_allocator`, `prefix_cache`, and the schedulers, which ask.
"""

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from common.memory.page_allocator import PageAllocator
from common.memory.prefix_cache import PrefixCache

# The cache is walked through to find what it can give up; asked page by page, it would be at every step. One part in so many.
_EVICTED_AT_ONCE: Final = 256


class PromptPages(NamedTuple):
    """Pages for a prompt, in order; the first `num_cached` hold its KV and rows already."""

    pages: list[int]
    num_cached: int


class PageSource:
    """Pages of one pool. Whatever it hands out has one reference for the caller."""

    def __init__(self, allocator: PageAllocator, cache: PrefixCache | None) -> None:
        self._allocator = allocator
        self._cache = cache

    def take(self, num_pages: int, *, leaving: int = 0) -> list[int] | None:
        """Hand out pages if `leaving` more of them stay free; else None."""
        missing = num_pages + leaving - self._allocator.num_free
        if self._cache is not None and 0 < missing <= self._cache.num_pages:
            self._cache.evict(max(missing, self._allocator.num_pages // _EVICTED_AT_ONCE))
        if self._allocator.num_free < num_pages + leaving:
            return None
        return self._allocator.allocate(num_pages)

    def take_for_prompt(
        self, token_ids: npt.NDArray[np.int32], num_pages: int, *, leaving: int = 0
    ) -> PromptPages | None:
        """Hand out pages of which the first hold the longest cached prefix of `token_ids`, short of its last token; or None."""
        cached = [] if self._cache is None else self._cache.match(token_ids)
        fresh = self.take(num_pages - len(cached), leaving=leaving)
        if fresh is None:
            self._allocator.release(cached)
            return None
        return PromptPages(cached + fresh, len(cached))
