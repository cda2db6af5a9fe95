"""Every buffer's size, derived once from the model and the options (R9); pure, so that a property test can search it.

Units are in the names. No other module computes a size: what is not here has no size of its own.
"""

from msgspec import Struct

from common.config import EngineOptions
from common.errors import UsageError
from common.memory.layout import KvLayout, num_pages_for
from common.routed_experts.spec import RowSpec

DEFAULT_CPU_POOL_TOKENS = 32768
LARGEST_GRAPH = 512
"""Larger steps compute for so long that launching them one kernel at a time costs nothing."""
TOKEN_COUNT_BYTES = 5
"""For each row and token: a count in int32, and whether the prompt has it."""


class CapacityPlan(Struct, frozen=True, kw_only=True):
    """What one engine can hold. Slots are `[0, kv_pool_tokens)`, pages `[0, num_pages)`, rows of a step `[0, max_step_tokens)`."""

    page_size: int
    num_pages: int
    context_tokens: int
    """Longest P + G."""
    pages_per_request: int
    max_running_requests: int
    max_step_tokens: int
    """Of one attention group."""
    max_gathered_tokens: int
    """Of all attention groups together: what the experts see at most."""
    graph_sizes: tuple[int, ...]
    """Padded numbers of tokens of small steps, rising; none is over `max_running_requests`, so a padded step fits all buffers."""
    kv_pool_bytes: int
    """Of all pages and the padding page."""
    capture_buffer_bytes: int
    gathered_bytes: int
    """What the experts hold of the tokens of all attention groups; 0 with one group."""
    token_counts_bytes: int
    """Taken when the first request asks for penalties."""
    host_cache_bytes: int

    @property
    def kv_pool_tokens(self) -> int:
        """Slots in the pool."""
        return self.num_pages * self.page_size


def plan_capacity(
    options: EngineOptions,
    layout: KvLayout,
    rows: RowSpec,
    *,
    vocab_size: int,
    context_tokens: int,
    chunked_prefill_tokens: int,
    budget_bytes: int | None,
    dp: int = 1,
    gathered_token_bytes: int = 0,
) -> CapacityPlan:
    """Derive all sizes, those of one attention group of `dp`.

    `chunked_prefill_tokens` is 0 for a worker that never prefills; `budget_bytes` is for the pool and the buffers together,
    None for the default. With several groups each token of any of them takes `gathered_token_bytes` while the experts run.

    Raises UsageError if not even one page fits.
    """
    max_step_tokens = max(chunked_prefill_tokens, options.max_running_requests)
    graph_sizes = _graph_sizes(options.max_running_requests)
    capture_buffer_bytes = max_step_tokens * rows.row_bytes
    max_gathered_tokens = dp * max_step_tokens
    gathered_bytes = max_gathered_tokens * gathered_token_bytes if dp > 1 else 0
    token_counts_bytes = options.max_running_requests * vocab_size * TOKEN_COUNT_BYTES
    if options.kv_pool_tokens or budget_bytes is None:
        num_pages = (options.kv_pool_tokens or DEFAULT_CPU_POOL_TOKENS) // options.page_size
    else:
        # One page more is in the pool than anybody is given: the padding page.
        buffers_bytes = capture_buffer_bytes + token_counts_bytes + gathered_bytes
        num_pages = max(0, budget_bytes - buffers_bytes) // layout.page_bytes - 1
    if num_pages < 1:
        raise UsageError("--kv-pool-tokens: the KV pool would not hold a single page")
    return CapacityPlan(
        page_size=options.page_size,
        num_pages=num_pages,
        context_tokens=context_tokens,
        pages_per_request=num_pages_for(context_tokens, options.page_size),
        max_running_requests=options.max_running_requests,
        max_step_tokens=max_step_tokens,
        max_gathered_tokens=max_gathered_tokens,
        graph_sizes=graph_sizes,
        kv_pool_bytes=(num_pages + 1) * layout.page_bytes,
        capture_buffer_bytes=capture_buffer_bytes,
        gathered_bytes=gathered_bytes,
        token_counts_bytes=token_counts_bytes,
        host_cache_bytes=num_pages * options.page_size * rows.row_bytes,
    )


def _graph_sizes(max_running_requests: int) -> tuple[int, ...]:
    """Every power of two and, from 24 on, those half way between: few to capture, and little of a step is padding."""
    largest = min(max_running_requests, LARGEST_GRAPH)
    sizes = {1 << shift for shift in range(17)} | {3 << shift for shift in range(3, 15)}
    return (*sorted(size for size in sizes if size < largest), largest)
