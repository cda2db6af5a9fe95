"""What a decode worker runs next: every running request, one token each; and who may start, in the order they came.

A request is admitted when there are pages for its prompt and for all the tokens that it may generate, so that a running
request never runs out of memory.
"""

from collections import deque

from common.engine.seats import Seats
from common.memory.page_allocator import PageAllocator
from common.scheduling.request import Request, RequestState
from common.scheduling.step_plan import StepEntry, StepPlan


class DecodeScheduler:
    """Admits requests and plans their steps."""

    def __init__(self, allocator: PageAllocator, seats: Seats, *, page_size: int) -> None:
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._allocator = allocator
        self._seats = seats
        self._page_size = page_size

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def admit(self) -> list[Request]:
        """Seat waiting requests while there is room; the caller fetches their KV."""
        admitted: list[Request] = []
        while self.waiting and self._seats.any_free:
            request = self.waiting[0]
            pages = self._allocator.allocate(self._pages_for(request))
            if pages is None:
                break
            self.waiting.popleft()
            self._seats.take(request, pages)
            request.advance(RequestState.RECEIVING)
            admitted.append(request)
        return admitted

    def start(self, request: Request, *, computed_tokens: int) -> None:
        """Let a request take part in steps: the KV of its first `computed_tokens` positions is here."""
        request.advance(RequestState.RUNNING)
        request.planned_tokens = request.computed_tokens = computed_tokens
        self.running.append(request)

    def plan(self) -> StepPlan | None:
        """One token for every running request that may still yield one; the last one is never computed upon."""
        entries: list[StepEntry] = []
        for request in self.running:
            start = request.planned_tokens
            if start < request.max_total_tokens - 1:
                entries.append(StepEntry(request, start, start + 1, samples=True))
                request.planned_tokens = start + 1
                request.steps_in_flight += 1
        return StepPlan(tuple(entries)) if entries else None

    def remove(self, request: Request) -> None:
        """Take a request out of the queue or out of later steps; what it holds stays its own."""
        if request.state is RequestState.QUEUED:
            self.waiting.remove(request)
        elif request.state is RequestState.RUNNING:
            self.running.remove(request)

    def _pages_for(self, request: Request) -> int:
        # The last token that a request may generate never enters a forward pass, so it takes no slot.
        most_tokens = max(request.num_prompt_tokens, request.max_total_tokens - 1)
        return -(-most_tokens // self._page_size)
