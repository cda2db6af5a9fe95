"""Which weights have computed which positions: the one place where version spans are cut, joined and checked.

Spans are in the order of their positions, each `[start, stop)`, neighbours of different versions. The token at position i + 1 was
drawn by the forward pass of position i, so the same spans say the version of every token. Neighbours: `common.scheduling.request`
(notes them), `common.routed_experts` and `router.merge` (rows' headers), `common.server.output` and `router.combine` (answers).
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

from common.messages import VersionSpan

Spans = tuple[VersionSpan, ...]


def whole(start: int, stop: int, weight_version: str) -> Spans:
    """Say that all of `[start, stop)` is of one version."""
    return (VersionSpan(start, stop, weight_version),) if start < stop else ()


def spans_from(changes: Sequence[tuple[int, str]], end: int) -> Spans:
    """Make spans of the positions from which on a version has computed, each up to the next one's, the last up to `end`."""
    ends = [*(start for start, _ in changes[1:]), end]
    return tuple(VersionSpan(start, stop, version) for (start, version), stop in zip(changes, ends, strict=False))


def cut(spans: Iterable[VersionSpan], start: int, stop: int) -> Spans:
    """Take what the spans say of `[start, stop)`."""
    clipped = (VersionSpan(max(s.start, start), min(s.stop, stop), s.weight_version) for s in spans)
    return tuple(span for span in clipped if span.start < span.stop)


def join(spans: Iterable[VersionSpan]) -> Spans:
    """Make one of neighbours of one version, and leave empty ones out."""
    joined: list[VersionSpan] = []
    for span in spans:
        if span.start == span.stop:
            continue
        if joined and (joined[-1].stop, joined[-1].weight_version) == (span.start, span.weight_version):
            span = VersionSpan(joined.pop().start, span.stop, span.weight_version)
        joined.append(span)
    return tuple(joined)


def cover(spans: Sequence[VersionSpan], start: int, stop: int) -> bool:
    """Say whether the spans, one after the other, are exactly `[start, stop)`; empty ones count for nothing."""
    edges = [(start, start), *((s.start, s.stop) for s in spans if s.start != s.stop), (stop, stop)]
    return all(left[1] == right[0] for left, right in pairwise(edges)) and all(lo <= hi for lo, hi in edges)


def names(spans: Iterable[VersionSpan]) -> tuple[str, ...]:
    """Name the versions, each once, in the order in which they first occur."""
    return tuple(dict.fromkeys(span.weight_version for span in spans))
