"""One leg on its worker while it lasts: how long it may take, whether it has ended, and how it went.

    expect(stage, seconds)  --+
    fail(error)             --+--> the one timeout under which somebody waits for the leg --> that stage's or that error

`fail` is how whoever learns that a leg will not end tells the one who waits for it: the health checks of a stopped worker,
which never closes its connections, and the request's own deadline. It knows no HTTP. Neighbours: `legs` (the HTTP of a leg),
`pair` and `alone` (wait for legs), `attempts` (begins them), `breaker` (is told how they went).
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from common.errors import DeadlineExceeded, MixedVersions, Retracted, TandemError
from common.messages import ErrorReport
from common.protocol.generate import Sample
from router.registry import OpenSample
from router.worker import Group, Worker

_CHARS_PER_TOKEN = 4

Result = TypeVar("Result")
Event = TypeVar("Event")


class LegRun:
    """A leg in flight. One task at a time waits for it."""

    def __init__(self, worker: Worker, tokens: int = 0) -> None:
        self.worker = worker
        self.tokens = tokens
        """An estimate of what it computes, of prompt and output."""
        self.has_begun = False
        """Something of its stream has come."""
        self.has_ended = False
        """The worker has said all that it will."""
        self._due: float | None = None
        self._stage = ""
        self._within_s = 0.0
        self._failure: TandemError | None = None
        self._timeout: asyncio.Timeout | None = None
        self._is_trial = worker.breaker.begin()
        self._is_judged = False
        self._group: Group | None = None

    def take_group(self) -> int:
        """Choose which attention group of the worker is to have it, once; it counts there until it is closed."""
        assert self._group is None
        self._group = self.worker.choose_group()
        self._group.outstanding += 1
        return self._group.index

    def expect(self, stage: str, within_s: float) -> None:
        """Give the leg so long from now for what comes next; the error of being late names the stage."""
        self._stage, self._within_s = stage, within_s
        self._due = asyncio.get_running_loop().time() + within_s
        self._rearm()

    def postpone(self, seconds: float) -> None:
        """Give it so much longer for what comes next: its worker was paused meanwhile."""
        if self._due is not None:
            self._due += seconds
            self._rearm()

    def fail(self, error: TandemError) -> None:
        """End the leg: whoever waits for it, now or later, gets this error."""
        self._failure = self._failure or error
        self._rearm()

    async def wait(self, coming: Awaitable[Result]) -> Result:
        """Wait for something of the leg. Raises DeadlineExceeded, or what it was failed with."""
        try:
            async with asyncio.timeout_at(self._when()) as self._timeout:
                return await coming
        except TimeoutError as error:
            raise self._failure or self._too_late() from error
        finally:
            self._timeout = None

    async def next_of(self, events: AsyncGenerator[Event, None], idle_deadline_s: float) -> Event:
        """Wait for the next event of its stream; after the first one each has a deadline of its own."""
        if self.has_begun:
            self.expect("idle", idle_deadline_s)
        return await self.wait(anext(events))

    def succeeded(self) -> None:
        """Note that it has ended well."""
        self._is_judged = True
        self.worker.breaker.succeeded(is_trial=self._is_trial)

    def failed(self) -> None:
        """Note that it has failed by its worker's fault."""
        self._is_judged = True
        self.worker.breaker.failed(is_trial=self._is_trial)

    def close(self) -> None:
        """Nobody waits for it any more."""
        if self._group is not None:
            self._group.outstanding -= 1
        if not self._is_judged:
            self.worker.breaker.let_go(is_trial=self._is_trial)

    def _when(self) -> float | None:
        return self._due if self._failure is None else 0.0

    def _too_late(self) -> DeadlineExceeded:
        what = f"the {self._stage} deadline of {self._within_s:g} s passed"
        return DeadlineExceeded(f"{self.worker.label}: {what}", leg=self.worker.leg, stage=self._stage)

    def _rearm(self) -> None:
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(self._when())


@contextmanager
def leg_on(worker: Worker, tokens: int = 0) -> Iterator[LegRun]:
    """Begin a leg of about so many tokens, and count it as in flight as long as it lasts."""
    run = LegRun(worker, tokens)
    worker.begin(run)
    try:
        yield run
    finally:
        worker.end(run)
        run.close()


def estimated_tokens(sample: Sample) -> int:
    """Estimate how many tokens a prompt and its output have; the router has no tokenizer."""
    if sample.input_ids is not None:
        prompt = len(sample.input_ids)
    elif sample.text is not None:
        prompt = len(sample.text) // _CHARS_PER_TOKEN
    else:
        prompt = sum(len(str(message["content"])) for message in sample.messages or ()) // _CHARS_PER_TOKEN
    sampling = sample.options.sampling
    return prompt + sampling.n * sampling.max_new_tokens


class Attempt(NamedTuple):
    """One try to answer a prompt: its legs, prefill first, under one rid."""

    sample: Sample
    open: OpenSample
    rid: str
    runs: tuple[LegRun, ...]

    def unended(self) -> list[Worker]:
        """Give the workers whose legs have not ended."""
        return [run.worker for run in self.runs if not run.has_ended]

    def expire(self) -> None:
        """End the legs: the request's deadline has passed."""
        if workers := self.unended():
            places = ", ".join(f"the {worker.label}" for worker in workers)
            message = f"the request's deadline passed, waiting for {places}"
            error = DeadlineExceeded(message, leg=workers[0].leg, stage="request")
            for run in self.runs:
                if not run.has_ended:
                    run.fail(error)

    def culprit(self, report: ErrorReport) -> LegRun | None:
        """Find the leg that an error is about; None if that is no single one, or nobody is to blame."""
        if report.stage == "request" or report.code in (MixedVersions.code, Retracted.code):
            return None
        return next((run for run in self.runs if run.worker.leg == report.leg), None)
