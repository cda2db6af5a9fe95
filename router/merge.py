"""The merge (R7): one sample's rows out of the blocks that its legs sent.

    prefill   [s ........ P)
    decode              [P ........ P+G-1) surplus
    merged    [s .................. P+G-1)

Pure: it knows no leg, no request and no HTTP. It never overlays, never fills and never guesses. Neighbours: `combine`
calls it, also for `seam`; `common.routed_experts.codec` gives the bytes their shape.
"""

from collections.abc import Sequence
from itertools import chain, pairwise

import numpy as np
from msgspec.structs import astuple, replace

from common.errors import MissingRows, RowsMismatch
from common.messages import RowBlock, RowHeader
from common.routed_experts.codec import view
from common.versions import Spans, cover, cut, join

_SAME = ("dtype", "num_experts", "top_k", "layer_ids", "num_hidden_layers")


def merge(blocks: Sequence[RowBlock], *, start: int, stop: int) -> RowBlock:
    """Join blocks, given in the order of their positions, into the one block `[start, stop)`.

    Blocks may be empty; what reaches past `stop` is cut off. A single block that fits is returned as it is; else the
    result owns its bytes. Raises MissingRows for positions that no block covers, and RowsMismatch for blocks that
    overlap, start before `start`, disagree about the model, or whose bytes or version spans do not fit their header.
    """
    if not blocks:
        raise MissingRows(f"routed-expert rows [{start}, {stop}) are missing: no leg sent any")
    headers = [block.header for block in blocks]
    _check_same_model(headers)
    _check_ranges(headers, start, stop)
    parts = [view(block) for block in blocks]  # checks the lengths of the data
    spans = _join_spans(headers, stop)
    header = replace(headers[0], stop=stop, weight_versions=spans)
    if len(blocks) == 1 and headers[0].stop == stop:
        return RowBlock(header, blocks[0].data)
    rows = np.empty(header.shape, dtype=parts[0].dtype)
    filled = 0
    for part in parts:
        kept = part[: len(rows) - filled]
        rows[filled : filled + len(kept)] = kept
        filled += len(kept)
    assert filled == len(rows), (filled, len(rows))
    return RowBlock(header, rows.data.cast("B") if rows.size else b"")


def _check_same_model(headers: Sequence[RowHeader]) -> None:
    first = headers[0]
    for header in headers[1:]:
        for name in _SAME:
            ours, theirs = getattr(first, name), getattr(header, name)
            if ours != theirs:
                raise RowsMismatch(
                    f"blocks [{first.start}, {first.stop}) and [{header.start}, {header.stop}) differ in {name}: "
                    f"{ours} and {theirs}"
                )


def _check_ranges(headers: Sequence[RowHeader], start: int, stop: int) -> None:
    if start > stop:
        raise RowsMismatch(f"rows cannot start at {start} and stop at {stop}")
    for header in headers:
        if header.start > header.stop:
            raise RowsMismatch(f"a block's range [{header.start}, {header.stop}) runs backwards")
    if headers[0].start > start:
        raise MissingRows(f"routed-expert rows [{start}, {headers[0].start}) are missing: before the first block")
    if headers[0].start < start:
        raise RowsMismatch(f"the first block starts at {headers[0].start}, before {start}")
    for left, right in pairwise(headers):
        if left.stop < right.start:
            raise MissingRows(f"routed-expert rows [{left.stop}, {right.start}) are missing: between two blocks")
        if left.stop > right.start:
            raise RowsMismatch(
                f"blocks [{left.start}, {left.stop}) and [{right.start}, {right.stop}) overlap in "
                f"[{right.start}, {min(left.stop, right.stop)})"
            )
    if headers[-1].stop < stop:
        raise MissingRows(f"routed-expert rows [{headers[-1].stop}, {stop}) are missing: after the last block")


def _join_spans(headers: Sequence[RowHeader], stop: int) -> Spans:
    """Join the blocks' version spans, and cut them at `stop`."""
    for header in headers:
        if not cover(header.weight_versions, header.start, header.stop):
            raise RowsMismatch(
                f"the weight versions of block [{header.start}, {header.stop}) do not cover it: "
                f"{[astuple(span) for span in header.weight_versions]}"
            )
    spans = chain.from_iterable(header.weight_versions for header in headers)
    return join(cut(spans, headers[0].start, stop))
