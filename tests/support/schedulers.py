"""The real schedulers without an engine: steps are planned, settle when the test says so, and compute nothing.

Each `Run` does with a scheduler what its worker does around it, and not more; `recount` is exact at every moment.
"""

from collections import deque

import torch

from common.engine.seats import Seats
from common.memory.page_allocator import PageAllocator
from common.memory.prefix_cache import PrefixCache
from common.memory.request_table import RequestTable
from common.messages import Generate, RequestOptions, SamplingParams
from common.scheduling.request import Request, RequestState
from common.scheduling.step_plan import StepPlan
from decode_worker.scheduler import DecodeScheduler
from decode_worker.swap import SwapSpace
from prefill_worker.scheduler import PrefillScheduler


def make_request(prompt: list[int], max_new_tokens: int = 1, rid: str = "r", *, n: int = 1, index: int = 0) -> Request:
    """A queued request."""
    options = RequestOptions(sampling=SamplingParams(max_new_tokens=max_new_tokens, n=n))
    return Request.of(Generate(rid=rid, input_ids=prompt, options=options), index)


class _Run:
    """Pages, rows, and steps in flight."""

    def __init__(self, num_pages: int, max_running: int, pages_per_row: int) -> None:
        self.allocator = PageAllocator(num_pages)
        self.table = RequestTable(max_running, pages_per_row, torch.device("cpu"))
        self.seats = Seats(self.allocator, self.table)
        self.in_flight: deque[StepPlan] = deque()
        self.ended: list[Request] = []

    def give_back(self, request: Request) -> None:
        """Let go of a request that is out of the scheduler, now or when its last step has settled."""
        if request.steps_in_flight > 0:
            if request.state is not RequestState.SURPLUS:
                request.advance(RequestState.SURPLUS)
            return
        self.seats.give_back_row(request)
        self.seats.give_back_pages(request)
        request.advance(RequestState.ENDED)
        self.ended.append(request)

    def land(self) -> list[Request]:
        """Settle the eldest step; returns the requests that are still wanted."""
        wanted = []
        for entry in self.in_flight.popleft().entries:
            entry.request.steps_in_flight -= 1
            if entry.request.state is RequestState.SURPLUS:
                self.give_back(entry.request)
                continue
            entry.request.computed_tokens = entry.stop
            wanted.append(entry.request)
        return wanted


class PrefillRun(_Run):
    """A prefill scheduler and its prefix cache."""

    def __init__(
        self,
        *,
        num_pages: int = 64,
        page_size: int = 4,
        max_running: int = 8,
        chunk_tokens: int = 16,
        pages_per_row: int = 64,
        prefix_cache: bool = True,
    ) -> None:
        super().__init__(num_pages, max_running, pages_per_row)
        self.cache = PrefixCache(self.allocator, page_size) if prefix_cache else None
        self.scheduler = PrefillScheduler(
            self.allocator, self.seats, self.cache, page_size=page_size, chunk_tokens=chunk_tokens
        )

    def add(self, prompt: list[int], max_new_tokens: int = 1, rid: str = "r", *, n: int = 1) -> Request:
        """Queue a prompt, once for all of its n samples."""
        request = make_request(prompt, max_new_tokens, rid, n=n)
        self.scheduler.add(request)
        return request

    def launch(self) -> StepPlan | None:
        """Plan a step, which is then in flight."""
        plan = self.scheduler.plan()
        if plan is not None:
            self.in_flight.append(plan)
        return plan

    def settle(self) -> None:
        """Settle the eldest step; prompts that are complete go, their pages into the cache."""
        for request in self.land():
            if request.computed_tokens == request.num_prompt_tokens:
                if self.cache is not None:
                    self.cache.insert(request.prompt, request.pages)
                self.scheduler.remove(request)
                self.give_back(request)

    def abort(self, request: Request) -> None:
        """Give a request up that is queued or running."""
        self.scheduler.remove(request)
        self.give_back(request)

    def recount(self) -> int:
        """Pages that are not where their owners say."""
        cached = [] if self.cache is None else list(self.cache.pages())
        return self.allocator.num_unaccounted([cached, *(request.pages for request in self.seats.holders)])


class NoMemory(SwapSpace):
    """Swaps rows of the table and pages; there is no KV and there are no routed-expert rows to copy."""

    def __init__(self, seats: Seats) -> None:
        self.seats = seats
        self.swapped_out: list[Request] = []

    def out(self, request: Request) -> None:
        """Give row and pages back."""
        assert request.steps_in_flight == 0
        request.advance(RequestState.SWAPPED)
        request.planned_tokens = request.computed_tokens
        self.seats.give_back_row(request)
        self.seats.give_back_pages(request)
        self.swapped_out.append(request)

    def back(self, request: Request, pages: list[int]) -> None:
        """Take the new ones."""
        self.seats.take(request, pages)
        request.advance(RequestState.RUNNING)

    def drop(self, request: Request) -> None:
        """Nothing is kept."""


class DecodeRun(_Run):
    """A decode scheduler; a sample starts when the test says that its KV is here."""

    def __init__(
        self, *, num_pages: int = 64, page_size: int = 4, max_running: int = 8, pages_per_row: int = 64
    ) -> None:
        super().__init__(num_pages, max_running, pages_per_row)
        self.swap_space = NoMemory(self.seats)
        self.scheduler = DecodeScheduler(self.allocator, self.seats, self.swap_space, page_size=page_size)
        self.receiving: list[Request] = []

    def add(self, prompt: list[int], max_new_tokens: int, rid: str = "r", *, n: int = 1) -> tuple[Request, ...]:
        """Queue the n samples of a prompt."""
        siblings = tuple(make_request(prompt, max_new_tokens, rid, n=n, index=index) for index in range(n))
        self.scheduler.add(siblings)
        return siblings

    def admit(self) -> list[Request]:
        """Seat whom there is room for."""
        admitted = [request for siblings in self.scheduler.admit() for request in siblings]
        self.receiving += admitted
        return admitted

    def arrive(self, request: Request) -> None:
        """The KV and the first token are here."""
        self.receiving.remove(request)
        self.scheduler.start(request, computed_tokens=request.num_prompt_tokens)
        self._take_token(request)

    def launch(self) -> StepPlan | None:
        """Plan a step, which is then in flight."""
        plan = self.scheduler.plan()
        if plan is not None:
            self.in_flight.append(plan)
        return plan

    def settle(self) -> None:
        """Settle the eldest step: each sample of it that is still wanted has one more token."""
        for request in self.land():
            self._take_token(request)

    def abort(self, request: Request) -> None:
        """Give a sample up, wherever it is; its peer is quiet at once."""
        self.scheduler.remove(request)
        if request in self.receiving:
            self.receiving.remove(request)
        self.give_back(request)

    def recount(self) -> int:
        """Pages that are not where their owners say."""
        return self.allocator.num_unaccounted(request.pages for request in self.seats.holders)

    def _take_token(self, request: Request) -> None:
        request.output_ids.append(0)
        if len(request.output_ids) == request.message.options.sampling.max_new_tokens:
            self.scheduler.remove(request)
            self.give_back(request)
