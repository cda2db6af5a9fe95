"""start_len: a trainer that has the first rows already asks for the last 64 of a long request; against collecting them all.

The request's pages lie scattered over the pool, as they do in a worker that has run for a while. The collection is the
one that a worker runs on its scheduler's thread: gather, check that each row was written, verify.
"""

import numpy as np

from common.memory.page_allocator import PageAllocator
from common.routed_experts.collect import collect
from common.routed_experts.host_cache import HostCache, Slots
from common.versions import whole
from deploy.bench.figures import Figure, Target, make_figure
from deploy.bench.material import LONG_TOKENS, SPEC, WEIGHT_VERSION, make_rows
from deploy.bench.options import BenchOptions
from deploy.bench.rounds import alternate, seconds_of

_NAME = "start_len"
_PAGE_SIZE = 16
_FEW_ROWS = 64
# One collection is over in a moment, so more rounds cost nothing.
_ROUNDS_FACTOR = 20


def run(options: BenchOptions) -> list[Figure]:
    """Measure both collections, in microseconds."""
    num_rows = options.scaled(LONG_TOKENS, least=2 * _FEW_ROWS)
    cache, slots = _filled_cache(num_rows)

    def microseconds(count: int) -> float:
        start = num_rows - count
        chosen, versions = slots[start:], whole(start, num_rows, WEIGHT_VERSION)
        return 1e6 * seconds_of(
            lambda: collect(cache, chosen, start=start, rid="bench", weight_versions=versions, verified=True)
        )

    values = alternate(
        {count: lambda count=count: microseconds(count) for count in (_FEW_ROWS, num_rows)},  # type: ignore[misc]
        options.rounds * _ROUNDS_FACTOR,
    )
    return [
        make_figure(
            _NAME,
            "collection",
            "us",
            (f"last {_FEW_ROWS} rows", values[_FEW_ROWS]),
            (f"all {num_rows:,}", values[num_rows]),
            target=Target(of="A", bound="at most", limit=200),
        )
    ]


def _filled_cache(num_rows: int) -> tuple[HostCache, Slots]:
    """Make a pool of twice the size, and a request of `num_rows` rows whose pages lie anywhere in it."""
    num_pages = -(-num_rows // _PAGE_SIZE)
    allocator = PageAllocator(2 * num_pages)
    everything = allocator.allocate(2 * num_pages)
    assert everything is not None
    allocator.release([int(page) for page in np.random.default_rng(0).permutation(everything)])
    pages = allocator.allocate(num_pages)
    assert pages is not None
    slots = (np.array(pages)[:, None] * _PAGE_SIZE + np.arange(_PAGE_SIZE)).reshape(-1)[:num_rows]
    cache = HostCache(SPEC, allocator.generations, _PAGE_SIZE)
    cache.commit(cache.reserve(slots), make_rows(num_rows))
    return cache, slots
