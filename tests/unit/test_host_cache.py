"""The host cache against a slow twin that remembers owners, over random histories of allocations, frees, launches and commits."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import BadRows, MissingRows
from common.memory.page_allocator import PageAllocator
from common.routed_experts.collect import collect
from common.routed_experts.host_cache import HostCache, WriteTicket
from common.routed_experts.spec import RowSpec, rows_of
from common.versions import whole
from tests.support.rows import SPEC, make_rows

WIDE = RowSpec(num_experts=300, top_k=3, layer_ids=(0, 1), num_hidden_layers=2)


@dataclass(frozen=True, eq=False)
class Step:
    """A launched step: its ticket, its rows, and who owned its slots."""

    ticket: WriteTicket
    rows: np.ndarray
    owners: list[int]


class SlowCache:
    """The twin: for each slot its present owner, and who last wrote it what. Owners are numbers that are never used twice."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.owner_of_page: dict[int, int] = {}
        self.written: dict[int, tuple[int, np.ndarray]] = {}
        self.committed = self.dropped = 0

    def owner(self, slot: int) -> int:
        return self.owner_of_page[slot // self.page_size]

    def commit(self, slots: list[int], owners: list[int], rows: np.ndarray) -> None:
        for slot, owner, row in zip(slots, owners, rows, strict=True):
            if self.owner(slot) == owner:
                self.written[slot] = (owner, row)
                self.committed += 1
            else:
                self.dropped += 1

    def read(self, slot: int) -> np.ndarray | None:
        owner, row = self.written.get(slot, (-1, None))
        return row if owner == self.owner(slot) else None


class Pair:
    """An allocator, the cache under test and its twin, driven together."""

    def __init__(self, spec: RowSpec, num_pages: int, page_size: int) -> None:
        self.allocator = PageAllocator(num_pages)
        self.page_size = page_size
        self.cache = HostCache(spec, self.allocator.generations, page_size)
        self.slow = SlowCache(page_size)
        self.held: dict[int, list[int]] = {}
        self.steps: list[Step] = []
        self.num_owners = 0
        self.num_rows = 0
        self._spec = spec

    def allocate(self, num_pages: int) -> int | None:
        pages = self.allocator.allocate(num_pages)
        if pages is None:
            return None
        self.num_owners += 1
        self.held[self.num_owners] = pages
        self.slow.owner_of_page |= dict.fromkeys(pages, self.num_owners)
        return self.num_owners

    def free(self, owner: int) -> None:
        self.allocator.release(self.held.pop(owner))

    def slots(self, owner: int) -> np.ndarray:
        pages = np.array(self.held[owner], dtype=np.int64)
        return (pages[:, None] * self.page_size + np.arange(self.page_size)).reshape(-1)

    def launch(self, slots: np.ndarray) -> Step:
        self.num_rows += 1
        step = Step(
            self.cache.reserve(slots),
            make_rows(self._spec, len(slots), seed=self.num_rows),
            [self.slow.owner(slot) for slot in slots.tolist()],
        )
        self.steps.append(step)
        return step

    def commit(self, step: Step) -> None:
        self.steps.remove(step)
        self.cache.commit(step.ticket, step.rows)
        self.slow.commit(step.ticket.slots.tolist(), step.owners, step.rows)

    def check(self) -> None:
        """Every slot that somebody holds reads as its twin says: the present owner's row, or unwritten."""
        for owner in self.held:
            slots = self.slots(owner)
            rows, written = self.cache.read(slots)
            for slot, row, is_written in zip(slots.tolist(), rows, written.tolist(), strict=True):
                expected = self.slow.read(slot)
                assert is_written == (expected is not None)
                if expected is not None:
                    np.testing.assert_array_equal(row, expected)
        assert (self.cache.rows_committed, self.cache.rows_dropped) == (self.slow.committed, self.slow.dropped)


HISTORY = st.lists(
    st.tuples(
        st.sampled_from(["allocate", "allocate", "free", "launch", "launch", "commit", "commit"]),
        st.integers(0, 10**6),
    ),
    min_size=20,
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(spec=st.sampled_from([SPEC, WIDE]), page_size=st.sampled_from([1, 3]), history=HISTORY)
def test_random_histories_equal_the_twin(spec: RowSpec, page_size: int, history: list[tuple[str, int]]):
    """Steps of several owners, committed in any order, before and after their slots changed hands."""
    pair = Pair(spec, 6, page_size)
    for action, number in history:
        owners = sorted(pair.held)
        if action == "allocate":
            pair.allocate(1 + number % 3)
        elif action == "free" and owners:
            pair.free(owners[number % len(owners)])
        elif action == "launch" and owners:
            slots = np.concatenate([pair.slots(owner) for owner in owners])
            chosen = np.random.default_rng(number).permutation(slots)[: 1 + number % len(slots)]
            pair.launch(chosen)
        elif action == "commit" and pair.steps:
            pair.commit(pair.steps[number % len(pair.steps)])
        pair.check()


def test_a_late_commit_of_a_slot_that_changed_hands_changes_nothing():
    pair = Pair(SPEC, 1, 4)
    first = pair.allocate(1)
    assert first is not None
    late = pair.launch(pair.slots(first))
    pair.free(first)
    second = pair.allocate(1)
    assert second is not None
    assert pair.held[second] == [0]
    own = pair.launch(pair.slots(second)[:2])
    pair.commit(own)
    pair.commit(late)
    rows, written = pair.cache.read(pair.slots(second))
    assert written.tolist() == [True, True, False, False]
    np.testing.assert_array_equal(rows[:2], own.rows)
    assert (pair.cache.rows_committed, pair.cache.rows_dropped) == (2, 4)


def test_a_late_commit_reaches_those_of_its_slots_that_have_kept_their_owner():
    """One step of two requests, of which one is gone when it settles: the other's rows are its own, none is shifted."""
    pair = Pair(SPEC, 2, 3)
    gone, stays = pair.allocate(1), pair.allocate(1)
    assert gone is not None
    assert stays is not None
    slots = np.array([0, 3, 1, 4, 2, 5])
    late = pair.launch(slots)
    pair.free(gone)
    assert pair.allocate(1) is not None
    pair.commit(late)
    pair.check()
    rows, written = pair.cache.read(slots)
    assert written.tolist() == [False, True] * 3
    np.testing.assert_array_equal(rows[1::2], late.rows[1::2])
    assert (pair.cache.rows_committed, pair.cache.rows_dropped) == (3, 3)


def test_a_row_of_an_earlier_owner_is_never_readable():
    pair = Pair(SPEC, 1, 4)
    for _ in range(3):
        owner = pair.allocate(1)
        assert owner is not None
        assert not pair.cache.read(pair.slots(owner))[1].any()
        pair.commit(pair.launch(pair.slots(owner)))
        assert pair.cache.read(pair.slots(owner))[1].all()
        pair.free(owner)


def test_a_shared_page_keeps_its_rows():
    """The prefix cache holds the page on when its first request goes: the rows are readable until the last reference."""
    pair = Pair(SPEC, 1, 4)
    owner = pair.allocate(1)
    assert owner is not None
    slots = pair.slots(owner)
    step = pair.launch(slots)
    pair.commit(step)
    pair.allocator.share([0])
    pair.free(owner)
    rows, written = pair.cache.read(slots)
    assert written.all()
    np.testing.assert_array_equal(rows, step.rows)


def test_what_is_read_is_a_copy():
    pair = Pair(SPEC, 1, 4)
    owner = pair.allocate(1)
    assert owner is not None
    pair.commit(pair.launch(pair.slots(owner)))
    rows, _ = pair.cache.read(pair.slots(owner))
    before = rows.copy()
    pair.commit(pair.launch(pair.slots(owner)))
    np.testing.assert_array_equal(rows, before)
    pair.check()


# ------------------------------------------------------------------------------------------------ collect


def filled(num_slots: int) -> tuple[Pair, np.ndarray, np.ndarray]:
    """One owner of pages of 4 slots, all written, in an order of slots that is not that of their numbers."""
    pair = Pair(SPEC, -(-num_slots // 4), 4)
    owner = pair.allocate(pair.allocator.num_pages)
    assert owner is not None
    slots = pair.slots(owner)[::-1][:num_slots].copy()
    step = pair.launch(slots)
    pair.commit(step)
    return pair, slots, step.rows


@given(st.integers(1, 20), st.data())
def test_collect_gathers_in_the_order_of_positions(num_slots: int, data: st.DataObject):
    pair, slots, rows = filled(num_slots)
    lo = data.draw(st.integers(0, num_slots))
    hi = data.draw(st.integers(lo, num_slots))
    block = collect(pair.cache, slots[lo:hi], start=100 + lo, rid="r", weight_versions=whole(100 + lo, 100 + hi, "w7"))
    assert (block.header.start, block.header.stop) == (100 + lo, 100 + hi)
    assert [span.weight_version for span in block.header.weight_versions] == ["w7"] * (lo < hi)
    np.testing.assert_array_equal(rows_of(np.frombuffer(block.data, np.uint8), block.header), rows[lo:hi])


def test_unwritten_is_not_zero():
    """Rows that no step has written are missing, not zeros; the error names the request and the positions."""
    pair = Pair(SPEC, 2, 4)
    owner = pair.allocate(2)
    assert owner is not None
    slots = pair.slots(owner)
    with pytest.raises(MissingRows, match=r"request r9: 8 of 8 .* at positions 50 to 57$"):
        collect(pair.cache, slots, start=50, rid="r9", weight_versions=whole(50, 58, "w"), verified=False)
    pair.commit(pair.launch(slots[[0, 1, 3, 6, 7]]))
    with pytest.raises(MissingRows, match=r"request r9: 3 of 8 .* at positions 52 to 55$"):
        collect(pair.cache, slots, start=50, rid="r9", weight_versions=whole(50, 58, "w"), verified=False)
    pair.launch(slots)  # launched is not written
    with pytest.raises(MissingRows):
        collect(pair.cache, slots, start=50, rid="r9", weight_versions=whole(50, 58, "w"))
    pair.commit(pair.launch(slots[[2, 4, 5]]))
    assert collect(pair.cache, slots, start=50, rid="r9", weight_versions=whole(50, 58, "w")).header.shape == (8, 3, 4)


@pytest.mark.parametrize("row", [[0, 0, 0, 0], [1, 2, 3, 1], [0, 1, 2, 16]])
def test_rows_that_no_router_chose_are_refused(row: list[int]):
    """Written rows of zeros, of an expert twice, of an expert that is not there."""
    pair, slots, rows = filled(6)
    bad = rows.copy()
    bad[4, 2] = row
    pair.cache.commit(pair.cache.reserve(slots), bad)
    with pytest.raises(BadRows, match=r"1 of 18 .* at position 14, layer 4"):
        collect(pair.cache, slots, start=10, rid="r", weight_versions=whole(10, 16, "w"))
    unchecked = collect(pair.cache, slots, start=10, rid="r", weight_versions=whole(10, 16, "w"), verified=False)
    np.testing.assert_array_equal(rows_of(np.frombuffer(unchecked.data, np.uint8), unchecked.header), bad)
