"""One prompt to its end, however often its samples are retracted on the way: what the routes that generate call.

    attempts -> answers, or events; of each sample that was retracted:
                  told the client nothing, and has nothing or may not mix weights?   again from its beginning
                  else                                                               on from its tokens, and joined

A worker retracts what it has when generation is paused so. The prompt stays open meanwhile, so that an abort finds it wherever
it is. Of several samples each goes on by itself. Neighbours: `generate_api`, `openai_api` and `streaming` (ask), `attempts` (one
run of a prompt, which starts over as a whole where that will do), `seam` (what is asked next, and how it is joined), `gate`.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager

from msgspec.structs import replace

from common.errors import TandemError
from common.messages import ErrorReport, ReportedError
from common.protocol.generate import Sample
from common.server.http import together
from router.attempts import Attempts
from router.combine import Answer
from router.events import SampleEvent
from router.metrics import RouterMetrics
from router.registry import OpenSample, Registry
from router.seam import continuation, joined, joined_event, sample_alone, starts_over


class Resumed:
    """Runs prompts. Whatever goes wrong is raised as ReportedError, with the prompt's rid."""

    def __init__(self, attempts: Attempts, registry: Registry, metrics: RouterMetrics) -> None:
        self._attempts = attempts
        self._registry = registry
        self._metrics = metrics

    async def answer(
        self, sample: Sample, *, deadline: float, as_base64: bool = False, max_retries: int | None = None
    ) -> list[Answer]:
        """Run a prompt to the end of all its n samples. `deadline` is in the event loop's time; `as_base64` is how rows leave."""
        with self._open(sample) as entry:
            answers = await self._attempts.answer(
                sample, entry, deadline=deadline, as_base64=as_base64, max_retries=max_retries
            )
            if not any(answer.finish_reason.is_retracted for answer in answers):
                return answers
            return await together(
                [self._ended(sample, index, answer, entry, deadline) for index, answer in enumerate(answers)]
            )

    async def stream(self, sample: Sample, *, deadline: float) -> AsyncGenerator[SampleEvent, None]:
        """Run a prompt: the events of its tokens as they come, with the client's rid, and an Answer as each sample's last one.

        Close the generator when done with it (`contextlib.aclosing`).
        """
        with self._open(sample) as entry:
            told: set[int] = set()
            retracted: dict[int, Answer] = {}
            async with aclosing(self._attempts.stream(sample, entry, deadline=deadline)) as events:
                async for event in events:
                    number, content = event
                    if isinstance(content, Answer) and content.finish_reason.is_retracted:
                        retracted[number] = content
                    else:
                        told.add(number)
                        yield event
            rest = [
                self._rest(sample, number, answer, entry, deadline, is_told=number in told)
                for number, answer in retracted.items()
            ]
            async with aclosing(_interleaved(rest)) as events:
                async for event in events:
                    yield event

    async def _ended(self, sample: Sample, index: int, answer: Answer, entry: OpenSample, deadline: float) -> Answer:
        """Run a sample that may have been retracted to its end."""
        while answer.finish_reason.is_retracted:
            is_anew = starts_over(sample, answer)
            part = self._next(sample, index, answer, is_anew=is_anew)
            (later,) = await self._attempts.answer(part, entry, deadline=deadline)
            answer = later if is_anew else await joined(sample, answer, later)
        return answer

    async def _rest(
        self, sample: Sample, index: int, answer: Answer, entry: OpenSample, deadline: float, *, is_told: bool
    ) -> AsyncGenerator[SampleEvent, None]:
        """Run a retracted sample to its end, as a stream."""
        while answer.finish_reason.is_retracted:
            is_anew = not is_told and starts_over(sample, answer)
            part = self._next(sample, index, answer, is_anew=is_anew)
            async with aclosing(self._attempts.stream(part, entry, deadline=deadline)) as events:
                async for _, content in events:
                    if isinstance(content, Answer):
                        answer = content if is_anew else await joined(sample, answer, content)
                    else:
                        is_told = True
                        yield SampleEvent(index, content if is_anew else joined_event(answer, content))
        yield SampleEvent(index, answer)

    def _next(self, sample: Sample, index: int, answer: Answer, *, is_anew: bool) -> Sample:
        """Say what is asked next of a retracted sample."""
        self._metrics.resumed.labels("sample" if is_anew else "tokens").inc()
        return sample_alone(sample, index) if is_anew else continuation(sample, index, answer)

    @contextmanager
    def _open(self, sample: Sample) -> Iterator[OpenSample]:
        """Keep a prompt open as long as it lasts, and make its failure the client's error."""
        with self._registry.entered(sample.rid) as entry:
            try:
                yield entry
            except TandemError as error:
                report = replace(ErrorReport.of(error), rid=sample.rid)
                self._metrics.failures.labels(report.leg or "none", report.code).inc()
                raise ReportedError(report) from error


async def _interleaved(streams: Sequence[AsyncGenerator[SampleEvent, None]]) -> AsyncGenerator[SampleEvent, None]:
    """Pass the events of all streams on as they come, none of them further ahead than one event."""
    coming = {asyncio.ensure_future(anext(stream, None)): stream for stream in streams}
    try:
        while coming:
            done, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                stream = coming.pop(task)
                if (event := task.result()) is not None:
                    yield event
                    coming[asyncio.ensure_future(anext(stream, None))] = stream
    finally:
        for task in coming:
            task.cancel()
        await asyncio.gather(*coming, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
