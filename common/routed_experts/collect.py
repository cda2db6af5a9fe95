"""Collecting: from the host cache to a block of rows that may leave, or an error that names what is missing.

Neighbours: `host_cache` (where rows wait), `verify` (the last check), `router.merge` (which joins the blocks of both legs).
"""

import numpy as np

from common.errors import MissingRows
from common.messages import RowBlock
from common.routed_experts.host_cache import HostCache, Rows, Slots
from common.routed_experts.spec import RowSpec
from common.routed_experts.verify import verify
from common.versions import Spans


def collect(
    cache: HostCache, slots: Slots, *, start: int, rid: str, weight_versions: Spans, verified: bool = True
) -> RowBlock:
    """Gather the rows of positions `[start, start + len(slots))`, which live in `slots`, into a block that owns its bytes.
    `weight_versions` say who has computed them.

    Raises MissingRows, naming the request and the positions, if a row was not written by the slots' present owner, and
    BadRows (unless `verified` is off) if a row is not K distinct ids in `[0, E)`.
    """
    rows, written = cache.read(slots)
    if not written.all():
        positions = start + np.flatnonzero(~written)
        raise MissingRows(
            f"request {rid}: {len(positions)} of {len(slots)} routed-expert rows were never written, "
            f"at positions {positions[0]} to {positions[-1]}"
        )
    return make_block(cache.spec, rows, start=start, weight_versions=weight_versions, verified=verified)


def make_block(spec: RowSpec, rows: Rows, *, start: int, weight_versions: Spans, verified: bool) -> RowBlock:
    """Make a block of rows `[n, L, K]` that nobody else writes, of positions `[start, start + n)`. Raises BadRows."""
    header = spec.header(start=start, stop=start + len(rows), weight_versions=weight_versions)
    block = RowBlock(header, rows.reshape(-1).view(np.uint8).data)
    if verified:
        verify(block)
    return block
