"""One sample over one pair of workers: both legs at once, and the failure of one is the end of both.

    answer   prefill ----------> reply \\
             decode  ----------------------> reply -> combine -> Answer
    stream   prefill ----------> reply ............\\
             decode  --> event --> event --> last -> combine -> Answer

It knows no client and no reply format. Neighbours: `legs` (one leg), `combine` (joins the replies), `membership` (the
workers), `app` (asks).
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any, TypeVar

import aiohttp
from msgspec.structs import replace

from common.errors import DeadlineExceeded, TandemError
from common.ids import new_rid, new_room
from common.messages import Bootstrap, ErrorReport, ReportedError
from common.protocol.generate import Sample
from common.protocol.legs import LegReply, encode_leg
from common.protocol.replies import Reply
from router.combine import Answer, combine_pair, combine_score
from router.legs import fetch, stream
from router.membership import Membership, Worker
from router.metrics import RouterMetrics

Result = TypeVar("Result")


class Pairs:
    """Runs samples over pairs. Whatever goes wrong is raised as ReportedError, with the sample's rid."""

    def __init__(
        self, session: aiohttp.ClientSession, membership: Membership, metrics: RouterMetrics, *, verify_rows: bool
    ) -> None:
        self._session = session
        self._membership = membership
        self._metrics = metrics
        self._verify_rows = verify_rows

    async def answer(self, sample: Sample, *, deadline: float) -> Answer:
        """Run a sample to its end. `deadline` is in the event loop's time."""
        with self._reported(sample):
            if sample.options.sampling.max_new_tokens == 0:
                return await self._score(sample, deadline)
            prefill, decode = self._membership.pick_prefill(), self._membership.pick_decode()
            body = encode_leg(sample, rid=new_rid(), bootstrap=_bootstrap(prefill), stream=False)
            with prefill.busy(), decode.busy():
                async with (
                    _running(fetch(self._session, prefill, body)) as prefill_leg,
                    _running(fetch(self._session, decode, body)) as decode_leg,
                ):
                    legs = [(prefill, prefill_leg), (decode, decode_leg)]
                    await _until([prefill_leg, decode_leg], legs, deadline)
                    replies = prefill_leg.result(), decode_leg.result()
            return self._counted(await combine_pair(sample, *replies, verify_rows=self._verify_rows))

    async def stream(self, sample: Sample, *, deadline: float) -> AsyncGenerator[Reply | Answer, None]:
        """Run a sample: the decode leg's events as they come, with the client's rid, and an Answer as the last one.

        Close the generator when done with it (`contextlib.aclosing`).
        """
        with self._reported(sample):
            if sample.options.sampling.max_new_tokens == 0:
                yield await self._score(sample, deadline)
                return
            prefill, decode = self._membership.pick_prefill(), self._membership.pick_decode()
            rid, bootstrap = new_rid(), _bootstrap(prefill)
            prefill_body = encode_leg(sample, rid=rid, bootstrap=bootstrap, stream=False)
            decode_body = encode_leg(sample, rid=rid, bootstrap=bootstrap, stream=True)
            with prefill.busy(), decode.busy():
                async with (
                    _running(fetch(self._session, prefill, prefill_body)) as prefill_leg,
                    aclosing(stream(self._session, decode, decode_body)) as events,
                ):
                    while not isinstance(
                        event := await _next(events, decode, prefill, prefill_leg, deadline), LegReply
                    ):
                        yield _renamed(event, sample.rid)
                    await _until([prefill_leg], [(prefill, prefill_leg)], deadline)
                    reply = prefill_leg.result()
            yield self._counted(await combine_pair(sample, reply, event, verify_rows=self._verify_rows))

    async def _score(self, sample: Sample, deadline: float) -> Answer:
        """Run a sample that asks for no tokens, on the prefill leg alone."""
        prefill = self._membership.pick_prefill()
        body = encode_leg(sample, rid=new_rid(), bootstrap=None, stream=False)
        with prefill.busy():
            async with _running(fetch(self._session, prefill, body)) as leg:
                await _until([leg], [(prefill, leg)], deadline)
                reply = leg.result()
        return self._counted(await combine_score(sample, reply, verify_rows=self._verify_rows))

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


def _bootstrap(prefill: Worker) -> Bootstrap:
    assert prefill.bootstrap_port is not None, f"{prefill.url} is no prefill worker"
    return Bootstrap(prefill.host, prefill.bootstrap_port, new_room())


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
        task.cancel()
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


async def _next(
    events: AsyncGenerator[Reply | LegReply, None],
    decode: Worker,
    prefill: Worker,
    prefill_leg: asyncio.Task[LegReply],
    deadline: float,
) -> Reply | LegReply:
    """Wait for the decode leg's next event, or for the prefill leg's failure."""
    if not prefill_leg.done():
        async with _running(anext(events)) as coming:
            await _until([coming], [(prefill, prefill_leg), (decode, coming)], deadline)
            return coming.result()
    prefill_leg.result()
    # Nearly all events come after the prefill leg has answered, and need no task of their own.
    try:
        async with asyncio.timeout_at(deadline):
            return await anext(events)
    except TimeoutError as error:
        raise _too_late([decode]) from error


def _too_late(waiting_for: Sequence[Worker]) -> DeadlineExceeded:
    places = ", ".join(f"the {worker.role} leg on {worker.url}" for worker in waiting_for)
    return DeadlineExceeded(
        f"the request's deadline passed, waiting for {places}", leg=waiting_for[0].role, stage="request"
    )
