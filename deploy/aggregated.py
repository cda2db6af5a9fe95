"""The aggregated role: one engine that computes prompts and generates too, over one KV pool. Nothing is transferred.

It is put together from the two roles' own parts. Every sample is the decode role's, which seats it, grows it, swaps it and
answers it; the first sample of a prompt has its chunks planned by the prefill role's scheduler, on the pages that it holds
already. Where a decode worker waits for the KV to arrive (RECEIVING), this one waits for those chunks to settle:

    prompt   QUEUED -> RECEIVING (chunks) -> RUNNING (tokens) -> COLLECTING -> ENDED
    others   QUEUED -> RECEIVING -----------> RUNNING, on the prompt's full pages and a copy of its last, partial one

A step holds chunks or tokens, never both, and chunks go first: a prompt needs a seat, so there are only so many before tokens
must come. Prompts that leave their seats at once, with no token to generate, could go on for ever; so after
`MAX_CHUNK_STEPS` steps of chunks in a row there is one of tokens.

Runs in the engine's thread. Neighbours: `prefill_worker.scheduler`, `decode_worker.scheduler`, `decode_worker.generation`,
`common.engine.loop` (which calls `plan` and `on_settled`), `deploy.aggregated_engine` (the process around this).
"""

import time
from collections.abc import Callable
from typing import Final, assert_never

from common.engine.background import NoBackground
from common.engine.collector import RowCollector
from common.engine.engine import Engine
from common.engine.loop import Reply, RoleMessage
from common.engine.reports import make_stats
from common.engine.step import Outcome, Sampled, StepResult
from common.errors import RequestError, RequestFailed
from common.memory.layout import slots_of
from common.memory.prefix_cache import PrefixCache
from common.messages import (
    Abort,
    ErrorReport,
    Failed,
    FinishNow,
    FinishReason,
    FlushCache,
    Generate,
    Stats,
    StopAt,
)
from common.scheduling.request import Request, RequestState
from common.scheduling.step_plan import StepEntry, StepPlan
from decode_worker.generation import Generation
from decode_worker.scheduler import DecodeScheduler, Siblings
from decode_worker.swap import SwapSpace
from prefill_worker.flushes import Flushes
from prefill_worker.scheduler import PrefillScheduler

MAX_CHUNK_STEPS: Final = 8
"""Steps of prompt chunks in a row while somebody waits for a token."""


class NoTransfer(NoBackground):
    """What a transfer is where there is none: nothing to count and nothing to run."""

    num_rooms = 0
    num_writes = 0
    num_bytes = 0
    num_dropped = 0


class AggregatedWorker:
    """One engine's requests, from `Generate` to the last page given back."""

    def __init__(
        self,
        engine: Engine,
        *,
        chunked_prefill_tokens: int,
        prefix_cache: bool,
        reply: Reply,
        verify_rows: bool,
        wake: Callable[[], None] | None = None,
    ) -> None:
        page_size = engine.capacity.page_size
        self._engine = engine
        self._seats = engine.seats
        self._cache = PrefixCache(engine.allocator, page_size) if prefix_cache else None
        self._swap_space = SwapSpace(engine)
        self._decode = DecodeScheduler(
            engine.allocator, engine.seats, self._swap_space, page_size=page_size, prefix_cache=self._cache
        )
        self._prefill = PrefillScheduler(
            engine.allocator,
            engine.seats,
            self._cache,
            page_size=page_size,
            chunk_tokens=chunked_prefill_tokens,
            admit=lambda prompt: self._decode.seat(self._prompts[prompt]),
        )
        self._collector = RowCollector(engine, verified=verify_rows, wake=wake)
        self._generation = Generation(engine, self._decode, self._swap_space, self._collector, reply, self, leg=None)
        self._flushes = Flushes(self._cache, engine.seats, reply)
        self._reply = reply
        self._prompts: dict[Request, Siblings] = {}
        """For each first sample whose prompt is not computed yet, all samples of the prompt."""
        self._num_chunk_steps = 0
        self._num_tokens_cached = 0

    # -------------------------------------------------------------------------------------------- messages

    def handle(self, message: RoleMessage) -> None:
        """Take a request in, end one, or flush the prefix cache."""
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
                self._flushes.ask(message.serial, self._generation.num_open)
            case _:
                assert_never(message)

    def _start(self, message: Generate) -> None:
        siblings = tuple(Request.of(message, index) for index in range(message.options.sampling.n))
        capacity, num_pages = self._engine.capacity, self._decode.pages_to_admit(siblings)
        if num_pages > capacity.num_pages or len(siblings) > capacity.max_running_requests:
            error = RequestError("sampling_params.n", f"{len(siblings)} samples of this prompt do not fit this worker")
            self._reply(Failed(message.rid, ErrorReport.of(error, rid=message.rid)))
            return
        self._prompts[siblings[0]] = siblings
        self._generation.open(siblings)
        self._prefill.add(siblings[0])

    def poll(self) -> None:
        """Take what the rows thread has gathered; whoever waited to flush the cache may go on."""
        self._collector.poll()
        self._flushes.finish()

    # -------------------------------------------------------------------------------------------- steps

    def plan(self) -> StepPlan | None:
        """Plan chunks if there are any, else tokens; and tokens for once if there have been chunks for long."""
        if self._num_chunk_steps >= MAX_CHUNK_STEPS and (tokens := self._decode.plan()) is not None:
            self._num_chunk_steps = 0
            return tokens
        if (chunks := self._prefill.plan()) is not None:
            self._num_chunk_steps += 1
            return chunks
        self._num_chunk_steps = 0
        return self._decode.plan()

    def rest(self) -> None:
        """Nobody waits for anything that a prompt without a step could do."""

    def on_settled(self, result: StepResult) -> None:
        """Take each sample's token, and see which prompts are computed; what has ended meanwhile is let go."""
        for entry, outcome in zip(result.plan.entries, result.outcomes, strict=True):
            request = entry.request
            request.steps_in_flight -= 1
            match request.state:
                case RequestState.RECEIVING:
                    self._take_chunk(entry, outcome, result.weight_version)
                case RequestState.RUNNING:
                    request.settle(entry.start, entry.stop, result.weight_version)
                    [sampled] = outcome.sampled
                    self._generation.take_token(request, sampled)
                case _:
                    self._generation.let_go(request)

    def on_failed(self, plan: StepPlan, error: RequestFailed) -> None:
        """Fail the samples that the step was for."""
        self._generation.fail_step(plan, error)

    def on_weights_changed(self) -> None:
        """Forget what other weights have computed: the cached prompts, and the samples that were begun and may not go on."""
        if self._cache is not None:
            self._cache.clear()
        self._generation.fail_versions(self._engine.weight_version)

    def on_kv_lost(self) -> None:
        """Forget the cached prompts."""
        if self._cache is not None:
            self._cache.clear()

    def _take_chunk(self, entry: StepEntry, outcome: Outcome, weight_version: str) -> None:
        prompt = entry.request
        prompt.settle(entry.start, entry.stop, weight_version)
        prompt.prompt_scores += outcome.scored.logprobs
        prompt.prompt_tops += outcome.scored.top_logprobs
        if entry.stop == prompt.num_prompt_tokens:
            prompt.timings["prefill_forward_duration"] = time.perf_counter() - prompt.started_at
            self._num_tokens_cached += prompt.cached_tokens
            self._prefill.remove(prompt)
            self._remember(prompt)
            self._begin(self._prompts.pop(prompt), outcome.sampled)

    def _remember(self, prompt: Request) -> None:
        """Keep the prompt's full pages for later prompts that begin alike.

        Not if other weights than the engine's have computed some of it. Nor if the cache knows its beginning on other pages
        by now. Then this prompt's would hang below pages that it does not hold itself, and hold them in the cache for as long
        as it runs; and the eldest request could want for them.
        """
        if self._cache is None or not prompt.is_all_of(self._engine.weight_version):
            return
        known = self._cache.match(prompt.prompt)
        self._engine.allocator.release(known)
        if known == prompt.pages[: len(known)]:
            self._cache.insert(prompt.prompt, prompt.pages)

    def _begin(self, siblings: Siblings, sampled: tuple[Sampled, ...]) -> None:
        """The prompt is computed: all its samples begin, each with its first token; without tokens they have ended."""
        self._share(siblings)
        if not sampled:
            for request in siblings:
                self._generation.finish(request, FinishReason(type="length", length=0))
            return
        version = self._engine.weight_version
        if not siblings[0].may_go_on_under(version):
            self._generation.fail_mixed(siblings[0], version)
            return
        for request in siblings:
            self._decode.start(request, computed_tokens=request.num_prompt_tokens)
            self._collector.begin(request, request.message.options.routed_experts_start_len, request.num_prompt_tokens)
        for request, first in zip(siblings, sampled, strict=True):
            if request.state is RequestState.RUNNING:  # else an earlier one's failure has ended it
                self._generation.take_token(request, first)

    def _share(self, siblings: Siblings) -> None:
        """Give the other samples what the first one has computed: the last page, which is their own, its rows, and the rest."""
        prompt, *others = siblings
        if not others:
            return
        engine, page_size, num_tokens = self._engine, self._engine.capacity.page_size, prompt.num_prompt_tokens
        first_own = num_tokens // page_size
        begin = first_own * page_size
        if begin < num_tokens:
            engine.copy_page(prompt.pages[first_own], [request.pages[first_own] for request in others])
            rows, written = engine.host_cache.read(slots_of(prompt.pages, begin, num_tokens, page_size))
            for request in others:
                slots = slots_of(request.pages, begin, num_tokens, page_size)[written]
                engine.host_cache.commit(engine.host_cache.reserve(slots), rows[written])
        for request in others:
            request.computed_tokens, request.cached_tokens = num_tokens, prompt.cached_tokens
            request.version_changes = list(prompt.version_changes)
            request.prompt_scores, request.prompt_tops = prompt.prompt_scores, prompt.prompt_tops
            request.timings = prompt.timings
        self._change_rows(prompt, others[0])

    def _change_rows(self, prompt: Request, other: Request) -> None:
        """Seat the first sample on another row of the table.

        The step that has drawn the first tokens of all samples has counted them all for its row (`common.engine.penalties`);
        on another one they are counted anew, from its own tokens.
        """
        self._seats.give_back_row(other)
        other.row = prompt.row
        self._seats.take(prompt, prompt.pages)
        self._seats.give_back_row(other)
        self._seats.take(other, other.pages)

    # -------------------------------------------------------------------------------------------- endings

    def forget(self, request: Request, *, is_retracted: bool) -> None:
        """Its prompt is not to be computed any further."""
        if self._prompts.pop(request, None) is not None:
            self._prefill.remove(request)

    def is_quiet(self, request: Request) -> bool:
        """There is no peer: what has settled is quiet."""
        return True

    # -------------------------------------------------------------------------------------------- statistics

    @property
    def is_needed(self) -> bool:
        """No other worker waits for anything of this one."""
        return False

    @property
    def is_idle(self) -> bool:
        """Whether no sample is open."""
        return not (self._generation.num_open or self._seats.holders)

    def stats(self, serial: int) -> Stats:
        """Recount the pages and report the counters."""
        return make_stats(
            self._engine,
            NoTransfer(),
            serial=serial,
            queued_requests=len(self._prefill.waiting),
            running_requests=len(self._prefill.running) + len(self._decode.running) + len(self._decode.swapped),
            cached_pages=() if self._cache is None else self._cache.pages(),
            tokens_cached=self._num_tokens_cached,
            rows_refused=self._collector.num_refused,
            swaps=self._swap_space.num_swaps,
        )
