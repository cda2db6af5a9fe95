"""What a prefill worker runs next: prompts in the order they came, cut into chunks that fill each step's token budget.

A prompt holds the pages of all its tokens from the moment it is admitted, shared ones first where a prefix is cached. It is
admitted only when the step has budget left for it, so that it finds what earlier prompts have just put into the cache.
"""

import time
from collections import deque

from common.engine.seats import Seats
from common.memory.layout import num_pages_for
from common.memory.page_allocator import PageAllocator
from common.memory.prefix_cache import PrefixCache
from common.scheduling.request import Request, RequestState
from common.scheduling.step_plan import StepEntry, StepPlan


class PrefillScheduler:
    """Admits prompts and plans their chunks."""

    def __init__(
        self,
        allocator: PageAllocator,
        seats: Seats,
        prefix_cache: PrefixCache | None,
        *,
        page_size: int,
        chunk_tokens: int,
    ) -> None:
        self.prefix_cache = prefix_cache
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._allocator = allocator
        self._seats = seats
        self._page_size = page_size
        self._chunk_tokens = chunk_tokens

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
        elif request.state is RequestState.RUNNING:
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

    def _cacheable_tokens(self, request: Request) -> int:
        """A prompt token's logprob comes from the step that computes the position before it, so that one may not be a hit."""
        options = request.message.options
        if options.return_logprob and options.logprob_start_len >= 0:
            return min(request.num_prompt_tokens, max(1, options.logprob_start_len))
        return request.num_prompt_tokens

    def _admit(self, request: Request) -> bool:
        if self._seats.num_free == 0:
            return False
        cache = self.prefix_cache
        shared = cache.match(request.prompt[: self._cacheable_tokens(request)]) if cache is not None else []
        num_missing = num_pages_for(request.num_prompt_tokens, self._page_size) - len(shared)
        if cache is not None and num_missing > self._allocator.num_free:
            cache.evict(num_missing - self._allocator.num_free)
        fresh = self._allocator.allocate(num_missing)
        if fresh is None:
            self._allocator.release(shared)
            return False
        self._seats.take(request, shared + fresh)
        request.cached_tokens = request.planned_tokens = request.computed_tokens = len(shared) * self._page_size
        request.started_at = time.perf_counter()
        request.advance(RequestState.RUNNING)
        return True
