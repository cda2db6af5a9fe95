"""Who may write a KV page: reference counts, a free list, and a generation for every page.

A page's generation goes up each time the page is handed out, so that whatever is kept beside the pages (routed-expert rows
above all) can tell the present owner's data from an earlier one's without being told of every free. Torch-free; the memory
itself is `common.memory.kv_pool`.
"""

from collections import Counter
from collections.abc import Iterable
from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt


class PageAllocator:
    """Hands out the pages `[0, num_pages)`; a page is free exactly when nobody holds a reference to it."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.generations: npt.NDArray[np.int64] = np.zeros(num_pages, dtype=np.int64)
        """`[num_pages]`: how many owners each page has had; 0 means none yet. Read by the host cache."""
        self._references: npt.NDArray[np.int32] = np.zeros(num_pages, dtype=np.int32)
        self._free = list(range(num_pages))
        """A heap."""

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def allocate(self, num_pages: int) -> list[int] | None:
        """Hand out `num_pages` pages with one reference each, or None (and nothing changes) if there are not enough.

        The lowest free ones, rising: so most of a prompt's pages are neighbours, and travel as one block.
        """
        if num_pages > len(self._free):
            return None
        pages = [heappop(self._free) for _ in range(num_pages)]
        self._references[pages] = 1
        self.generations[pages] += 1
        return pages

    def share(self, pages: list[int]) -> None:
        """Add a reference to pages that somebody already holds."""
        assert (self._references[pages] > 0).all(), "a free page cannot be shared"
        self._references[pages] += 1

    def release(self, pages: list[int]) -> None:
        """Give one reference to each page back; a page without references is free at once."""
        references = self._references[pages] - 1
        assert (references >= 0).all(), "a page was freed twice"
        self._references[pages] = references
        for page, left in zip(pages, references.tolist(), strict=True):
            if left == 0:
                heappush(self._free, page)

    def num_references(self, page: int) -> int:
        """How many owners hold the page now."""
        return int(self._references[page])

    def num_unaccounted(self, holders: Iterable[Iterable[int]]) -> int:
        """Recount from scratch: pages whose references differ from what the `holders` hold, or that the free list has wrong.

        0 means that nothing is leaked and nothing was freed twice. O(pages), for checks and statistics.
        """
        held = Counter(page for holder in holders for page in holder)
        free = Counter(self._free)
        expected = np.zeros(self.num_pages, dtype=np.int32)
        expected[list(held.keys())] = list(held.values())
        listed = np.zeros(self.num_pages, dtype=np.int32)
        listed[list(free.keys())] = list(free.values())
        wrong = (self._references != expected) | (listed != (expected == 0))
        return int(wrong.sum())
