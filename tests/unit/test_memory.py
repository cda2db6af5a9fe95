"""The allocator and the prefix cache against a recount and a slow twin, over random histories."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from common.memory.layout import KvLayout
from common.memory.page_allocator import PageAllocator
from common.memory.prefix_cache import PrefixCache


def tokens(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def test_pages_are_distinct_and_their_generation_rises():
    allocator = PageAllocator(4)
    first = allocator.allocate(3)
    assert first is not None
    assert len(set(first)) == 3
    assert allocator.allocate(2) is None
    assert allocator.num_free == 1
    allocator.release(first)
    again = allocator.allocate(4)
    assert again is not None
    assert sorted(allocator.generations.tolist()) == [1, 2, 2, 2]


def test_double_free_is_caught():
    allocator = PageAllocator(2)
    pages = allocator.allocate(1)
    assert pages is not None
    allocator.release(pages)
    with pytest.raises(AssertionError, match="twice"):
        allocator.release(pages)


def test_the_lowest_free_pages_are_handed_out():
    """Neighbours travel as one block, so a prompt's pages had better be such, whatever came before."""
    allocator = PageAllocator(10)
    first, second = allocator.allocate(4), allocator.allocate(3)
    assert first == [0, 1, 2, 3]
    assert second == [4, 5, 6]
    allocator.share(first[1:2])
    allocator.release(second)
    allocator.release(first)
    assert allocator.allocate(6) == [0, 2, 3, 4, 5, 6]
    allocator.release([1])
    assert allocator.allocate(4) == [1, 7, 8, 9]


def test_recount_sees_a_leak_and_a_lost_reference():
    allocator = PageAllocator(4)
    pages = allocator.allocate(2)
    assert pages is not None
    assert allocator.num_unaccounted([pages]) == 0
    assert allocator.num_unaccounted([]) == 2
    assert allocator.num_unaccounted([pages, pages[:1]]) == 1


class SlowPrefixes:
    """The slow twin: every cached prefix as a plain list of tokens."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.prefixes: dict[tuple[int, ...], int] = {}

    def match(self, values: list[int]) -> list[int]:
        pages = []
        for stop in range(self.page_size, len(values), self.page_size):
            page = self.prefixes.get(tuple(values[:stop]))
            if page is None:
                break
            pages.append(page)
        return pages

    def insert(self, values: list[int], pages: list[int]) -> None:
        for index in range(len(values) // self.page_size):
            self.prefixes.setdefault(tuple(values[: (index + 1) * self.page_size]), pages[index])


@settings(max_examples=150, deadline=None)
@given(
    page_size=st.sampled_from([1, 2, 4]),
    history=st.lists(
        st.tuples(
            st.sampled_from(["run", "run", "finish", "abort", "evict", "clear"]),
            st.lists(st.integers(0, 1), min_size=1, max_size=12),
        ),
        max_size=60,
    ),
)
def test_random_histories_leave_an_exact_recount(page_size: int, history: list[tuple[str, list[int]]]):
    """Allocations, hits, finishes, aborts and evictions in any order: hits equal the slow twin's, nothing leaks."""
    allocator = PageAllocator(24)
    cache = PrefixCache(allocator, page_size)
    slow = SlowPrefixes(page_size)
    running: list[tuple[list[int], list[int]]] = []
    for action, values in history:
        if action == "run":
            hit = cache.match(tokens(values))
            assert hit == slow.match(values)
            missing = -(-len(values) // page_size) - len(hit)
            if missing > allocator.num_free:
                cache.evict(missing - allocator.num_free)
                slow.prefixes = {k: v for k, v in slow.prefixes.items() if v in set(cache.pages())}
            fresh = allocator.allocate(missing)
            if fresh is None:
                allocator.release(hit)
            else:
                running.append((values, hit + fresh))
        elif action == "evict":
            cache.evict(len(values))
            slow.prefixes = {k: v for k, v in slow.prefixes.items() if v in set(cache.pages())}
        elif action == "clear":
            cache.clear()
            slow.prefixes = {}
            assert (cache.num_pages, cache.match(tokens(values))) == (0, [])
        elif running:
            done, pages = running.pop(0)
            if action == "finish":
                cache.insert(tokens(done), pages)
                slow.insert(done, pages)
            allocator.release(pages)
        assert allocator.num_unaccounted([cache.pages(), *(pages for _, pages in running)]) == 0
    for _, pages in running:
        allocator.release(pages)
    cache.evict(cache.num_pages)
    assert allocator.num_free == allocator.num_pages


def test_the_last_token_is_never_a_hit():
    allocator = PageAllocator(8)
    cache = PrefixCache(allocator, 2)
    pages = allocator.allocate(2)
    assert pages is not None
    cache.insert(tokens([1, 2, 3, 4]), pages)
    assert cache.match(tokens([1, 2, 3, 4])) == pages[:1]
    assert cache.match(tokens([1, 2, 3, 4, 5])) == pages


def test_a_held_prefix_is_not_evicted():
    allocator = PageAllocator(8)
    cache = PrefixCache(allocator, 1)
    pages = allocator.allocate(3)
    assert pages is not None
    cache.insert(tokens([1, 2, 3]), pages)
    allocator.release(pages)
    held = cache.match(tokens([1, 9]))
    assert cache.evict(8) == 2
    assert list(cache.pages()) == held


def test_a_held_page_keeps_the_ancestors_it_hangs_on():
    """Two requests computed the same prefix at once; the second one's own page hangs below the first one's."""
    allocator = PageAllocator(8)
    cache = PrefixCache(allocator, 1)
    first, second = allocator.allocate(1), allocator.allocate(2)
    assert first is not None
    assert second is not None
    cache.insert(tokens([1]), first)
    cache.insert(tokens([1, 2]), second)
    allocator.release(first)
    assert cache.evict(8) == 0
    assert cache.match(tokens([1, 2, 3])) == [first[0], second[1]]


def test_a_layout_is_told_from_others_by_the_whole_page_alone():
    """Ranks that hold other heads of one model are alike; models with other numbers of heads are not."""
    whole = KvLayout(page_size=4, num_layers=3, num_kv_heads=8, head_dim=16, dtype="float16", itemsize_bytes=2)
    last = replace(whole, num_kv_heads=2, first_kv_head=6, model_kv_heads=8)
    assert last.fingerprint == whole.fingerprint
    assert (4 * last.page_bytes, last.head_bytes) == (whole.page_bytes, whole.head_bytes)
    assert whole.page_bytes == np.prod(whole.page_shape) * 2
    others = [{"num_kv_heads": 2}, {"page_size": 2}, {"num_layers": 2}, {"head_dim": 8}, {"dtype": "bfloat16"}]
    assert whole.fingerprint not in {replace(whole, **other).fingerprint for other in others}
