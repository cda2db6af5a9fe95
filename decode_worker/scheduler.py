"""What a decode worker runs next: every running request, one token each; who may start, and who must give way.

Requests are admitted in the order they came, on pages for their prompt and one token; later pages are taken as the tokens come.
When there are none left, the youngest running request gives way: it sits out until its last step has settled, and is swapped to
host memory. It comes back, before anyone new is admitted, as soon as there is room. The eldest never gives way, so there is
always one that gets on.

The n samples of a prompt are admitted together: they share its full pages, and each has a last, partial page of its own.
"""

from bisect import insort
from collections import deque

from common.engine.seats import Seats
from common.memory.layout import num_pages_for
from common.memory.page_allocator import PageAllocator
from common.memory.page_source import PageSource
from common.memory.prefix_cache import PrefixCache
from common.scheduling.request import Request, RequestState
from common.scheduling.step_plan import StepEntry, StepPlan
from decode_worker.swap import SwapSpace

Siblings = tuple[Request, ...]
"""The samples of one prompt, by index."""


class DecodeScheduler:
    """Admits requests, plans their steps, and decides who gives way."""

    def __init__(
        self,
        allocator: PageAllocator,
        seats: Seats,
        swap_space: SwapSpace,
        *,
        page_size: int,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        self.waiting: deque[Siblings] = deque()
        self.running: list[Request] = []
        """Eldest first."""
        self.swapped: deque[Request] = deque()
        """Eldest first."""
        self._yielding: set[Request] = set()
        self._order: dict[Request, int] = {}
        self._num_started = 0
        self._allocator = allocator
        self._pages = PageSource(allocator, prefix_cache)
        self._seats = seats
        self._swap_space = swap_space
        self._page_size = page_size

    # -------------------------------------------------------------------------------------------- admission

    def add(self, siblings: Siblings) -> None:
        """Queue the samples of a prompt."""
        self.waiting.append(siblings)

    def pages_to_admit(self, siblings: Siblings) -> int:
        """How many pages must be free for these to be admitted."""
        # A prompt that is only scored has no token behind it.
        num_tokens = min(siblings[0].num_prompt_tokens + 1, siblings[0].max_total_tokens)
        own = self._pages_for(num_tokens) - self._num_shared(siblings)
        return self._num_shared(siblings) + own * len(siblings)

    def admit(self) -> list[Siblings]:
        """Seat waiting requests while there is room; the caller fetches their KV."""
        admitted: list[Siblings] = []
        while self.waiting and self.seat(self.waiting[0]):
            admitted.append(self.waiting.popleft())
        return admitted

    def seat(self, siblings: Siblings) -> bool:
        """Seat the samples of a prompt if there is room for them all and nobody is swapped; says whether it did.

        Where there is a prefix cache, the first sample has begun behind what that knows of the prompt.
        """
        if self.swapped or self._yielding or self._seats.num_free < len(siblings):
            return False
        leader = siblings[0]
        taken = self._pages.take_for_prompt(
            leader.prompt[: leader.num_cacheable_tokens], self.pages_to_admit(siblings), leaving=self._headroom()
        )
        if taken is None:
            return False
        self._seat(siblings, taken.pages)
        leader.begin(num_cached_tokens=taken.num_cached * self._page_size)
        return True

    def _seat(self, siblings: Siblings, pages: list[int]) -> None:
        num_shared = self._num_shared(siblings)
        shared, own = pages[:num_shared], pages[num_shared:]
        num_own = len(own) // len(siblings)
        for index, request in enumerate(siblings):
            if index > 0:
                self._allocator.share(shared)
            self._seats.take(request, shared + own[index * num_own : (index + 1) * num_own])
            request.advance(RequestState.RECEIVING)
            self._order[request] = self._num_started
            self._num_started += 1

    def num_shared_pages(self, request: Request) -> int:
        """How many pages a sample after the first shares with it."""
        return request.num_prompt_tokens // self._page_size if request.index > 0 else 0

    def start(self, request: Request, *, computed_tokens: int) -> None:
        """Let a request take part in steps: the KV of its first `computed_tokens` positions is here."""
        request.advance(RequestState.RUNNING)
        request.planned_tokens = request.computed_tokens = computed_tokens
        self._join(request)

    def remove(self, request: Request) -> None:
        """Take a request out of the queue or out of later steps; what it holds stays its own."""
        match request.state:
            case RequestState.QUEUED:
                self.waiting = deque(siblings for siblings in self.waiting if request not in siblings)
            case RequestState.RUNNING:
                self.running.remove(request)
            case RequestState.SWAPPED:
                self.swapped.remove(request)
                self._swap_space.drop(request)
            case _:
                pass
        self._yielding.discard(request)
        self._order.pop(request, None)

    # -------------------------------------------------------------------------------------------- steps

    def plan(self) -> StepPlan | None:
        """One token for every running request that may still yield one; the last one is never computed upon."""
        self._swap_settled()
        entries = self._plan_running()
        # Who is swapped comes back to what those who run have left over.
        if self._bring_back() and not entries:
            entries = self._plan_running()
        return StepPlan(tuple(entries)) if entries else None

    def _plan_running(self) -> list[StepEntry]:
        ready = [
            request
            for request in self.running
            if request.planned_tokens < request.max_total_tokens - 1 and request not in self._yielding
        ]
        page_size = self._page_size
        full = [request for request in ready if request.planned_tokens >= len(request.pages) * page_size]
        if full and not self._grow_each(full):
            ready = [request for request in ready if self._cover(request)]
        entries: list[StepEntry] = []
        for request in ready:
            start = request.planned_tokens
            request.planned_tokens = start + 1
            request.steps_in_flight += 1
            entries.append(StepEntry(request, start, start + 1, samples=1))
        return entries

    def _grow_each(self, requests: list[Request]) -> bool:
        """Give each of these one more page, if there are pages for all of them."""
        pages = self._pages.take(len(requests))
        if pages is not None:
            self._seats.grow_each(requests, pages)
        return pages is not None

    def _cover(self, request: Request) -> bool:
        """Make sure that the request has a page for its next token; False if it has to sit this step out."""
        # Covering an elder one may just have told this one to give way.
        if request in self._yielding or request.state is not RequestState.RUNNING:
            return False
        while request.planned_tokens >= len(request.pages) * self._page_size:
            pages = self._pages.take(1)
            if pages is not None:
                self._seats.grow(request, pages)
                continue
            victim = self.running[-1]
            if victim in self._yielding:
                return False  # somebody is about to make room
            if victim is request and len(self.running) == 1:
                return False  # what is taken is being received or in quarantine, and comes free without a victim
            self._yielding.add(victim)
            self._swap_settled()
            if victim is request:
                return False
        return True

    def _swap_settled(self) -> None:
        """Swap out whoever gives way and has no step in flight any more."""
        for request in [r for r in self._yielding if r.steps_in_flight == 0]:
            self._yielding.discard(request)
            self.running.remove(request)
            self._swap_space.out(request)
            self._insert(self.swapped, request)

    def _bring_back(self) -> bool:
        """Seat swapped requests again, eldest first, while there is room for them; whether any came back."""
        any_back = False
        while self.swapped and not self._yielding and self._seats.num_free > 0:
            request = self.swapped[0]
            pages = self._pages.take(self._pages_for(request.computed_tokens + 1), leaving=self._headroom())
            if pages is None:
                break
            self.swapped.popleft()
            self._swap_space.back(request, pages)
            self._join(request)
            any_back = True
        return any_back

    def _headroom(self) -> int:
        """Pages to leave over whenever somebody is seated: one for each running request, or one would have to give way at once."""
        return len(self.running)

    def _join(self, request: Request) -> None:
        self._insert(self.running, request)

    def _insert(self, ordered: "list[Request] | deque[Request]", request: Request) -> None:
        insort(ordered, request, key=self._order.__getitem__)

    def _num_shared(self, siblings: Siblings) -> int:
        return siblings[0].num_prompt_tokens // self._page_size if len(siblings) > 1 else 0

    def _pages_for(self, num_tokens: int) -> int:
        return num_pages_for(num_tokens, self._page_size)
