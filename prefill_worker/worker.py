"""The prefill role: what an engine does with prompts. It computes them, hands their KV over, and answers with their rows.

Rows `[s, P)` and the first token of each sample leave as soon as the last chunk has settled; the pages stay until their transfer
has ended. Runs in the engine's thread. Neighbours: `prefill_worker.scheduler` (what runs next), `transfer.sender` (the pages'
way to the decode worker), `common.engine.loop` (which calls `plan` and `on_settled`).
"""

import time
from collections.abc import Callable
from typing import assert_never

from common.engine.collector import RowCollector, Rows
from common.engine.engine import Engine
from common.engine.loop import Reply, RoleMessage
from common.engine.reports import TransferCounters, make_stats
from common.engine.step import Sampled, StepResult
from common.errors import LegFailed, MixedVersions, RequestError, RequestFailed, Retracted, RowsError
from common.memory.prefix_cache import PrefixCache
from common.messages import (
    Abort,
    EndCause,
    ErrorReport,
    Failed,
    Finished,
    FinishNow,
    FinishReason,
    FlushCache,
    Generate,
    ReportedError,
    Stats,
    StopAt,
)
from common.scheduling.request import Request, RequestState
from common.scheduling.step_plan import StepEntry, StepPlan
from common.versions import names
from prefill_worker.config import PrefillOptions
from prefill_worker.flushes import Flushes
from prefill_worker.scheduler import PrefillScheduler
from transfer.commands import CancelRoom, FinishRoom, OpenRoom, PagesReady, RoomClosed, SenderMailbox
from transfer.handshake import prompt_digest
from transfer.messages import FirstToken
from transfer.plan import complete_pages


class PrefillWorker:
    """One engine's prompts, from the frontend's `Generate` to the last page given back."""

    def __init__(
        self,
        engine: Engine,
        options: PrefillOptions,
        mailbox: SenderMailbox,
        transfer: TransferCounters,
        reply: Reply,
        *,
        verify_rows: bool,
        wake: Callable[[], None] | None = None,
    ) -> None:
        page_size = engine.capacity.page_size
        self._engine = engine
        self._seats = engine.seats
        self._cache = PrefixCache(engine.allocator, page_size) if options.prefix_cache else None
        self._scheduler = PrefillScheduler(
            engine.allocator,
            engine.seats,
            self._cache,
            page_size=page_size,
            chunk_tokens=options.chunked_prefill_tokens,
        )
        self._collector = RowCollector(engine, verified=verify_rows, wake=wake)
        self._mailbox = mailbox
        self._transfer = transfer
        self._reply = reply
        self._requests: dict[str, Request] = {}
        self._rooms: dict[int, Request] = {}
        self._flushes = Flushes(self._cache, engine.seats, reply)
        self._num_tokens_cached = 0

    # -------------------------------------------------------------------------------------------- messages

    def handle(self, message: RoleMessage) -> None:
        """Take a request in, end one, or flush the prefix cache."""
        match message:
            case Generate():
                self._start(message)
            case Abort():
                request = self._requests.get(message.rid)
                if request is not None:
                    self._give_up(request, "the prefill leg was cancelled")
            case FinishNow():
                request = self._requests.get(message.rid)
                if request is not None and request.state is not RequestState.COLLECTING:
                    self._finish_early(request, message.cause)
            case FlushCache():
                self._flushes.ask(message.serial, len(self._requests))
            case StopAt():
                pass  # stop strings are the decode leg's to find
            case _:
                assert_never(message)

    def _start(self, message: Generate) -> None:
        request = Request.of(message)
        for room in request.rooms:
            if room in self._rooms:
                error = RequestError("bootstrap_room", f"room {room} is in use by another request")
                self._reply(Failed(message.rid, ErrorReport.of(error, leg="prefill", rid=message.rid)))
                return
        digest = prompt_digest(request.prompt)
        for room in request.rooms:
            self._rooms[room] = request
            self._mailbox.submit(OpenRoom(room, request.num_prompt_tokens, digest))
        self._requests[message.rid] = request
        self._scheduler.add(request)

    # -------------------------------------------------------------------------------------------- other threads

    def poll(self) -> None:
        """Take what other threads have done: rooms that have closed, rows that have been gathered."""
        for event in self._mailbox.events():
            self._on_room_closed(event)
        self._collector.poll()

    def _on_room_closed(self, event: RoomClosed) -> None:
        request = self._rooms.pop(event.room)
        if request.state in (RequestState.QUEUED, RequestState.RUNNING):
            failure = Retracted if event.code == Retracted.code else LegFailed
            self._fail(request, failure(event.error or "the room closed early", leg=event.leg, stage="transfer"))
        elif request.state is RequestState.LEASED:
            self._let_go(request)

    # -------------------------------------------------------------------------------------------- steps

    def plan(self) -> StepPlan | None:
        """Ask the scheduler."""
        return self._scheduler.plan()

    def rest(self) -> None:
        """Nobody waits for anything that a prompt without a step could do."""

    def on_settled(self, result: StepResult) -> None:
        """Hand over the pages that the step has completed, and answer the prompts that it has ended."""
        for entry, outcome in zip(result.plan.entries, result.outcomes, strict=True):
            request = entry.request
            request.steps_in_flight -= 1
            if request.state is not RequestState.RUNNING:
                self._let_go(request)
                continue
            request.settle(entry.start, entry.stop, result.weight_version)
            request.prompt_scores += outcome.scored.logprobs
            request.prompt_tops += outcome.scored.top_logprobs
            self._report_pages(entry)
            if entry.stop == request.num_prompt_tokens:
                self._finish(request, outcome.sampled)

    def on_failed(self, plan: StepPlan, error: RequestFailed) -> None:
        """Fail the prompts that the step was for; those that had ended before are let go of."""
        for entry in plan.entries:
            entry.request.steps_in_flight -= 1
            if entry.request.state is RequestState.RUNNING:
                self._fail(entry.request, error)
            else:
                self._let_go(entry.request)

    def on_weights_changed(self) -> None:
        """Forget what other weights have computed: the cached prompts, and those that were begun and may not go on.

        A resumed one begins again: its answer does not say what weights have computed the KV below its last token.
        """
        if self._cache is not None:
            self._cache.clear()
        version = self._engine.weight_version
        for request in list(self._scheduler.running):
            if not request.may_go_on_under(version):
                versions = (*request.message.options.resumed_versions, *request.versions, version)
                report = ErrorReport.of(MixedVersions(versions), rid=request.rid)
                self._fail(request, ReportedError(report))  # ready, so that it is no leg's
            elif request.is_resumed and not request.is_all_of(version):
                self._finish_early(request, "retracted")

    def on_kv_lost(self) -> None:
        """Forget the cached prompts."""
        if self._cache is not None:
            self._cache.clear()

    def _report_pages(self, entry: StepEntry) -> None:
        request, page_size = entry.request, self._engine.capacity.page_size
        # The first chunk brings the cached prefix along.
        is_first = entry.start == request.cached_tokens
        begin = 0 if is_first else complete_pages(entry.start, request.num_prompt_tokens, page_size)
        end = complete_pages(entry.stop, request.num_prompt_tokens, page_size)
        if begin < end:
            for room in request.rooms:
                self._mailbox.submit(PagesReady(room, request.pages[begin:end]))

    def _finish(self, request: Request, sampled: tuple[Sampled, ...]) -> None:
        """The prompt is computed: hand each sample over, keep the prompt for later ones, and gather the rows."""
        computed_at = time.perf_counter()
        request.timings["pd_prefill_forward_duration"] = computed_at - request.started_at
        versions = names(request.versions_of(0, request.num_prompt_tokens))
        for room, (token_id, logprob, top_logprobs) in zip(request.rooms, sampled, strict=False):
            first_token = FirstToken(token_id=token_id, logprob=logprob, top_logprobs=top_logprobs)
            self._mailbox.submit(FinishRoom(room, first_token, computed_at, versions))
        self._scheduler.remove(request)
        request.advance(RequestState.COLLECTING)
        if self._cache is not None and request.is_all_of(self._engine.weight_version):
            self._cache.insert(request.prompt, request.pages)
        self._num_tokens_cached += request.cached_tokens
        # A prompt that is only scored yields P - 1 rows: its last token would be the input of a step that never comes.
        stop = request.num_prompt_tokens - (not sampled)
        start = request.message.options.routed_experts_start_len
        self._collector.collect(request, start, max(start, stop), lambda rows: self._answer(request, sampled, rows))

    def _answer(self, request: Request, sampled: tuple[Sampled, ...], rows: Rows) -> None:
        if request.rid not in self._requests:
            self._let_go(request)  # given up while its rows were gathered
        elif isinstance(rows, RowsError):
            self._fail(request, rows)
        else:
            finished = Finished(
                rid=request.rid,
                prompt_tokens=request.num_prompt_tokens,
                cached_tokens=request.cached_tokens,
                token_ids=[token_id for token_id, _, _ in sampled],
                logprobs=[logprob for _, logprob, _ in sampled],
                top_logprobs=[top_logprobs for _, _, top_logprobs in sampled],
                prompt_logprobs=request.prompt_logprobs(),
                finish_reason=FinishReason(type="length", length=min(1, len(sampled))),
                rows=None if rows is None else rows.header,
                weight_versions=request.versions_of(0, request.num_prompt_tokens - (not sampled)),
                timings=request.timings,
            )
            self._reply(finished, *(() if rows is None else (rows.data,)))
            self._leave(request)

    # -------------------------------------------------------------------------------------------- endings

    def _finish_early(self, request: Request, cause: EndCause) -> None:
        """Somebody asked for the end before the prompt was done: there is no token, and no complete rows."""
        where = "while queued" if request.state is RequestState.QUEUED else "in prefill"
        reason = FinishReason.early(cause, where)
        finished = Finished(
            rid=request.rid,
            prompt_tokens=request.num_prompt_tokens,
            cached_tokens=request.cached_tokens,
            token_ids=[],
            logprobs=[],
            finish_reason=reason,
        )
        self._reply(finished)
        self._give_up(request, reason.message or "", "retracted" if reason.is_retracted else "leg_failed")

    def _fail(self, request: Request, error: Exception) -> None:
        report = ErrorReport.of(error, leg="prefill", stage="prefill", rid=request.rid)
        self._reply(Failed(request.rid, report))
        self._give_up(request, report.message, report.code)

    def _give_up(self, request: Request, reason: str, code: str = "leg_failed") -> None:
        """End a request without an answer of its own; the transfer is told to stop, and the decode side why."""
        for room in request.rooms:
            if room in self._rooms:
                self._mailbox.submit(CancelRoom(room, reason, code))
        self._leave(request)

    def _leave(self, request: Request) -> None:
        """The request has been answered, or nobody waits for an answer; it keeps only what is still in use."""
        del self._requests[request.rid]
        self._scheduler.remove(request)
        self._let_go(request)

    def _let_go(self, request: Request) -> None:
        """Give back what nothing touches any more: the row after the last step, the pages after rows and transfer too."""
        if self._collector.holds(request):
            return
        if request.steps_in_flight > 0:
            if request.state is not RequestState.SURPLUS:
                request.advance(RequestState.SURPLUS)
            return
        self._seats.give_back_row(request)
        if request.pages and any(room in self._rooms for room in request.rooms):
            if request.state is not RequestState.LEASED:
                request.advance(RequestState.LEASED)
            return
        self._seats.give_back_pages(request)
        request.advance(RequestState.ENDED)
        self._flushes.finish()

    # -------------------------------------------------------------------------------------------- statistics

    @property
    def is_needed(self) -> bool:
        """Whether a decode worker still waits for a prompt's KV."""
        return bool(self._rooms)

    @property
    def is_idle(self) -> bool:
        """Whether no prompt is open, and no transfer."""
        return not (self._requests or self._rooms or self._seats.holders)

    def stats(self, serial: int) -> Stats:
        """Recount the pages and report the counters."""
        return make_stats(
            self._engine,
            self._transfer,
            serial=serial,
            queued_requests=len(self._scheduler.waiting),
            running_requests=len(self._scheduler.running),
            cached_pages=() if self._cache is None else self._cache.pages(),
            tokens_cached=self._num_tokens_cached,
            rows_refused=self._collector.num_refused,
        )
