"""What an engine says of itself: its limits at start, and later gauges, counters, and a recount of its pages."""

from collections.abc import Iterable
from typing import Protocol

from common.engine.engine import Engine
from common.messages import EngineReady, PageCounts, Stats
from common.scheduling.request import RequestState


def describe(engine: Engine) -> EngineReady:
    """Say what the engine serves, and the limits that requests are checked against."""
    config, capacity = engine.config, engine.capacity
    return EngineReady(
        model_type=config.model_type,
        dtype=engine.kv_pool.layout.dtype,
        device=str(engine.kv_pool.pages.device),
        vocab_size=config.vocab_size,
        context_tokens=capacity.context_tokens,
        kv_pool_tokens=capacity.kv_pool_tokens,
        page_size=capacity.page_size,
        num_hidden_layers=config.num_hidden_layers,
        moe_layer_ids=config.moe_layer_ids,
        num_experts=config.num_experts,
        top_k=config.top_k,
        max_running_requests=capacity.max_running_requests,
        weight_version=engine.weight_version,
    )


class TransferCounters(Protocol):
    """What a transfer endpoint counts; read from the engine's thread, written by the transfer's."""

    @property
    def num_rooms(self) -> int:
        """Rooms that are open."""

    num_writes: int
    num_bytes: int
    num_dropped: int


def make_stats(
    engine: Engine,
    transfer: TransferCounters,
    *,
    serial: int,
    queued_requests: int,
    running_requests: int,
    cached_pages: Iterable[int] = (),
    tokens_cached: int = 0,
    rows_refused: int,
    swaps: int = 0,
) -> Stats:
    """Recount the pages and gather the counters. O(pages)."""
    return Stats(
        serial=serial,
        queued_requests=queued_requests,
        running_requests=running_requests,
        pages=count_pages(engine, cached_pages),
        steps=engine.num_steps,
        tokens_computed=engine.num_tokens_computed,
        tokens_cached=tokens_cached,
        rows_committed=engine.host_cache.rows_committed,
        rows_dropped=engine.host_cache.rows_dropped,
        rows_refused=rows_refused,
        kv_bytes=transfer.num_bytes,
        kv_writes=transfer.num_writes,
        rooms=transfer.num_rooms,
        dropped_messages=transfer.num_dropped,
        swaps=swaps,
        failed_steps=engine.num_failed_steps,
    )


def count_pages(engine: Engine, cached_pages: Iterable[int]) -> PageCounts:
    """Recount every page from its owners: the prefix cache and the seated requests."""
    cached = list(cached_pages)
    holders = engine.seats.holders
    running = {page for r in holders if r.state is not RequestState.QUARANTINED for page in r.pages}
    return PageCounts(
        total=engine.allocator.num_pages,
        free=engine.allocator.num_free,
        cached=len(cached),
        running=len(running),
        quarantined=count_quarantined(engine),
        unaccounted=engine.allocator.num_unaccounted([cached, *(request.pages for request in holders)]),
    )


def count_quarantined(engine: Engine) -> int:
    """Count the pages in quarantine; costs nothing while there are none."""
    holders = engine.seats.holders
    return len({page for r in holders if r.state is RequestState.QUARANTINED for page in r.pages})
