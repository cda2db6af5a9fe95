"""Samples from their first token to their answer: what every engine that generates does with them.

A sample takes its tokens one by one until one of them, the frontend or a client ends it; then its rows are gathered and it is
answered. Runs in the engine's thread. It knows no transfer and no plan. Neighbours: `decode_worker.worker` and
`deploy.aggregated` (the roles that generate: they say when a sample begins, and what else it must be let go of),
`decode_worker.scheduler`, `common.engine.collector`.
"""

from typing import Protocol

from common.engine.collector import RowCollector, Rows
from common.engine.engine import Engine
from common.engine.loop import Reply
from common.engine.step import Sampled
from common.errors import MixedVersions, RequestFailed, RowsError
from common.messages import EndCause, ErrorReport, Failed, Finished, FinishReason, Leg, StopAt, Tokens
from common.scheduling.request import Request, RequestState
from common.scheduling.step_plan import StepPlan
from decode_worker.scheduler import DecodeScheduler, Siblings
from decode_worker.swap import SwapSpace


class Holder(Protocol):
    """The role around the samples: what only it knows of them."""

    def forget(self, request: Request, *, is_retracted: bool) -> None:
        """The sample is leaving, retracted or for good: drop what the role keeps of it, and whatever brings its KV."""

    def is_quiet(self, request: Request) -> bool:
        """Whether nobody else may touch its pages any more; if not, the role calls `let_go` again once that is so."""


class Generation:
    """The open samples of one engine. With a `leg` they are one of two: their prompts' rows and logprobs are the other's."""

    def __init__(
        self,
        engine: Engine,
        scheduler: DecodeScheduler,
        swap_space: SwapSpace,
        collector: RowCollector,
        reply: Reply,
        holder: Holder,
        *,
        leg: Leg | None,
    ) -> None:
        self._seats = engine.seats
        self._scheduler = scheduler
        self._swap_space = swap_space
        self._collector = collector
        self._reply = reply
        self._holder = holder
        self._leg: Leg | None = leg
        self._eos_token_ids = frozenset(engine.config.eos_token_ids)
        self._open: dict[str, set[Request]] = {}
        """The samples of each rid that have not been answered."""

    @property
    def num_open(self) -> int:
        """How many requests have a sample that has not been answered."""
        return len(self._open)

    def open(self, siblings: Siblings) -> None:
        """Take the samples of a request in."""
        self._open[siblings[0].rid] = set(siblings)

    def _unanswered(self, rid: str) -> Siblings:
        """The unanswered samples of a rid; one whose rows are being gathered is as good as answered."""
        return tuple(r for r in self._open.get(rid, ()) if r.state is not RequestState.COLLECTING)

    # -------------------------------------------------------------------------------------------- tokens

    def take_token(self, request: Request, sampled: Sampled) -> None:
        """Append a settled token to a running sample; it may be the last one."""
        options = request.message.options
        token_id, logprob, top_logprobs = sampled
        request.output_ids.append(token_id)
        request.logprobs.append(logprob)
        request.top_logprobs.append(top_logprobs)
        if options.stream or options.sampling.stop:
            self._reply(Tokens(request.rid, [token_id], [logprob], request.index, [top_logprobs]))
        reason = self._finish_reason(request, token_id)
        if reason is not None:
            self.finish(request, reason)

    def _finish_reason(self, request: Request, token_id: int) -> FinishReason | None:
        sampling = request.message.options.sampling
        if token_id in sampling.stop_token_ids or (token_id in self._eos_token_ids and not sampling.ignore_eos):
            return FinishReason(type="stop", matched=token_id)
        if len(request.output_ids) == sampling.max_new_tokens:
            return FinishReason(type="length", length=len(request.output_ids))
        return None

    # -------------------------------------------------------------------------------------------- endings

    def abort(self, rid: str) -> None:
        """The client is gone: end its samples without an answer."""
        for request in self._unanswered(rid):
            self.leave(request)

    def finish_now(self, rid: str, cause: EndCause) -> None:
        """Answer each sample with what it has."""
        for request in self._unanswered(rid):
            self.finish(request, FinishReason.early(cause, self._stage_of(request)))

    def _stage_of(self, request: Request) -> str:
        """Say how far an unanswered sample is."""
        match request.state:
            case RequestState.QUEUED:
                return "while queued"
            case RequestState.RECEIVING:
                return "in prefill" if self._leg is None else "in transfer"
            case _:
                return "in decode"

    def stop_at(self, message: StopAt) -> None:
        """Cut a sample's tokens off behind a stop string, and answer it."""
        for request in self._unanswered(message.rid):
            if request.index == message.index and request.state in (RequestState.RUNNING, RequestState.SWAPPED):
                for emitted in (request.output_ids, request.logprobs, request.top_logprobs):
                    del emitted[message.num_tokens :]
                self.finish(request, FinishReason(type="stop", matched=message.matched))

    def finish(self, request: Request, reason: FinishReason) -> None:
        """The sample has its last token: gather its rows, then answer."""
        start = request.message.options.routed_experts_start_len if self._leg is None else request.num_prompt_tokens
        # A prompt that is only scored may be shorter than where its rows are to begin.
        stop = max(start, request.num_prompt_tokens + len(request.output_ids) - 1)
        if _has_nothing(request, reason):
            self._answer(request, reason, None)
        elif request.state is RequestState.SWAPPED:
            swapped = self._swap_space.rows_of(request, start, stop)
            self._collector.collect_swapped(request, swapped, start, lambda rows: self._answer(request, reason, rows))
        else:
            self._scheduler.remove(request)
            request.advance(RequestState.COLLECTING)
            self._collector.collect(request, start, stop, lambda rows: self._answer(request, reason, rows))

    def _answer(self, request: Request, reason: FinishReason, rows: Rows) -> None:
        if request not in self._open.get(request.rid, ()):
            self.let_go(request)  # given up while its rows were gathered
        elif isinstance(rows, RowsError):
            self.fail(request, ErrorReport.of(rows, leg=self._leg, stage="decode", rid=request.rid))
        else:
            stop = 0 if _has_nothing(request, reason) else request.num_prompt_tokens + len(request.output_ids) - 1
            finished = Finished(
                rid=request.rid,
                index=request.index,
                prompt_tokens=request.num_prompt_tokens,
                cached_tokens=request.cached_tokens,
                token_ids=request.output_ids,
                logprobs=request.logprobs,
                top_logprobs=request.top_logprobs,
                prompt_logprobs=request.prompt_logprobs() if self._leg is None else None,
                finish_reason=reason,
                rows=None if rows is None else rows.header,
                weight_versions=request.versions_of(0, stop),
                timings=request.timings,
            )
            self._reply(finished, *(() if rows is None else (rows.data,)))
            self.leave(request, is_retracted=reason.is_retracted)

    def fail(self, request: Request, error: ErrorReport) -> None:
        """One sample's failure is the failure of all."""
        unanswered = self._open.get(request.rid)
        if unanswered is None or request not in unanswered:
            return  # another sample's failure has ended this one too
        self._reply(Failed(request.rid, error))
        for sample in list(unanswered):
            self.leave(sample)

    def fail_step(self, plan: StepPlan, error: RequestFailed) -> None:
        """Fail the samples of a step that has no results; those that had ended before are let go of."""
        for entry in plan.entries:
            request = entry.request
            request.steps_in_flight -= 1
            if request.state in (RequestState.RECEIVING, RequestState.RUNNING):
                self.fail(request, ErrorReport.of(error, leg=self._leg, rid=request.rid))
            else:
                self.let_go(request)

    def fail_versions(self, weight_version: str) -> None:
        """The engine goes on under these weights: fail what others have begun, and may not mix them.

        A resumed sample in the middle of its prompt begins again: its answer would not say what weights have computed that KV.
        """
        for request in [request for samples in self._open.values() for request in samples]:
            if request.state is RequestState.COLLECTING or request.is_all_of(weight_version):
                continue
            if not request.may_go_on_under(weight_version):
                self.fail_mixed(request, weight_version)
            elif request.is_resumed and request.state is RequestState.RECEIVING:
                self.finish(request, FinishReason.early("retracted", self._stage_of(request)))

    def fail_mixed(self, request: Request, weight_version: str) -> None:
        """Fail a sample that these weights would have to go on with, and may not; that is no leg's fault."""
        error = MixedVersions((*request.message.options.resumed_versions, *request.versions, weight_version))
        self.fail(request, ErrorReport.of(error, rid=request.rid))

    def leave(self, request: Request, *, is_retracted: bool = False) -> None:
        """The sample has been answered, or nobody waits for an answer; it keeps only what is still in use."""
        unanswered = self._open[request.rid]
        unanswered.discard(request)
        if not unanswered:
            del self._open[request.rid]
        self._scheduler.remove(request)
        self._holder.forget(request, is_retracted=is_retracted)
        self.let_go(request)

    def let_go(self, request: Request) -> None:
        """Give back what nothing touches any more: the row after the last step, the pages after rows and peers too."""
        if self._collector.holds(request):
            return
        if request.steps_in_flight > 0:
            if request.state is not RequestState.SURPLUS:
                request.advance(RequestState.SURPLUS)
            return
        self._seats.give_back_row(request)
        if self._holder.is_quiet(request):
            self._collector.forget(request)
            self._seats.give_back_pages(request)
            request.advance(RequestState.ENDED)


def _has_nothing(request: Request, reason: FinishReason) -> bool:
    """Whether the sample was aborted before its first token."""
    return reason.type == "abort" and not request.output_ids
