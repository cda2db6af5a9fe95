"""Swapping: a running request's KV and rows to host memory and back, when older requests need its pages.

Only a request with no step in flight is swapped, so that nothing on the device still touches its pages, and nothing is ever
computed again: the rows of emitted tokens are copied out with the KV that they describe, and committed to the new slots (R8).
"""

from dataclasses import dataclass

from common.engine.engine import Engine
from common.memory.layout import num_pages_for, slots_of
from common.routed_experts.host_cache import Rows, Slots
from common.scheduling.request import Request, RequestState


@dataclass(frozen=True, slots=True)
class _Swapped:
    key: int
    """What the engine knows the KV pages by."""
    num_pages: int
    positions: Slots
    """Positions whose rows were written; the prompt's are the prefill worker's."""
    rows: Rows


class SwapSpace:
    """The swapped requests of one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._swapped: dict[Request, _Swapped] = {}
        self.num_swaps = 0
        """Swapped out so far; each has its number as its key."""

    def out(self, request: Request) -> None:
        """Copy what the request has computed to the host and free its row and pages. Blocks until the copy is there."""
        assert request.steps_in_flight == 0
        engine, page_size = self._engine, self._engine.capacity.page_size
        slots = slots_of(request.pages, 0, request.computed_tokens, page_size)
        rows, written = engine.host_cache.read(slots)
        num_pages = num_pages_for(request.computed_tokens, page_size)
        engine.swap_out(self.num_swaps, request.pages[:num_pages])
        self._swapped[request] = _Swapped(self.num_swaps, num_pages, written.nonzero()[0], rows[written])
        request.advance(RequestState.SWAPPED)
        request.planned_tokens = request.computed_tokens
        engine.seats.give_back_row(request)
        engine.seats.give_back_pages(request)
        self.num_swaps += 1

    def back(self, request: Request, pages: list[int]) -> None:
        """Seat the request on new pages and put its KV and rows into them."""
        engine, swapped = self._engine, self._swapped.pop(request)
        engine.seats.take(request, pages)
        engine.swap_in(swapped.key, pages[: swapped.num_pages])
        slots = slots_of(pages, 0, request.computed_tokens, engine.capacity.page_size)[swapped.positions]
        engine.host_cache.commit(engine.host_cache.reserve(slots), swapped.rows)
        request.advance(RequestState.RUNNING)

    def rows_of(self, request: Request, start: int, stop: int) -> Rows:
        """The rows of positions `[start, stop)` of a swapped request, `[n, L, K]`; all of them were written."""
        swapped = self._swapped[request]
        return swapped.rows[(swapped.positions >= start) & (swapped.positions < stop)]

    def drop(self, request: Request) -> None:
        """Forget a swapped request that has ended."""
        swapped = self._swapped.pop(request, None)
        if swapped is not None:
            self._engine.forget_swapped(swapped.key)
