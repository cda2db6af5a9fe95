"""The prefill role: what an engine does with prompts. It computes them, hands their KV over, and answers with their rows.

Rows `[s, P)` and the first token leave as soon as the last chunk has settled; the pages stay until their transfer has ended.
Runs in the engine's thread. Neighbours: `prefill_worker.scheduler` (what runs next), `transfer.sender` (the pages' way to the
decode worker), `common.engine.loop` (which calls `plan` and `on_settled`).
"""

from typing import assert_never

from common.engine.engine import Engine
from common.engine.loop import Reply
from common.engine.reports import TransferCounters, make_stats
from common.engine.step import Outcome, StepResult
from common.errors import LegFailed, RequestError, RowsError
from common.memory.prefix_cache import PrefixCache
from common.messages import (
    Abort,
    ErrorReport,
    Failed,
    Finished,
    FinishReason,
    FirstToken,
    Generate,
    RowBlock,
    Stats,
)
from common.scheduling.request import Request, RequestState
from common.scheduling.step_plan import StepEntry, StepPlan
from prefill_worker.config import PrefillOptions
from prefill_worker.scheduler import PrefillScheduler
from transfer.handshake import prompt_digest
from transfer.plan import complete_pages
from transfer.sender import CancelRoom, FinishRoom, OpenRoom, PagesReady, RoomClosed, SenderMailbox


class PrefillWorker:
    """One engine's prompts, from the frontend's `Generate` to the last page given back."""

    @classmethod
    def on(
        cls,
        engine: Engine,
        options: PrefillOptions,
        mailbox: SenderMailbox,
        transfer: TransferCounters,
        reply: Reply,
        *,
        verify_rows: bool,
    ) -> "PrefillWorker":
        """Compose the role on an engine: its scheduler and, if wanted, its prefix cache."""
        page_size = engine.capacity.page_size
        cache = PrefixCache(engine.allocator, page_size) if options.prefix_cache else None
        scheduler = PrefillScheduler(
            engine.allocator, engine.seats, cache, page_size=page_size, chunk_tokens=options.chunked_prefill_tokens
        )
        return cls(engine, scheduler, mailbox, transfer, reply, verify_rows=verify_rows)

    def __init__(
        self,
        engine: Engine,
        scheduler: PrefillScheduler,
        mailbox: SenderMailbox,
        transfer: TransferCounters,
        reply: Reply,
        *,
        verify_rows: bool,
    ) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._seats = engine.seats
        self._mailbox = mailbox
        self._transfer = transfer
        self._reply = reply
        self._verify_rows = verify_rows
        self._requests: dict[str, Request] = {}
        self._rooms: dict[int, Request] = {}
        self._num_tokens_cached = 0
        self._num_rows_refused = 0

    # -------------------------------------------------------------------------------------------- messages

    def handle(self, message: Generate | Abort) -> None:
        """Take a request in, or give one up."""
        match message:
            case Generate():
                self._start(message)
            case Abort():
                request = self._requests.get(message.rid)
                if request is not None:
                    self._give_up(request, "the prefill leg was cancelled")
            case _:
                assert_never(message)

    def _start(self, message: Generate) -> None:
        request = Request.of(message)
        if message.bootstrap is not None:
            room = message.bootstrap.room
            if room in self._rooms:
                error = RequestError("bootstrap_room", f"room {room} is in use by another request")
                self._reply(Failed(message.rid, ErrorReport.of(error, leg="prefill", rid=message.rid)))
                return
            self._rooms[room] = request
            self._mailbox.submit(OpenRoom(room, request.num_prompt_tokens, prompt_digest(request.prompt)))
        self._requests[message.rid] = request
        self._scheduler.add(request)

    def on_transfer_events(self) -> None:
        """Take what the transfer has to say: rooms that have closed."""
        for event in self._mailbox.events():
            self._on_room_closed(event)

    def _on_room_closed(self, event: RoomClosed) -> None:
        request = self._rooms.pop(event.room)
        if request.rid in self._requests and request.state in (RequestState.QUEUED, RequestState.RUNNING):
            error = LegFailed(event.error or "the room closed early", leg="prefill", stage="transfer")
            self._fail(request, error)
        elif request.state is RequestState.LEASED:
            self._let_go(request)

    # -------------------------------------------------------------------------------------------- steps

    def plan(self) -> StepPlan | None:
        """Ask the scheduler."""
        return self._scheduler.plan()

    def on_settled(self, result: StepResult) -> None:
        """Hand over the pages that the step has completed, and answer the prompts that it has ended."""
        for entry, outcome in zip(result.plan.entries, result.outcomes, strict=True):
            request = entry.request
            request.steps_in_flight -= 1
            if request.state is RequestState.SURPLUS:
                self._let_go(request)
                continue
            request.computed_tokens = entry.stop
            self._report_pages(entry)
            if entry.stop == request.num_prompt_tokens:
                self._finish(request, outcome)

    def _report_pages(self, entry: StepEntry) -> None:
        request = entry.request
        if request.message.bootstrap is None:
            return
        page_size = self._engine.capacity.page_size
        # The first chunk brings the cached prefix along.
        is_first = entry.start == request.cached_tokens
        begin = 0 if is_first else complete_pages(entry.start, request.num_prompt_tokens, page_size)
        end = complete_pages(entry.stop, request.num_prompt_tokens, page_size)
        if begin < end:
            self._mailbox.submit(PagesReady(request.message.bootstrap.room, request.pages[begin:end]))

    def _finish(self, request: Request, outcome: Outcome) -> None:
        try:
            rows = self._collect(request)
        except RowsError as error:
            self._num_rows_refused += 1
            self._fail(request, error)
            return
        if self._scheduler.prefix_cache is not None:
            self._scheduler.prefix_cache.insert(request.prompt, request.pages)
        self._num_tokens_cached += request.cached_tokens
        tokens = [] if outcome.token_id is None else [outcome.token_id]
        finished = Finished(
            rid=request.rid,
            prompt_tokens=request.num_prompt_tokens,
            cached_tokens=request.cached_tokens,
            token_ids=tokens,
            logprobs=[outcome.logprob] * len(tokens),
            finish_reason=FinishReason(type="length", length=len(tokens)),
            rows=None if rows is None else rows.header,
        )
        self._reply(finished, *(() if rows is None else (rows.data,)))
        if request.message.bootstrap is not None and outcome.token_id is not None:
            first_token = FirstToken(token_id=outcome.token_id, logprob=outcome.logprob)
            self._mailbox.submit(FinishRoom(request.message.bootstrap.room, first_token))
        self._leave(request)

    def _collect(self, request: Request) -> RowBlock | None:
        options = request.message.options
        if not options.return_routed_experts:
            return None
        # A prompt that is only scored yields P - 1 rows: its last token would be the input of a step that never comes.
        stop = request.num_prompt_tokens - (options.sampling.max_new_tokens == 0)
        start = options.routed_experts_start_len
        return self._engine.collect_rows(request, start, max(start, stop), verified=self._verify_rows)

    # -------------------------------------------------------------------------------------------- endings

    def _fail(self, request: Request, error: Exception) -> None:
        self._reply(Failed(request.rid, ErrorReport.of(error, leg="prefill", stage="prefill", rid=request.rid)))
        self._give_up(request, str(error))

    def _give_up(self, request: Request, reason: str) -> None:
        """End a request without an answer of its own; the transfer is told to stop."""
        bootstrap = request.message.bootstrap
        if bootstrap is not None and bootstrap.room in self._rooms:
            self._mailbox.submit(CancelRoom(bootstrap.room, reason))
        self._leave(request)

    def _leave(self, request: Request) -> None:
        """The request has been answered, or nobody waits for an answer; it keeps only what is still in use."""
        del self._requests[request.rid]
        self._scheduler.remove(request)
        self._let_go(request)

    def _let_go(self, request: Request) -> None:
        """Give back what nothing touches any more: the row after the last step, the pages after the transfer too."""
        if request.steps_in_flight > 0:
            if request.state is not RequestState.SURPLUS:
                request.advance(RequestState.SURPLUS)
            return
        self._seats.give_back_row(request)
        bootstrap = request.message.bootstrap
        if bootstrap is not None and bootstrap.room in self._rooms and request.pages:
            if request.state is not RequestState.LEASED:
                request.advance(RequestState.LEASED)
            return
        self._seats.give_back_pages(request)
        request.advance(RequestState.ENDED)

    # -------------------------------------------------------------------------------------------- statistics

    def stats(self, serial: int) -> Stats:
        """Recount the pages and report the counters."""
        cache = self._scheduler.prefix_cache
        return make_stats(
            self._engine,
            self._transfer,
            serial=serial,
            queued_requests=len(self._scheduler.waiting),
            running_requests=len(self._scheduler.running),
            cached_pages=() if cache is None else cache.pages(),
            tokens_cached=self._num_tokens_cached,
            rows_refused=self._num_rows_refused,
        )
