"""The decode role: what an engine does with prompts that another worker has prefilled.

It offers pages, waits for the KV and the first token, generates the rest, and answers each sample with all its tokens and with
the rows `[P, P+G-1)`. Runs in the engine's thread. Neighbours: `decode_worker.scheduler` (what runs next), `transfer.receiver`
(where the KV comes from), `common.engine.loop` (which calls `plan` and `on_settled`).
"""

from collections.abc import Callable
from typing import assert_never

from common.engine.collector import RowCollector
from common.engine.engine import Engine
from common.engine.loop import Reply, RoleMessage
from common.engine.reports import TransferCounters, make_stats
from common.engine.step import Sampled, StepResult
from common.errors import LegFailed, RequestError, RequestFailed
from common.memory.layout import num_pages_for
from common.messages import (
    Abort,
    Bootstrap,
    CacheFlushed,
    ErrorReport,
    Failed,
    FinishNow,
    FlushCache,
    Generate,
    Stats,
    StopAt,
)
from common.scheduling.request import Request, RequestState
from common.scheduling.step_plan import StepPlan
from common.wire import address
from decode_worker.generation import Generation
from decode_worker.scheduler import DecodeScheduler, Siblings
from decode_worker.swap import SwapSpace
from transfer.commands import CancelKv, KvArrived, KvLost, PagesQuiet, ReceiveKv, ReceiverMailbox, ReserveKv
from transfer.handshake import prompt_digest
from transfer.messages import RoomCode


class DecodeWorker:
    """One engine's generations, from the frontend's `Generate` to the last page given back."""

    def __init__(
        self,
        engine: Engine,
        mailbox: ReceiverMailbox,
        transfer: TransferCounters,
        reply: Reply,
        *,
        verify_rows: bool,
        wake: Callable[[], None] | None = None,
    ) -> None:
        self._engine = engine
        self._seats = engine.seats
        self._swap_space = SwapSpace(engine)
        self._scheduler = DecodeScheduler(
            engine.allocator, engine.seats, self._swap_space, page_size=engine.capacity.page_size
        )
        self._collector = RowCollector(engine, verified=verify_rows, wake=wake)
        self._mailbox = mailbox
        self._transfer = transfer
        self._reply = reply
        self._generation = Generation(
            engine, self._scheduler, self._swap_space, self._collector, reply, self, leg="decode"
        )
        self._rooms: dict[int, Request] = {}
        self._newcomers: list[Siblings] = []
        """Those that have not been told yet whether there is a seat for them."""
        self._arrived: dict[Request, KvArrived] = {}
        """Samples whose own KV is here, while that of the pages they share is not."""
        self._leaders: dict[Request, Request] = {}
        """For each sample that shares pages, the one whose room brings them, until they are here."""

    # -------------------------------------------------------------------------------------------- messages

    def handle(self, message: RoleMessage) -> None:
        """Take a request in, or end one."""
        match message:
            case Generate():
                self._start(message)
            case Abort():
                self._generation.abort(message.rid)
            case FinishNow():
                self._generation.finish_now(message.rid, message.cause)
            case StopAt():
                self._generation.stop_at(message)
            case FlushCache():
                num_open = self._generation.num_open
                refusal = f"{num_open} requests are running" if num_open else None
                self._reply(CacheFlushed(message.serial, refusal))
            case _:
                assert_never(message)

    def _start(self, message: Generate) -> None:
        siblings = tuple(Request.of(message, index) for index in range(message.options.sampling.n))
        if refusal := self._refusal(message, siblings):
            self._reply(Failed(message.rid, ErrorReport.of(refusal, leg="decode", rid=message.rid)))
            return
        for request, room in zip(siblings, siblings[0].rooms, strict=False):
            self._rooms[room] = request
        self._generation.open(siblings)
        self._scheduler.add(siblings)
        self._newcomers.append(siblings)

    def _refusal(self, message: Generate, siblings: Siblings) -> RequestError | None:
        for room in siblings[0].rooms:
            if room in self._rooms:
                return RequestError("bootstrap_room", f"room {room} is in use by another request")
        capacity, num_pages = self._engine.capacity, self._scheduler.pages_to_admit(siblings)
        if num_pages > capacity.num_pages or len(siblings) > capacity.max_running_requests:
            self._cancel_rooms(siblings)
            return RequestError("sampling_params.n", f"{len(siblings)} samples of this prompt do not fit this worker")
        return None

    # -------------------------------------------------------------------------------------------- other threads

    def poll(self) -> None:
        """Take what other threads have done: KV that is here or will not come, pages that are safe, rows gathered."""
        for event in self._mailbox.events():
            request = self._rooms[event.room]
            match event:
                case KvArrived():
                    self._on_arrived(request, event)
                case KvLost():
                    self._generation.fail(request, event.error)
                case PagesQuiet():
                    del self._rooms[event.room]
                    self._generation.let_go(request)
                case _:
                    assert_never(event)
        self._collector.poll()

    def _on_arrived(self, request: Request, event: KvArrived) -> None:
        del self._rooms[event.room]
        if request.state is RequestState.QUARANTINED:
            self._generation.let_go(request)  # given up while the last words crossed
            return
        self._arrived[request] = event
        followers = [follower for follower, leader in self._leaders.items() if leader is request]
        for follower in followers:
            del self._leaders[follower]
        for sample in (*followers, request):  # one that fails ends the others
            self._begin(sample)

    def _begin(self, request: Request) -> None:
        """Let a sample run, once its own KV and that of the pages it shares are here."""
        if request in self._leaders or request not in self._arrived:
            return
        event = self._arrived.pop(request)
        first = event.first_token
        if not 0 <= first.token_id < self._engine.config.vocab_size:
            error = LegFailed(
                f"the prefill worker has handed over token {first.token_id}", leg="prefill", stage="transfer"
            )
            self._generation.fail(request, ErrorReport.of(error, rid=request.rid))
            return
        request.prompt_versions = event.prompt_versions
        version = self._engine.weight_version
        is_named = event.prompt_versions or request.message.options.allow_mixed_versions
        if not (is_named and request.may_go_on_under(version)):
            self._generation.fail_mixed(request, version)
            return
        request.timings |= {
            "pd_decode_wait_duration": event.wait_seconds,
            "pd_transfer_duration": event.write_seconds,
            "pd_transfer_exposed_duration": event.exposed_seconds,
            "pd_transfer_total_mb": event.num_bytes / 1e6,
        }
        if event.write_seconds > 0:
            request.timings["pd_transfer_speed_gb_s"] = event.num_bytes / 1e9 / event.write_seconds
        self._scheduler.start(request, computed_tokens=request.num_prompt_tokens)
        self._generation.take_token(request, Sampled(first.token_id, first.logprob, first.top_logprobs))

    def _fetch(self, siblings: Siblings) -> None:
        bootstrap = siblings[0].message.bootstrap
        if bootstrap is None:
            # The frontend's health check: one token, computed here as any generated one is.
            assert siblings[0].num_prompt_tokens == 1, "only a prefill worker computes prompts"
            self._scheduler.start(siblings[0], computed_tokens=0)
            return
        num_prompt_pages = num_pages_for(siblings[0].num_prompt_tokens, self._engine.capacity.page_size)
        digest = prompt_digest(siblings[0].prompt)
        for request, room in zip(siblings, bootstrap.rooms, strict=True):
            first_page = self._scheduler.num_shared_pages(request)
            if first_page > 0:
                self._leaders[request] = siblings[0]
            self._mailbox.submit(
                ReceiveKv(
                    room=room,
                    source=_source_of(bootstrap),
                    first_room=bootstrap.room,
                    first_page=first_page,
                    pages=request.pages[first_page:num_prompt_pages],
                    prompt_tokens=request.num_prompt_tokens,
                    prompt_digest=digest,
                )
            )

    # -------------------------------------------------------------------------------------------- steps

    def plan(self) -> StepPlan | None:
        """Fetch the KV of whoever can be seated, then plan a step for those that run."""
        for siblings in self._scheduler.admit():
            self._fetch(siblings)
        self.rest()
        return self._scheduler.plan()

    def rest(self) -> None:
        """Have the KV of newcomers without a seat kept for them."""
        for siblings in self._newcomers:
            self._reserve(siblings)
        self._newcomers.clear()

    def _reserve(self, siblings: Siblings) -> None:
        """Have the prompt's KV kept for samples that wait for a seat."""
        for request in siblings:
            bootstrap = request.message.bootstrap
            if bootstrap is not None and request.state is RequestState.QUEUED:
                room = bootstrap.rooms[request.index]
                self._mailbox.submit(ReserveKv(room, _source_of(bootstrap), bootstrap.room))

    def on_settled(self, result: StepResult) -> None:
        """Take each request's token; one that had ended before the step was known to be surplus loses it."""
        for entry, outcome in zip(result.plan.entries, result.outcomes, strict=True):
            request = entry.request
            request.steps_in_flight -= 1
            if request.state is not RequestState.RUNNING:
                self._generation.let_go(request)
                continue
            request.settle(entry.start, entry.stop, result.weight_version)
            [sampled] = outcome.sampled
            self._generation.take_token(request, sampled)

    def on_failed(self, plan: StepPlan, error: RequestFailed) -> None:
        """Fail the samples that the step was for."""
        self._generation.fail_step(plan, error)

    def on_weights_changed(self) -> None:
        """Fail the samples that other weights have begun and that may not go on; there is no prefix cache here."""
        self._generation.fail_versions(self._engine.weight_version)

    def on_kv_lost(self) -> None:
        """Nothing is kept between requests."""

    # -------------------------------------------------------------------------------------------- endings

    def forget(self, request: Request, *, is_retracted: bool) -> None:
        """Stop waiting for its KV."""
        self._arrived.pop(request, None)
        self._leaders.pop(request, None)
        if request.state in (RequestState.QUEUED, RequestState.RECEIVING):
            self._cancel_rooms((request,), "retracted" if is_retracted else "leg_failed")

    def _cancel_rooms(self, samples: Siblings, code: RoomCode = "leg_failed") -> None:
        """Let the prefill worker know that nobody waits for these samples' KV any more."""
        for request in samples:
            bootstrap = request.message.bootstrap
            if bootstrap is not None:
                room = bootstrap.rooms[request.index]
                self._mailbox.submit(CancelKv(room, _source_of(bootstrap), bootstrap.room, code))

    def is_quiet(self, request: Request) -> bool:
        """Whether no peer writes into its pages any more; while one may, the sample is in quarantine."""
        for room in request.rooms[request.index : request.index + 1]:
            if self._rooms.get(room) is request and request.state is not RequestState.QUEUED:
                if request.state is not RequestState.QUARANTINED:
                    request.advance(RequestState.QUARANTINED)
                return False
            self._rooms.pop(room, None)
        return True

    # -------------------------------------------------------------------------------------------- statistics

    @property
    def is_needed(self) -> bool:
        """No other worker waits for anything of this one."""
        return False

    @property
    def is_idle(self) -> bool:
        """Whether no sample is open, and no page in quarantine."""
        return not (self._generation.num_open or self._rooms or self._seats.holders)

    def stats(self, serial: int) -> Stats:
        """Recount the pages and report the counters."""
        return make_stats(
            self._engine,
            self._transfer,
            serial=serial,
            queued_requests=sum(map(len, self._scheduler.waiting)),
            running_requests=len(self._scheduler.running) + len(self._scheduler.swapped),
            rows_refused=self._collector.num_refused,
            swaps=self._swap_space.num_swaps,
        )


def _source_of(bootstrap: Bootstrap) -> str:
    """The address of the prefill worker's control socket."""
    return address(bootstrap.host, bootstrap.port)
