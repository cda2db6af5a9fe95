"""The merge against its oracle, which is slicing one big array."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from common.errors import MissingRows, RowsMismatch
from common.messages import RowBlock, VersionSpan
from common.routed_experts.codec import view
from router.merge import merge
from tests.support.rows import SPEC, cut, make_rows

ROWS = make_rows(SPEC, 60)


@st.composite
def splits(draw):
    """Draw the bounds of contiguous blocks, some perhaps empty."""
    return sorted(draw(st.lists(st.integers(0, 60), min_size=2, max_size=7)))


def blocks_of(bounds, versions=None):
    pairs = list(itertools.pairwise(bounds))
    versions = versions or ["w1"] * len(pairs)
    return [cut(SPEC, ROWS, start, stop, version) for (start, stop), version in zip(pairs, versions, strict=True)]


@given(splits(), st.data())
def test_any_split_gives_the_slice(bounds, data):
    start, stop = bounds[0], data.draw(st.integers(bounds[0], bounds[-1]))
    versions = data.draw(st.lists(st.sampled_from("ab"), min_size=len(bounds) - 1, max_size=len(bounds) - 1))
    merged = merge(blocks_of(bounds, versions), start=start, stop=stop)
    np.testing.assert_array_equal(view(merged), ROWS[start:stop])
    assert (merged.header.start, merged.header.stop) == (start, stop)
    expected = [v for lo, hi, v in zip(bounds, bounds[1:], versions, strict=False) for _ in range(lo, min(hi, stop))]
    assert [s.weight_version for s in merged.header.weight_versions for _ in range(s.start, s.stop)] == expected
    spans = merged.header.weight_versions
    assert all(a.weight_version != b.weight_version for a, b in itertools.pairwise(spans))


@given(splits(), st.data())
def test_a_block_left_out_is_missing_or_mismatched(bounds, data):
    blocks = blocks_of(bounds)
    left_out = data.draw(st.integers(0, len(blocks) - 1))
    empty = bounds[left_out] == bounds[left_out + 1]
    rest = blocks[:left_out] + blocks[left_out + 1 :]
    if rest and empty:
        assert bytes(merge(rest, start=bounds[0], stop=bounds[-1]).data) == ROWS[bounds[0] : bounds[-1]].tobytes()
        return
    with pytest.raises(MissingRows, match=rf"\[{bounds[left_out] if rest else bounds[0]}, "):
        merge(rest, start=bounds[0], stop=bounds[-1])


@given(splits(), st.data())
def test_an_overlap_is_refused(bounds, data):
    blocks = blocks_of(bounds)
    if len(blocks) < 2:
        return
    i = data.draw(st.integers(1, len(blocks) - 1))
    if blocks[i - 1].header.stop == 0:
        return
    blocks[i] = cut(SPEC, ROWS, data.draw(st.integers(0, bounds[i] - 1)), bounds[i + 1])
    with pytest.raises(RowsMismatch, match="overlap"):
        merge(blocks, start=bounds[0], stop=bounds[-1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "uint16"),
        ("num_experts", 17),
        ("top_k", 2),
        ("layer_ids", (1, 2, 3)),
        ("layer_ids", (1, 2)),
        ("num_hidden_layers", 6),
    ],
)
@pytest.mark.parametrize("stop", [10, 20])
def test_blocks_of_two_models_are_refused(name, value, stop):
    first, second = blocks_of([0, 10, stop])
    with pytest.raises(RowsMismatch, match=name):
        merge([first, RowBlock(replace(second.header, **{name: value}), second.data)], start=0, stop=stop)


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("which", [0, 1])
def test_bytes_that_do_not_fit_the_header_are_refused(change, which):
    blocks = blocks_of([0, 10, 20])
    data = bytes(blocks[which].data)
    blocks[which] = RowBlock(blocks[which].header, data[:-1] if change < 0 else data + b"\0")
    with pytest.raises(RowsMismatch, match="should be"):
        merge(blocks, start=0, stop=20)


@pytest.mark.parametrize("spans", [(), ((0, 9),), ((1, 10),), ((0, 11),), ((0, 5), (6, 10)), ((0, 6), (5, 10))])
def test_version_spans_that_do_not_cover_are_refused(spans):
    block = blocks_of([0, 10])[0]
    header = replace(block.header, weight_versions=tuple(VersionSpan(lo, hi, "w") for lo, hi in spans))
    with pytest.raises(RowsMismatch, match="do not cover"):
        merge([RowBlock(header, block.data)], start=0, stop=10)


def test_bounds_that_no_block_can_meet():
    blocks = blocks_of([5, 10, 20])
    with pytest.raises(MissingRows, match=r"\[4, 5\)"):
        merge(blocks, start=4, stop=20)
    with pytest.raises(MissingRows, match=r"\[20, 21\)"):
        merge(blocks, start=5, stop=21)
    with pytest.raises(RowsMismatch, match="before 6"):
        merge(blocks, start=6, stop=20)
    with pytest.raises(RowsMismatch):
        merge(blocks, start=5, stop=4)
    with pytest.raises(MissingRows, match="no leg"):
        merge([], start=0, stop=1)


def test_blocks_in_the_wrong_order_are_refused():
    first, second = blocks_of([0, 10, 20])
    with pytest.raises(MissingRows):
        merge([second, first], start=0, stop=20)


def test_no_rows_at_all_is_a_block_too():
    merged = merge(blocks_of([7, 7, 7]), start=7, stop=7)
    assert merged.header.shape == (0, 3, 4)
    assert bytes(merged.data) == b""
    assert merged.header.weight_versions == ()


def test_one_block_that_fits_is_not_copied():
    block = blocks_of([3, 9])[0]
    assert merge([block], start=3, stop=9).data is block.data
