"""Seats: the one place where a request gets a table row and pages, and the one place where it loses them.

A row goes back when no step with the request is in flight; the pages when, besides, nobody else may read or write them for
this request: no transfer, no peer (R11). Who knows when that is, is the role's worker.
"""

from collections.abc import Sequence

from common.memory.page_allocator import PageAllocator
from common.memory.request_table import RequestTable
from common.scheduling.request import Request


class Seats:
    """Rows and pages of an engine, handed to requests together."""

    def __init__(self, allocator: PageAllocator, table: RequestTable) -> None:
        self._allocator = allocator
        self._table = table
        self.holders: set[Request] = set()
        """Requests that hold pages."""

    @property
    def num_free(self) -> int:
        """How many more requests can be seated, as far as rows go."""
        return self._table.num_free

    def take(self, request: Request, pages: list[int]) -> None:
        """Seat a request on pages that the caller has allocated or shared for it, in order of their positions."""
        request.pages = pages
        request.row = self._table.allocate(
            pages, request.message.options, seed=request.seed, num_prompt_tokens=request.num_prompt_tokens
        )
        self.holders.add(request)

    def grow(self, request: Request, pages: list[int]) -> None:
        """Give a seated request more pages, which the caller has allocated for it."""
        self._table.pages[request.row, len(request.pages) : len(request.pages) + len(pages)] = pages
        request.pages += pages

    def grow_each(self, requests: Sequence[Request], pages: list[int]) -> None:
        """Do as `grow` does with many requests at once: each gets one page, in their order."""
        places = [(request.row, len(request.pages)) for request in requests]
        self._table.pages[tuple(zip(*places, strict=True))] = pages
        for request, page in zip(requests, pages, strict=True):
            request.pages.append(page)

    def give_back_row(self, request: Request) -> None:
        """Free the row, if the request has one; no step with it may be in flight."""
        assert request.steps_in_flight == 0, f"{request.rid} is in a step"
        if request.row >= 0:
            self._table.release(request.row)
            request.row = -1

    def give_back_pages(self, request: Request) -> None:
        """Give one reference to each of the request's pages back."""
        assert request.row < 0, f"{request.rid} still has its row"
        self._allocator.release(request.pages)
        request.pages = []
        self.holders.discard(request)
