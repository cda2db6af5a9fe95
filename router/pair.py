"""One prompt over one pair of workers: both legs at once, and the failure of one is the end of both.

Where the workers are aggregated there is only one of them, and it is asked as the decode leg is.

    answer   prefill ----------> reply, encode ahead \\
             decode  ------------------------> reply -> combine -> Answer
    stream   prefill ----------> reply, encode ahead .\\
             decode  --> event --> event --> last -> combine -> Answer

The prefill leg runs once for all n samples of the prompt, and the decode leg runs all of them. A prompt that somebody
aborts (`control`) ends with what its legs have. This knows no client, and of the reply's format only whether its rows are
base64. Neighbours: `legs` (one leg), `ahead` (rows as they arrive), `combine` (joins the replies), `membership` (the
workers), `generate_api` and `openai_api` (ask).
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

import aiohttp
from msgspec.structs import replace

from common.errors import DeadlineExceeded, TandemError
from common.ids import new_rid, new_room
from common.messages import Bootstrap, ErrorReport, ReportedError
from common.protocol.generate import Sample
from common.protocol.legs import LegReply, encode_leg
from common.protocol.replies import Reply
from router.ahead import Arrived, Lead, LeadEncoder, arrive
from router.combine import Answer, combine_pair, combine_unfinished, combine_whole, is_unfinished
from router.legs import fetch, stream
from router.membership import Membership, Worker
from router.metrics import RouterMetrics
from router.registry import OpenSample, Registry

Result = TypeVar("Result")


class SampleEvent(NamedTuple):
    """What a stream tells of one sample of its prompt, the `number`th from 0: its text so far, or its end."""

    number: int
    content: Reply | Answer


class Pairs:
    """Runs prompts over pairs. Whatever goes wrong is raised as ReportedError, with the prompt's rid."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        membership: Membership,
        registry: Registry,
        metrics: RouterMetrics,
        *,
        verify_rows: bool,
    ) -> None:
        self._session = session
        self._membership = membership
        self._registry = registry
        self._metrics = metrics
        self._verify_rows = verify_rows
        self._lead_encoder = LeadEncoder()

    async def answer(self, sample: Sample, *, deadline: float, as_base64: bool = False) -> list[Answer]:
        """Run a prompt to the end of all its n samples. `deadline` is in the event loop's time; `as_base64` is how rows leave."""
        with self._reported(sample):
            n = sample.options.sampling.n
            if sample.options.sampling.max_new_tokens == 0:
                return [await self._score(sample, deadline)]
            if not self._membership.has_pairs:
                return await self._answer_alone(sample, self._membership.pick_aggregated(), deadline)
            async with self._legs(sample) as (pair, bootstrap):
                body = encode_leg(sample, rid=pair.open.leg_rid, bootstrap=bootstrap, stream=False)
                async with (
                    _running(self._leg(sample, pair.prefill, body)) as prefill_leg,
                    _running(self._leg(sample, pair.decode, body, n=n)) as decode_leg,
                    self._encoding_ahead(sample, prefill_leg, as_base64=as_base64) as lead_so_far,
                ):
                    legs = [(pair.prefill, prefill_leg), (pair.decode, decode_leg)]
                    try:
                        await _until_ended([prefill_leg, decode_leg], legs, deadline, pair.open)
                    except _Unfinished as end:
                        return [combine_unfinished(sample, end.reply)] * n
                    (prefill,), decodes = prefill_leg.result(), decode_leg.result()
                    lead = await lead_so_far()
            return [await self._combined(sample, index, prefill, each, lead) for index, each in enumerate(decodes)]

    async def stream(self, sample: Sample, *, deadline: float) -> AsyncGenerator[SampleEvent, None]:
        """Run a prompt: the events of its tokens as they come, with the client's rid, and an Answer as each sample's last one.

        Close the generator when done with it (`contextlib.aclosing`).
        """
        with self._reported(sample):
            n = sample.options.sampling.n
            if sample.options.sampling.max_new_tokens == 0:
                yield SampleEvent(0, await self._score(sample, deadline))
                return
            if not self._membership.has_pairs:
                async with aclosing(self._stream_alone(sample, self._membership.pick_aggregated(), deadline)) as alone:
                    async for told in alone:
                        yield told
                return
            async with self._legs(sample) as (pair, bootstrap):
                rid = pair.open.leg_rid
                prefill_body = encode_leg(sample, rid=rid, bootstrap=bootstrap, stream=False)
                decode_body = encode_leg(sample, rid=rid, bootstrap=bootstrap, stream=True)
                async with (
                    _running(self._leg(sample, pair.prefill, prefill_body)) as prefill_leg,
                    self._encoding_ahead(sample, prefill_leg, as_base64=True) as lead_so_far,
                    aclosing(stream(self._session, pair.decode, decode_body, n=n)) as events,
                ):
                    running = set(range(n))
                    try:
                        while running:
                            event = await _next(events, pair, prefill_leg, deadline)
                            if not isinstance(event, LegReply):
                                yield SampleEvent(_index_of(event), _renamed(event, sample.rid))
                                continue
                            if is_unfinished(event):
                                raise _Unfinished(event)
                            decode = await self._arrived(sample, pair.decode, event)
                            await _until([prefill_leg], [(pair.prefill, prefill_leg)], deadline)
                            (prefill,), lead = prefill_leg.result(), await lead_so_far()
                            answer = await self._combined(sample, event.index, prefill, decode, lead)
                            yield SampleEvent(event.index, answer)
                            running.remove(event.index)
                    except _Unfinished as end:
                        for index in sorted(running):
                            yield SampleEvent(index, combine_unfinished(sample, end.reply))

    async def _score(self, sample: Sample, deadline: float) -> Answer:
        """Run a prompt that asks for no tokens, and so for one answer, on the prefill leg alone."""
        members = self._membership
        worker = members.pick_prefill() if members.has_pairs else members.pick_aggregated()
        (answer,) = await self._answer_alone(sample, worker, deadline)
        return answer

    async def _answer_alone(self, sample: Sample, worker: Worker, deadline: float) -> list[Answer]:
        """Run a prompt on one worker that needs no other one."""
        with self._alone(sample, worker) as rid:
            body = encode_leg(sample, rid=rid, bootstrap=None, stream=False)
            async with _running(fetch(self._session, worker, body, n=sample.options.sampling.n)) as leg:
                await _until([leg], [(worker, leg)], deadline)
                replies = leg.result()
        return [await self._whole(sample, worker, reply) for reply in replies]

    async def _stream_alone(self, sample: Sample, worker: Worker, deadline: float) -> AsyncGenerator[SampleEvent, None]:
        """Stream a prompt from one worker that needs no other one."""
        num_running = n = sample.options.sampling.n
        with self._alone(sample, worker) as rid:
            body = encode_leg(sample, rid=rid, bootstrap=None, stream=True)
            async with aclosing(stream(self._session, worker, body, n=n)) as events:
                while num_running:
                    event = await _next_of(events, worker, deadline)
                    if isinstance(event, LegReply):
                        num_running -= 1
                        yield SampleEvent(event.index, await self._whole(sample, worker, event))
                    else:
                        yield SampleEvent(_index_of(event), _renamed(event, sample.rid))

    async def _whole(self, sample: Sample, worker: Worker, reply: LegReply) -> Answer:
        return self._counted(await combine_whole(sample, worker.leg, await self._arrived(sample, worker, reply)))

    @contextmanager
    def _alone(self, sample: Sample, worker: Worker) -> Iterator[str]:
        """Count a worker as busy with a prompt, and name the prompt as long as it lasts; gives the rid for the worker."""
        entry = OpenSample(sample.rid, new_rid(), (worker,))
        with worker.busy(), self._registry.entered(entry):
            yield entry.leg_rid

    @asynccontextmanager
    async def _legs(self, sample: Sample) -> AsyncIterator[tuple["_Pair", Bootstrap]]:
        """Pick a pair for a prompt, and count it and name it as long as it lasts."""
        prefill, decode = self._membership.pick_prefill(), self._membership.pick_decode()
        pair = _Pair(prefill, decode, OpenSample(sample.rid, new_rid(), (prefill, decode)))
        with prefill.busy(), decode.busy(), self._registry.entered(pair.open):
            yield pair, _bootstrap(prefill, sample.options.sampling.n)

    async def _leg(self, sample: Sample, worker: Worker, body: bytes, *, n: int = 1) -> list[Arrived]:
        """Run a leg of a pair to its end. Raises _Unfinished if it was aborted before it had a token."""
        replies = await fetch(self._session, worker, body, n=n)
        if is_unfinished(replies[0]):
            raise _Unfinished(replies[0])
        return [await self._arrived(sample, worker, reply) for reply in replies]

    async def _arrived(self, sample: Sample, worker: Worker, reply: LegReply) -> Arrived:
        wants_rows = sample.options.return_routed_experts
        return await arrive(worker.leg, reply, wants_rows=wants_rows, verify_rows=self._verify_rows)

    @asynccontextmanager
    async def _encoding_ahead(
        self, sample: Sample, prefill_leg: asyncio.Task[list[Arrived]], *, as_base64: bool
    ) -> AsyncIterator[Callable[[], Awaitable[Lead]]]:
        """Encode the prefill leg's rows once it has ended; gives a function that stops this, and returns what there is."""
        if not (as_base64 and sample.options.return_routed_experts):
            yield _no_lead
            return
        form, is_over = sample.options.routed_experts_dtype, asyncio.Event()
        async with _running(self._lead_encoder.encode(prefill_leg, form, is_over)) as encoding:

            async def lead_so_far() -> Lead:
                is_over.set()
                return await encoding

            yield lead_so_far

    async def _combined(self, sample: Sample, index: int, prefill: Arrived, decode: Arrived, lead: Lead) -> Answer:
        return self._counted(await combine_pair(sample, index, prefill, decode, lead))

    def _counted(self, answer: Answer) -> Answer:
        if answer.rows is not None:
            self._metrics.rows_returned.inc(answer.rows.header.shape[0])
        return answer

    @contextmanager
    def _reported(self, sample: Sample) -> Iterator[None]:
        try:
            yield
        except TandemError as error:
            report = ErrorReport.of(error)
            self._metrics.failures.labels(report.leg or "none", report.code).inc()
            raise ReportedError(replace(report, rid=sample.rid)) from error


class _Unfinished(Exception):
    """A leg was ended before it had a token, because somebody asked for it: that is its prompt's answer."""

    def __init__(self, reply: LegReply) -> None:
        super().__init__("aborted before the first token")
        self.reply = reply


class _Pair(NamedTuple):
    prefill: Worker
    decode: Worker
    open: OpenSample


async def _no_lead() -> Lead:
    return Lead()


def _bootstrap(prefill: Worker, n: int) -> Bootstrap:
    assert prefill.bootstrap_port is not None, f"{prefill.url} is no prefill worker"
    return Bootstrap(prefill.host, prefill.bootstrap_port, tuple(new_room() for _ in range(n)))


def _index_of(event: Reply) -> int:
    index = event.pop("index", 0)
    assert isinstance(index, int)
    return index


def _renamed(event: Reply, rid: str) -> Reply:
    """Put the client's rid in the place of the leg's."""
    meta = event["meta_info"]
    assert isinstance(meta, dict)
    meta["id"] = rid
    return event


@asynccontextmanager
async def _running(awaitable: Awaitable[Result]) -> AsyncIterator[asyncio.Task[Result]]:
    """Run an awaitable as a task, which has ended when the block is left, cancelled if need be."""
    task = asyncio.ensure_future(awaitable)
    try:
        yield task
    finally:
        if task.cancel():
            await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # a failure that comes second goes unreported: the first one was not


async def _until(
    needed: Sequence[asyncio.Task[Any]], legs: Sequence[tuple[Worker, asyncio.Task[Any]]], deadline: float
) -> None:
    """Wait until all `needed` tasks have ended well. Raises any leg's failure at once, and DeadlineExceeded."""
    while not all(task.done() for task in needed):
        pending = [(worker, task) for worker, task in legs if not task.done()]
        remaining_s = deadline - asyncio.get_running_loop().time()
        if remaining_s <= 0:
            raise _too_late([worker for worker, _ in pending])
        await asyncio.wait([task for _, task in pending], timeout=remaining_s, return_when=asyncio.FIRST_COMPLETED)
        for _, task in legs:
            if task.done():
                task.result()


async def _until_ended(
    needed: Sequence[asyncio.Task[Any]],
    legs: Sequence[tuple[Worker, asyncio.Task[Any]]],
    deadline: float,
    sample: OpenSample,
) -> None:
    """Wait as `_until` does; but of a prompt that is being aborted, one leg's failure is not the end.

    The abort reaches one leg before the other, which may see no more than that the first one is gone. The answer is then the
    first one's, if that was ended before it had a token.
    """
    try:
        await _until(needed, legs, deadline)
    except TandemError:
        if not sample.is_aborted:
            raise
        for worker, task in legs:
            with suppress(TandemError):
                await _until([task], [(worker, task)], deadline)
                task.result()
        if not all(task.done() and task.exception() is None for task in needed):
            raise


async def _next(
    events: AsyncGenerator[Reply | LegReply, None],
    pair: _Pair,
    prefill_leg: asyncio.Task[list[Arrived]],
    deadline: float,
) -> Reply | LegReply:
    """Wait for the decode leg's next event, or for the prefill leg's failure."""
    if not prefill_leg.done():
        async with _running(anext(events)) as coming:
            legs: list[tuple[Worker, asyncio.Task[Any]]] = [(pair.prefill, prefill_leg), (pair.decode, coming)]
            await _until_ended([coming], legs, deadline, pair.open)
            return coming.result()
    prefill_leg.result()
    # Nearly all events come after the prefill leg has answered, and need no task of their own.
    return await _next_of(events, pair.decode, deadline)


async def _next_of(events: AsyncGenerator[Reply | LegReply, None], worker: Worker, deadline: float) -> Reply | LegReply:
    """Wait for a worker's next event."""
    try:
        async with asyncio.timeout_at(deadline):
            return await anext(events)
    except TimeoutError as error:
        raise _too_late([worker]) from error


def _too_late(waiting_for: Sequence[Worker]) -> DeadlineExceeded:
    places = ", ".join(f"the {worker.label}" for worker in waiting_for)
    return DeadlineExceeded(
        f"the request's deadline passed, waiting for {places}", leg=waiting_for[0].leg, stage="request"
    )
