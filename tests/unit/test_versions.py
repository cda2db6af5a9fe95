"""Version spans against dictionaries: one version for each position."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from common.messages import Generate, RequestOptions, VersionSpan
from common.scheduling.request import Request
from common.versions import Spans, cover, cut, join, names, spans_from, whole

SPANS = st.lists(st.tuples(st.integers(0, 9), st.sampled_from("abc")), max_size=6).map(
    lambda parts: [
        VersionSpan(start, start + size, version)
        for start, (size, version) in zip(running_sums([size for size, _ in parts]), parts, strict=False)
    ]
)
"""One after the other from 0 on; some empty, some neighbours of one version."""


def running_sums(sizes: list[int]) -> list[int]:
    return [sum(sizes[:index]) for index in range(len(sizes))]


def by_position(spans: Spans | list[VersionSpan]) -> dict[int, str]:
    """The slow way; no position may have two versions."""
    pairs = [(position, span.weight_version) for span in spans for position in range(span.start, span.stop)]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def is_shortest(spans: Spans) -> bool:
    joins = [(a.stop, a.weight_version) == (b.start, b.weight_version) for a, b in pairwise(spans)]
    return not any(joins) and all(span.start < span.stop for span in spans)


@given(SPANS, st.integers(0, 60), st.integers(0, 60))
def test_cut_and_join_say_the_same_of_each_position(spans: list[VersionSpan], start: int, stop: int):
    expected = {p: version for p, version in by_position(spans).items() if start <= p < stop}
    assert by_position(cut(spans, start, stop)) == expected
    joined = join(spans)
    assert by_position(joined) == by_position(spans)
    assert is_shortest(joined)
    assert join(cut(spans, start, stop)) == cut(joined, start, stop)
    assert names(joined) == names(span for span in spans if span.start < span.stop)


@given(SPANS, st.integers(0, 3), st.integers(0, 60), st.data())
def test_cover_is_exact(spans: list[VersionSpan], start: int, stop: int, data: st.DataObject):
    end = spans[-1].stop if spans else 0
    positions = list(by_position(spans))
    assert cover(spans, 0, end)
    assert cover(spans, start, stop) == (positions == list(range(start, stop)) and start <= stop)
    full = [index for index, span in enumerate(spans) if span.start < span.stop]
    if full:
        left_out = data.draw(st.sampled_from(full))
        assert not cover(spans[:left_out] + spans[left_out + 1 :], 0, end)
        assert not cover([*spans[:left_out], spans[left_out], *spans[left_out:]], 0, end)


def test_cover_knows_no_backwards_and_no_gap():
    assert cover((), 3, 3)
    assert not cover((), 3, 4)
    assert not cover((), 4, 3)
    assert not cover((VersionSpan(0, 4, "a"), VersionSpan(4, 2, "a"), VersionSpan(2, 5, "a")), 0, 5)
    assert not cover((VersionSpan(0, 2, "a"), VersionSpan(3, 5, "a")), 0, 5)
    assert whole(3, 3, "a") == () == spans_from((), 5)


@given(
    cached=st.integers(0, 5),
    steps=st.lists(st.tuples(st.integers(1, 5), st.sampled_from("abc")), min_size=1, max_size=8),
    bounds=st.tuples(st.integers(0, 50), st.integers(0, 50)),
)
def test_a_request_knows_who_computed_what(cached: int, steps: list[tuple[int, str]], bounds: tuple[int, int]):
    """A cached prefix is of the first step's version; what did not follow a prefix is nobody's but the steps'."""
    for is_elsewhere in (False, True):
        request = Request.of(Generate(rid="r", input_ids=[1] * 9, options=RequestOptions()))
        expected: dict[int, str] = {}
        position = 9 if is_elsewhere else cached
        if is_elsewhere:
            request.planned_tokens = request.computed_tokens = position
        else:
            request.begin(num_cached_tokens=cached)
            expected = dict.fromkeys(range(cached), steps[0][1])
        for size, version in steps:
            request.settle(position, position + size, version)
            expected |= dict.fromkeys(range(position, position + size), version)
            position += size
        start, stop = sorted(bounds)
        assert by_position(request.versions_of(0, position)) == expected
        assert request.versions_of(start, stop) == cut(request.versions_of(0, position), start, stop)
        assert is_shortest(request.versions_of(0, position))
        for version in "abc":
            assert request.is_all_of(version) == (set(expected.values()) == {version})
        request.prompt_versions = ("d",)
        assert not any(map(request.is_all_of, "abcd"))
        assert not request.may_go_on_under(steps[0][1])
