"""The decode role: what an engine does with prompts that another worker has prefilled.

It offers pages, waits for the KV and the first token, generates the rest, and answers with all tokens and with the rows
`[P, P+G-1)`. Runs in the engine's thread. Neighbours: `decode_worker.scheduler` (what runs next), `transfer.receiver` (where
the KV comes from), `common.engine.loop` (which calls `plan` and `on_settled`).
"""

from typing import assert_never

from common.engine.engine import Engine
from common.engine.loop import Reply
from common.engine.reports import TransferCounters, make_stats
from common.engine.step import StepResult
from common.errors import RequestError, RowsError
from common.messages import (
    Abort,
    Bootstrap,
    ErrorReport,
    Failed,
    Finished,
    FinishReason,
    Generate,
    RowBlock,
    Stats,
    Tokens,
)
from common.scheduling.request import Request, RequestState
from common.scheduling.step_plan import StepPlan
from common.wire import address
from decode_worker.scheduler import DecodeScheduler
from transfer.handshake import prompt_digest
from transfer.receiver import CancelKv, KvArrived, KvLost, PagesQuiet, ReceiveKv, ReceiverMailbox


class DecodeWorker:
    """One engine's generations, from the frontend's `Generate` to the last page given back."""

    @classmethod
    def on(
        cls,
        engine: Engine,
        mailbox: ReceiverMailbox,
        transfer: TransferCounters,
        reply: Reply,
        *,
        verify_rows: bool,
    ) -> "DecodeWorker":
        """Compose the role on an engine."""
        scheduler = DecodeScheduler(engine.allocator, engine.seats, page_size=engine.capacity.page_size)
        return cls(engine, scheduler, mailbox, transfer, reply, verify_rows=verify_rows)

    def __init__(
        self,
        engine: Engine,
        scheduler: DecodeScheduler,
        mailbox: ReceiverMailbox,
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
        self._eos_token_ids = frozenset(engine.config.eos_token_ids)
        self._requests: dict[str, Request] = {}
        self._rooms: dict[int, Request] = {}
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
                    self._leave(request)
            case _:
                assert_never(message)

    def _start(self, message: Generate) -> None:
        request = Request.of(message)
        if message.bootstrap is not None:
            room = message.bootstrap.room
            if room in self._rooms:
                error = RequestError("bootstrap_room", f"room {room} is in use by another request")
                self._reply(Failed(message.rid, ErrorReport.of(error, leg="decode", rid=message.rid)))
                return
            self._rooms[room] = request
        self._requests[message.rid] = request
        self._scheduler.add(request)

    # -------------------------------------------------------------------------------------------- transfer

    def on_transfer_events(self) -> None:
        """Take what the transfer has to say: KV that is here or will not come, pages that are safe again."""
        for event in self._mailbox.events():
            request = self._rooms[event.room]
            match event:
                case KvArrived():
                    self._on_arrived(request, event)
                case KvLost():
                    self._fail(request, event.error)
                case PagesQuiet():
                    self._let_go(request, quiet=True)
                case _:
                    assert_never(event)

    def _on_arrived(self, request: Request, event: KvArrived) -> None:
        if request.state is RequestState.QUARANTINED:
            self._let_go(request, quiet=True)  # given up while the last words crossed
            return
        request.timings["pd_transfer_duration"] = event.seconds
        request.timings["pd_transfer_total_mb"] = event.num_bytes / 1e6
        self._scheduler.start(request, computed_tokens=request.num_prompt_tokens)
        self._take_token(request, event.first_token.token_id, event.first_token.logprob)

    def _fetch(self, request: Request) -> None:
        bootstrap = request.message.bootstrap
        if bootstrap is None:
            # The frontend's health check: one token, computed here as any generated one is.
            assert request.num_prompt_tokens == 1, "only a prefill worker computes prompts"
            self._scheduler.start(request, computed_tokens=0)
            return
        num_prompt_pages = -(-request.num_prompt_tokens // self._engine.capacity.page_size)
        self._mailbox.submit(
            ReceiveKv(
                room=bootstrap.room,
                source=_source_of(bootstrap),
                pages=request.pages[:num_prompt_pages],
                prompt_tokens=request.num_prompt_tokens,
                prompt_digest=prompt_digest(request.prompt),
            )
        )

    # -------------------------------------------------------------------------------------------- steps

    def plan(self) -> StepPlan | None:
        """Fetch the KV of whoever can be seated, then plan a step for those that run."""
        for request in self._scheduler.admit():
            self._fetch(request)
        return self._scheduler.plan()

    def on_settled(self, result: StepResult) -> None:
        """Take each request's token; one that had ended before the step was known to be surplus loses it."""
        for entry, outcome in zip(result.plan.entries, result.outcomes, strict=True):
            request = entry.request
            request.steps_in_flight -= 1
            if request.state is RequestState.SURPLUS:
                self._let_go(request, quiet=True)
                continue
            request.computed_tokens = entry.stop
            assert outcome.token_id is not None
            self._take_token(request, outcome.token_id, outcome.logprob)

    def _take_token(self, request: Request, token_id: int, logprob: float) -> None:
        options = request.message.options
        request.output_ids.append(token_id)
        request.logprobs.append(logprob)
        if options.stream:
            self._reply(Tokens(request.rid, [token_id], [logprob]))
        reason = self._finish_reason(request, token_id)
        if reason is not None:
            self._finish(request, reason)

    def _finish_reason(self, request: Request, token_id: int) -> FinishReason | None:
        sampling = request.message.options.sampling
        if token_id in sampling.stop_token_ids or (token_id in self._eos_token_ids and not sampling.ignore_eos):
            return FinishReason(type="stop", matched=token_id)
        if len(request.output_ids) == sampling.max_new_tokens:
            return FinishReason(type="length", length=len(request.output_ids))
        return None

    # -------------------------------------------------------------------------------------------- endings

    def _finish(self, request: Request, reason: FinishReason) -> None:
        try:
            rows = self._collect(request)
        except RowsError as error:
            self._num_rows_refused += 1
            self._fail(request, ErrorReport.of(error, leg="decode", stage="decode", rid=request.rid))
            return
        finished = Finished(
            rid=request.rid,
            prompt_tokens=request.num_prompt_tokens,
            cached_tokens=0,
            token_ids=request.output_ids,
            logprobs=request.logprobs,
            finish_reason=reason,
            rows=None if rows is None else rows.header,
            timings=request.timings,
        )
        self._reply(finished, *(() if rows is None else (rows.data,)))
        self._leave(request)

    def _collect(self, request: Request) -> RowBlock | None:
        if not request.message.options.return_routed_experts:
            return None
        start = request.num_prompt_tokens
        stop = start + len(request.output_ids) - 1
        return self._engine.collect_rows(request, start, stop, verified=self._verify_rows)

    def _fail(self, request: Request, error: ErrorReport) -> None:
        self._reply(Failed(request.rid, error))
        self._leave(request)

    def _leave(self, request: Request) -> None:
        """The request has been answered, or nobody waits for an answer; it keeps only what is still in use."""
        del self._requests[request.rid]
        self._scheduler.remove(request)
        bootstrap = request.message.bootstrap
        if bootstrap is not None and request.state in (RequestState.QUEUED, RequestState.RECEIVING):
            self._mailbox.submit(CancelKv(bootstrap.room, _source_of(bootstrap)))
        self._let_go(request, quiet=request.state is not RequestState.RECEIVING)

    def _let_go(self, request: Request, *, quiet: bool) -> None:
        """Give back what nothing touches any more; `quiet` says that no peer writes into the pages."""
        bootstrap = request.message.bootstrap
        if request.steps_in_flight > 0:
            if request.state is not RequestState.SURPLUS:
                request.advance(RequestState.SURPLUS)
            return
        self._seats.give_back_row(request)
        if not quiet:
            request.advance(RequestState.QUARANTINED)
            return
        self._seats.give_back_pages(request)
        request.advance(RequestState.ENDED)
        if bootstrap is not None:
            del self._rooms[bootstrap.room]

    # -------------------------------------------------------------------------------------------- statistics

    def stats(self, serial: int) -> Stats:
        """Recount the pages and report the counters."""
        return make_stats(
            self._engine,
            self._transfer,
            serial=serial,
            queued_requests=len(self._scheduler.waiting),
            running_requests=len(self._scheduler.running),
            rows_refused=self._num_rows_refused,
        )


def _source_of(bootstrap: Bootstrap) -> str:
    """The address of the prefill worker's control socket."""
    return address(bootstrap.host, bootstrap.port)
