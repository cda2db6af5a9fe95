"""One prompt as attempts: workers are picked, an attempt runs, and what failed may be tried again elsewhere.

    gate -> look -> pick -> legs begin -> answer, or events
     ^                        |
     |                        '- failure: blame its leg, abort the others -> told the client anything, or hopeless? -> error
     '------- pause at random ------- no: again, under a new rid and new rooms

To look is to ask the workers that were not well for their health, if without them there is nobody to pick.

Only what is nobody's answer yet is tried again, and only a failure that another pair, or a later moment, may not have. A
retry repeats itself: the seed was drawn before. Rows that were refused are never tried again, nor legs that disagree: that is
a defect to be heard of. A prompt that was retracted before it had anything is nobody's failure, and starts again as often as
that happens. Neighbours: `resume` (asks, and goes on with what was retracted later), `pair` and `alone` (run an attempt), `gate`,
`membership` (picks), `aborts`.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator
from contextlib import ExitStack, aclosing, contextmanager, suppress

from msgspec.structs import replace

from common.errors import MEMORY_RELEASED, Retracted, TandemError
from common.ids import new_rid
from common.messages import ErrorReport, ReportedError, WorkerKind
from common.protocol.generate import Sample
from router.aborts import Aborts
from router.alone import Alone
from router.combine import Answer, never_begun
from router.events import SampleEvent
from router.gate import Gate
from router.leg_run import Attempt, estimated_tokens, leg_on
from router.membership import Membership
from router.metrics import RouterMetrics
from router.pair import Pairs
from router.registry import OpenSample
from router.seam import starts_over
from router.worker import Worker

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0
_PASSING = frozenset({429, 500, 502, 503, 504})
_HOPELESS_STAGES = frozenset({"request", "merge"})


def may_pass(report: ErrorReport) -> bool:
    """Say whether another attempt may not have this failure of an attempt."""
    are_rows = report.code.startswith("routed_experts")
    return report.status in _PASSING and not are_rows and report.stage not in _HOPELESS_STAGES


class Attempts:
    """Runs prompts. Whatever goes wrong is raised as ReportedError."""

    def __init__(
        self,
        pairs: Pairs,
        alone: Alone,
        membership: Membership,
        gate: Gate,
        aborts: Aborts,
        metrics: RouterMetrics,
        ask_unwell: Callable[[], Awaitable[None]],
        *,
        max_retries: int,
    ) -> None:
        """`ask_unwell` sees whether workers that were not well are by now."""
        self._pairs = pairs
        self._alone = alone
        self._membership = membership
        self._gate = gate
        self._aborts = aborts
        self._metrics = metrics
        self._ask_unwell = ask_unwell
        self._max_retries = max_retries

    async def answer(
        self,
        sample: Sample,
        entry: OpenSample,
        *,
        deadline: float,
        as_base64: bool = False,
        max_retries: int | None = None,
    ) -> list[Answer]:
        """Run a prompt to the end of all its n samples, or until they are retracted.

        `deadline` is in the event loop's time; `as_base64` is how rows leave.
        """
        with self._prompt(sample, entry, deadline, max_retries) as prompt:
            while await prompt.may_begin():
                with prompt.attempt() as attempt:
                    if len(attempt.runs) == 1:
                        answers = await self._alone.answer(attempt)
                    else:
                        answers = await self._pairs.answer(attempt, as_base64=as_base64)
                    _start_over(sample, answers)
                    for answer in answers:
                        self._metrics.count_rows(answer.rows)
                    return answers
                await prompt.pause()
            return [never_begun(sample)] * sample.options.sampling.n

    async def stream(self, sample: Sample, entry: OpenSample, *, deadline: float) -> AsyncGenerator[SampleEvent, None]:
        """Run a prompt: the events of its tokens as they come, with the client's rid, and an Answer as each sample's last one.

        Those of samples that were retracted come last. Close the generator when done with it (`contextlib.aclosing`).
        """
        with self._prompt(sample, entry, deadline) as prompt:
            while await prompt.may_begin():
                with prompt.attempt() as attempt:
                    run = self._alone.stream if len(attempt.runs) == 1 else self._pairs.stream
                    retracted: dict[int, Answer] = {}
                    async with aclosing(run(attempt)) as events:
                        async for event in events:
                            number, content = event
                            if isinstance(content, Answer) and content.finish_reason.is_retracted:
                                retracted[number] = content
                                continue
                            prompt.is_told = True
                            if isinstance(content, Answer):
                                self._metrics.count_rows(content.rows)
                            yield event
                    if not prompt.is_told:
                        _start_over(sample, retracted.values())
                    for number, answer in retracted.items():
                        self._metrics.count_rows(answer.rows)
                        yield SampleEvent(number, answer)
                    return
                await prompt.pause()
            for number in range(sample.options.sampling.n):
                yield SampleEvent(number, never_begun(sample))

    @contextmanager
    def _prompt(
        self, sample: Sample, entry: OpenSample, deadline: float, max_retries: int | None = None
    ) -> Iterator["_Prompt"]:
        """Make a prompt's failure say how often it was tried."""
        retries_left = self._max_retries if max_retries is None else max_retries
        prompt = _Prompt(
            sample, entry, deadline, retries_left, self._pick, self._look, self._gate, self._aborts, self._metrics
        )
        try:
            yield prompt
        except TandemError as error:
            raise ReportedError(prompt.told(ErrorReport.of(error))) from error

    async def _look(self, sample: Sample) -> None:
        """If a leg has nobody to take it, see whether that is still so: a worker may have become well since it was asked."""
        if self._membership.is_short(self._roles(sample)):
            await self._ask_unwell()

    def _pick(self, sample: Sample, failed: list[Worker]) -> tuple[Worker, ...]:
        """Pick the workers of an attempt."""
        first, *others = self._roles(sample)
        worker = self._membership.pick(first, sample, failed=failed)
        version = worker.weight_version
        return worker, *(self._membership.pick(role, sample, failed=failed, version=version) for role in others)

    def _roles(self, sample: Sample) -> tuple[WorkerKind, ...]:
        """Say whose legs a prompt takes, in order. One that asks for no tokens needs no decode worker."""
        if not self._membership.has_pairs:
            return ("aggregated",)
        return ("prefill",) if sample.options.sampling.max_new_tokens == 0 else ("prefill", "decode")


def _start_over(sample: Sample, answers: Collection[Answer]) -> None:
    """Raise Retracted if all samples start over, of whom nothing was told: they can as one prompt."""
    if answers and all(starts_over(sample, answer) for answer in answers):
        raise Retracted("all samples were retracted", stage="generate")


class _Prompt:
    """The attempts of one prompt, one after the other."""

    def __init__(
        self,
        sample: Sample,
        entry: OpenSample,
        deadline: float,
        retries_left: int,
        pick: Callable[[Sample, list[Worker]], tuple[Worker, ...]],
        look: Callable[[Sample], Awaitable[None]],
        gate: Gate,
        aborts: Aborts,
        metrics: RouterMetrics,
    ) -> None:
        self.is_told = False
        """Something of it has gone to the client."""
        self._sample = sample
        self._entry = entry
        self._deadline = deadline
        self._retries_left = retries_left
        self._pick = pick
        self._look = look
        self._gate = gate
        self._aborts = aborts
        self._metrics = metrics
        self._num_attempts = 0
        self._failed: list[Worker] = []
        self._last: ErrorReport | None = None

    async def may_begin(self) -> bool:
        """Wait at the gate; says whether an attempt is to begin, and not if somebody wants the prompt's end."""
        await self._gate.wait(self._entry, self._deadline)
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._deadline):
                await self._look(self._sample)
        await self._gate.wait(self._entry, self._deadline)  # it may have closed meanwhile
        return not self._entry.is_aborted

    @contextmanager
    def attempt(self) -> Iterator[Attempt]:
        """Begin an attempt, which ends with the block. A failure is raised only if there is to be no other one."""
        try:
            workers = self._pick(self._sample, self._failed)
        except TandemError as error:
            # What failed says more than that there is nobody left to try.
            raise ReportedError(self._last or ErrorReport.of(error)) from error
        self._num_attempts += 1
        tokens = estimated_tokens(self._sample)
        with ExitStack() as stack:
            runs = tuple(stack.enter_context(leg_on(worker, tokens)) for worker in workers)
            attempt = Attempt(self._sample, self._entry, new_rid(), runs)
            stack.enter_context(self._entry.attempted(attempt.rid, workers))
            stack.callback(self._abort_unended, attempt)
            timer = asyncio.get_running_loop().call_at(self._deadline, attempt.expire)
            stack.callback(timer.cancel)
            try:
                yield attempt
            except TandemError as error:
                self._last = self._judged(attempt, ErrorReport.of(error))
                if not self._may_go_on(self._last):
                    raise ReportedError(self._last) from error
            else:
                for run in runs:
                    if run.has_ended:
                        run.succeeded()

    async def pause(self) -> None:
        """Wait a little before the next attempt, for a random time, so that prompts that failed together do not return so."""
        last = self._last
        assert last is not None
        longest_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(self._num_attempts - 1, 10))
        pause_s = random.uniform(0, longest_s)
        if asyncio.get_running_loop().time() + pause_s >= self._deadline:
            raise ReportedError(last)
        await asyncio.sleep(pause_s)
        if last.code == Retracted.code:
            self._metrics.resumed.labels("prompt").inc()
            self._last = None  # that was nobody's failure
            return
        # Somebody who wants its end wants no other attempt.
        if self._entry.is_aborted:
            raise ReportedError(last)
        self._metrics.retries.labels(last.leg or "none", last.stage or "none").inc()
        self._retries_left -= 1

    def told(self, report: ErrorReport) -> ErrorReport:
        """Say in an error how often it was tried."""
        if self._num_attempts <= 1:
            return report
        return replace(report, message=f"{report.message} ({self._num_attempts} attempts)")

    def _judged(self, attempt: Attempt, report: ErrorReport) -> ErrorReport:
        """Blame the leg that has failed, and no other; gives the error, which names that leg's worker."""
        culprit = attempt.culprit(report)
        if culprit is None or (report.status < 500 and report.status != 429):
            return report
        self._failed.append(culprit.worker)
        if report.status == 429 or report.code == MEMORY_RELEASED:
            return report
        culprit.failed()
        if culprit.worker.url in report.message:
            return report
        return replace(report, message=f"{report.message} ({culprit.worker.label})")

    def _may_go_on(self, last: ErrorReport) -> bool:
        if self.is_told:
            return False
        return last.code == Retracted.code or (self._retries_left > 0 and may_pass(last))

    def _abort_unended(self, attempt: Attempt) -> None:
        for worker in attempt.unended():
            self._aborts.send(worker, attempt.rid)
