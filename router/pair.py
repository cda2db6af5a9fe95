"""One attempt over one pair of workers: both legs at once, and the failure of one is the end of both.

    answer   prefill ----------> reply, encode ahead \\
             decode  ------------------------> reply -> combine -> Answer
    stream   prefill ----------> reply, encode ahead .\\
             decode  --> event --> event --> last -> combine -> Answer

The prefill leg runs once for all n samples of the prompt, and the decode leg runs all of them. A prompt that somebody
aborts (`aborts`) ends with what its legs have, and so does one that is retracted, to go on later (`resume`). This knows no
client, and of the reply's format only whether its rows are base64. Neighbours: `attempts` (picks the workers, and tries again),
`alone` (the same over one worker), `legs` and `leg_run` (one leg), `ahead` (rows as they arrive), `combine` (joins the replies).
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any, TypeVar

from common.errors import TandemError
from common.ids import new_room
from common.messages import Bootstrap
from common.protocol.generate import Sample
from common.protocol.legs import LegReply, encode_leg
from common.protocol.replies import Reply
from router.ahead import Arrived, Lead, LeadEncoder, arrive
from router.combine import Answer, combine_pair, combine_unfinished
from router.config import RouterOptions
from router.events import SampleEvent, progress_event
from router.leg_run import Attempt, LegRun
from router.legs import Legs

Result = TypeVar("Result")


class Pairs:
    """Runs attempts that have two legs."""

    def __init__(self, legs: Legs, options: RouterOptions) -> None:
        self._legs = legs
        self._options = options
        self._lead_encoder = LeadEncoder()

    async def answer(self, attempt: Attempt, *, as_base64: bool) -> list[Answer]:
        """Run a prompt to the end of all its n samples. `as_base64` is how rows leave."""
        sample, (prefill, decode) = attempt.sample, attempt.runs
        n = sample.options.sampling.n
        bootstrap = _bootstrap(prefill, n)
        prefill_body = decode_body = encode_leg(sample, "prefill", rid=attempt.rid, bootstrap=bootstrap, stream=False)
        if sample.options.data_parallel_rank is not None:
            decode_body = encode_leg(sample, "decode", rid=attempt.rid, bootstrap=bootstrap, stream=False)
        prefill.expect("prefill", self._options.prefill_deadline_s)
        async with (
            _running(self._leg(sample, prefill, prefill_body)) as prefill_leg,
            _running(self._leg(sample, decode, decode_body, n=n)) as decode_leg,
            self._encoding_ahead(sample, prefill_leg, as_base64=as_base64) as lead_so_far,
        ):
            legs = [prefill_leg, decode_leg]
            try:
                await _until_ended(legs, legs, attempt)
            except _Unfinished as end:
                return [combine_unfinished(sample, await _furthest_behind(end, prefill_leg))] * n
            (prompt,), decodes = prefill_leg.result(), decode_leg.result()
            lead = await lead_so_far()
        return [await combine_pair(sample, index, prompt, each, lead) for index, each in enumerate(decodes)]

    async def stream(self, attempt: Attempt) -> AsyncGenerator[SampleEvent, None]:
        """Run a prompt: the events of its tokens as they come, with the client's rid, and an Answer as each sample's last one.

        Close the generator when done with it (`contextlib.aclosing`).
        """
        sample, (prefill, decode) = attempt.sample, attempt.runs
        n = sample.options.sampling.n
        bootstrap = _bootstrap(prefill, n)
        prefill_body = encode_leg(sample, "prefill", rid=attempt.rid, bootstrap=bootstrap, stream=False)
        decode_body = encode_leg(sample, "decode", rid=attempt.rid, bootstrap=bootstrap, stream=True)
        prefill.expect("prefill", self._options.prefill_deadline_s)
        async with (
            _running(self._leg(sample, prefill, prefill_body)) as prefill_leg,
            self._encoding_ahead(sample, prefill_leg, as_base64=True) as lead_so_far,
            aclosing(self._legs.stream(decode, decode_body, n=n)) as events,
        ):
            prefill_leg.add_done_callback(lambda _: self._expect_first_token(decode))
            running = set(range(n))
            try:
                while running:
                    event = await self._next(events, attempt, prefill_leg)
                    if not isinstance(event, LegReply):
                        yield progress_event(event, sample.rid)
                        continue
                    if event.is_unfinished and not event.is_retracted:
                        raise _Unfinished(event)
                    if event.is_unfinished:
                        answer = combine_unfinished(sample, event)
                    else:
                        arrived = await self._arrived(sample, decode, event)
                        await _until([prefill_leg], [prefill_leg])
                        (prompt,), lead = prefill_leg.result(), await lead_so_far()
                        answer = await combine_pair(sample, event.index, prompt, arrived, lead)
                    yield SampleEvent(event.index, answer)
                    running.remove(event.index)
            except _Unfinished as end:
                behind = await _furthest_behind(end, prefill_leg)
                for index in sorted(running):
                    yield SampleEvent(index, combine_unfinished(sample, behind))

    async def _leg(self, sample: Sample, run: LegRun, body: bytes, *, n: int = 1) -> list[Arrived]:
        """Run a leg that does not stream to its end. Raises _Unfinished if it was ended before it had a token."""
        replies = await run.wait(self._legs.fetch(run, body, n=n))
        if all(reply.is_unfinished for reply in replies):
            raise _Unfinished(replies[0])
        return [await self._arrived(sample, run, reply) for reply in replies]

    async def _arrived(self, sample: Sample, run: LegRun, reply: LegReply) -> Arrived:
        wants_rows, verify_rows = sample.options.return_routed_experts, self._options.verify_rows
        return await arrive(run.worker.leg, reply, wants_rows=wants_rows, verify_rows=verify_rows)

    def _expect_first_token(self, decode: LegRun) -> None:
        """From the prefill leg's end on the decode leg has nobody left to wait for."""
        if not decode.has_begun:
            decode.expect("first_token", self._options.first_token_deadline_s)

    async def _next(
        self,
        events: AsyncGenerator[Reply | LegReply, None],
        attempt: Attempt,
        prefill_leg: asyncio.Task[list[Arrived]],
    ) -> Reply | LegReply:
        """Wait for the decode leg's next event, or for the prefill leg's failure."""
        (_, decode), idle_s = attempt.runs, self._options.idle_deadline_s
        if not prefill_leg.done():
            async with _running(decode.next_of(events, idle_s)) as coming:
                await _until_ended([coming], [prefill_leg, coming], attempt)
                return coming.result()
        prefill_leg.result()
        # Nearly all events come after the prefill leg has answered, and need no task of their own.
        return await decode.next_of(events, idle_s)

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


class _Unfinished(Exception):
    """A leg was ended before it had a token, because somebody asked for it, for good or for later: that is its prompt's answer."""

    def __init__(self, reply: LegReply) -> None:
        super().__init__("ended before the first token")
        self.reply = reply


async def _furthest_behind(end: _Unfinished, prefill_leg: asyncio.Task[list[Arrived]]) -> LegReply:
    """Give the end that says where the prompt was: the prefill leg's, if that leg too was ended before it had a token.

    The abort has reached one leg, and so is on its way to the other. A prompt that starts again need not know.
    """
    if end.reply.is_retracted:
        return end.reply
    try:
        await _until([prefill_leg], [prefill_leg])
        prefill_leg.result()
    except _Unfinished as earlier:
        return earlier.reply
    except TandemError:
        pass
    return end.reply


async def _no_lead() -> Lead:
    return Lead()


def _bootstrap(prefill: LegRun, n: int) -> Bootstrap:
    """Draw the rooms of n samples, all of which lead to the worker's group with the fewest legs."""
    worker, group = prefill.worker, prefill.take_group()
    assert worker.bootstrap_port is not None, f"{worker.url} is no prefill worker"
    return Bootstrap(worker.host, worker.bootstrap_port, tuple(new_room(group, worker.dp_size) for _ in range(n)))


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


async def _until(needed: Sequence[asyncio.Task[Any]], legs: Sequence[asyncio.Task[Any]]) -> None:
    """Wait until all `needed` tasks have ended well. Raises any leg's failure at once. The legs bound themselves."""
    while not all(task.done() for task in needed):
        await asyncio.wait([task for task in legs if not task.done()], return_when=asyncio.FIRST_COMPLETED)
        for task in legs:
            if task.done():
                task.result()


async def _until_ended(
    needed: Sequence[asyncio.Task[Any]], legs: Sequence[asyncio.Task[Any]], attempt: Attempt
) -> None:
    """Wait as `_until` does; but of a prompt that is being aborted, one leg's failure is not the end.

    The abort reaches one leg before the other, which may see no more than that the first one is gone. The answer is then the
    first one's, if that was ended before it had a token.
    """
    try:
        await _until(needed, legs)
    except TandemError:
        if not attempt.open.is_aborted:
            raise
        for task in legs:
            with suppress(TandemError):
                await _until([task], [task])
                task.result()
        if not all(task.done() and task.exception() is None for task in needed):
            raise
