"""What a prefill worker runs next: prompts in the order they came, cut into chunks that fill each step's token budget.

A prompt holds the pages of all its tokens from the moment it is admitted, shared ones first where a prefix is cached. It is
admitted only when the step has budget left for it, so that it finds what earlier prompts have just put into the cache.
"""

from collections import deque
from collections.abc import Callable

from common.engine.seats import Seats
from common.memory.layout import num_pages_for
from common.memory.page_allocator import PageAllocator
from common.memory.page_source import PageSource
from common.memory.prefix_cache import PrefixCache
from common.scheduling.request import Request, RequestState
from common.scheduling.step_plan import StepEntry, StepPlan


class PrefillScheduler:
    """Admits prompts and plans their chunks. Where `admit` is given, it seats a prompt, or says that there is no room for it."""

    def __init__(
        self,
        allocator: PageAllocator,
        seats: Seats,
        prefix_cache: PrefixCache | None,
        *,
        page_size: int,
        chunk_tokens: int,
        admit: Callable[[Request], bool] | None = None,
    ) -> None:
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._pages = PageSource(allocator, prefix_cache)
        self._seats = seats
        self._page_size = page_size
        self._chunk_tokens = chunk_tokens
        self._admit = admit or self._admit_alone

    def add(self, request: Request) -> None:
        """Queue a prompt."""
        self.waiting.append(request)

    def plan(self) -> StepPlan | None:
        """Fill one step: started prompts first, then new ones while there is budget and memory for them."""
        budget = self._chunk_tokens
        entries: list[StepEntry] = []
        for request in self.running:
            budget -= self._plan_chunk(request, budget, entries)
        while budget > 0 and self.waiting and self._admit(self.waiting[0]):
            request = self.waiting.popleft()
            self.running.append(request)
            budget -= self._plan_chunk(request, budget, entries)
        return StepPlan(tuple(entries)) if entries else None

    def remove(self, request: Request) -> None:
        """Take a request out of the queue or out of later steps; what it holds stays its own."""
        if request.state is RequestState.QUEUED:
            self.waiting.remove(request)
        elif request in self.running:
            self.running.remove(request)

    def _plan_chunk(self, request: Request, budget: int, entries: list[StepEntry]) -> int:
        start = request.planned_tokens
        stop = min(request.num_prompt_tokens, start + budget)
        if start == stop:
            return 0
        sampling = request.message.options.sampling
        samples = sampling.n if stop == request.num_prompt_tokens and sampling.max_new_tokens > 0 else 0
        entries.append(StepEntry(request, start, stop, samples))
        request.planned_tokens = stop
        request.steps_in_flight += 1
        return stop - start

    def _admit_alone(self, request: Request) -> bool:
        if self._seats.num_free == 0:
            return False
        num_pages = num_pages_for(request.num_prompt_tokens, self._page_size)
        taken = self._pages.take_for_prompt(request.prompt[: request.num_cacheable_tokens], num_pages)
        if taken is None:
            return False
        self._seats.take(request, taken.pages)
        request.begin(num_cached_tokens=taken.num_cached * self._page_size)
        request.advance(RequestState.RUNNING)
        return True
