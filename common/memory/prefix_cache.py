"""Radix prefix cache: full pages of earlier prompts, found by their tokens.

A tree with one page a node, keyed by the page's very tokens (no hashes, so no collisions). The cache holds one reference to
each of its pages; a hit adds the request's own. Because the routed-expert rows are kept by slot, a hit brings the rows that
were committed with those slots. Pages enter only when their step has settled. Torch-free.
"""

from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from common.memory.page_allocator import PageAllocator


class _Node:
    __slots__ = ("children", "key", "page", "parent")

    def __init__(self, key: bytes, page: int, parent: "_Node | None") -> None:
        self.key = key
        self.page = page
        self.parent = parent
        self.children: dict[bytes, _Node] = {}


class PrefixCache:
    """Maps token prefixes, page by page, to pages that already hold their KV and rows."""

    def __init__(self, allocator: PageAllocator, page_size: int) -> None:
        self._allocator = allocator
        self._page_size = page_size
        self._root = _Node(b"", -1, None)
        # Least recently used first. A walk refreshes children before their parents, so a parent is never older than a child
        # and the eldest node is always a leaf.
        self._by_age: OrderedDict[int, _Node] = OrderedDict()

    @property
    def num_pages(self) -> int:
        """Pages that the cache holds."""
        return len(self._by_age)

    def pages(self) -> Iterator[int]:
        """The pages that the cache holds a reference to."""
        return iter(self._by_age)

    def match(self, token_ids: npt.NDArray[np.int32]) -> list[int]:
        """Find the pages of the longest cached prefix and add a reference to each for the caller.

        At least the last token is left to compute, since its logits are what the caller is after.
        """
        path = self._walk(token_ids[: len(token_ids) - 1])
        pages = [node.page for node in path]
        self._allocator.share(pages)
        return pages

    def insert(self, token_ids: npt.NDArray[np.int32], pages: list[int]) -> None:
        """Keep the full pages of a settled prompt. Pages whose tokens are cached already stay the caller's alone."""
        path = self._walk(token_ids)
        node = path[-1] if path else self._root
        added: list[_Node] = []
        for index in range(len(path), len(token_ids) // self._page_size):
            key = token_ids[index * self._page_size : (index + 1) * self._page_size].tobytes()
            child = _Node(key, pages[index], node)
            node.children[key] = child
            added.append(child)
            node = child
        self._allocator.share([child.page for child in added])
        for child in reversed(added):
            self._by_age[child.page] = child
        self._refresh(path)

    def evict(self, num_pages: int) -> int:
        """Give up to `num_pages` of the least recently used pages that no request holds back; returns how many."""
        num_evicted = 0
        for node in list(self._by_age.values()):
            if num_evicted == num_pages:
                break
            # A held node keeps its ancestors, even those of which the request holds a twin page of its own.
            if node.children or self._allocator.num_references(node.page) > 1:
                continue
            assert node.parent is not None
            del node.parent.children[node.key], self._by_age[node.page]
            self._allocator.release([node.page])
            num_evicted += 1
        return num_evicted

    def clear(self) -> None:
        """Forget everything; pages that requests hold too stay theirs."""
        self._allocator.release(list(self._by_age))
        self._by_age.clear()
        self._root.children.clear()

    def _walk(self, token_ids: npt.NDArray[np.int32]) -> list[_Node]:
        node, path = self._root, []
        for start in range(0, len(token_ids) - self._page_size + 1, self._page_size):
            child = node.children.get(token_ids[start : start + self._page_size].tobytes())
            if child is None:
                break
            path.append(child)
            node = child
        self._refresh(path)
        return path

    def _refresh(self, path: list[_Node]) -> None:
        for node in reversed(path):
            self._by_age.move_to_end(node.page)
