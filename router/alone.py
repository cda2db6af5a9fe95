"""One attempt over one worker that needs no other: an aggregated one, or the prefill worker of a prompt that is only scored.

It knows no client. Neighbours: `pair` (the same over two workers), `attempts` (calls both), `legs`, `combine`.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from common.protocol.legs import LegReply, encode_leg
from router.ahead import arrive
from router.combine import Answer, combine_whole
from router.config import RouterOptions
from router.events import SampleEvent, progress_event
from router.leg_run import Attempt
from router.legs import Legs


class Alone:
    """Runs attempts that have one leg."""

    def __init__(self, legs: Legs, options: RouterOptions) -> None:
        self._legs = legs
        self._options = options

    async def answer(self, attempt: Attempt) -> list[Answer]:
        """Run a prompt to the end of all its n samples."""
        (run,) = attempt.runs
        body = encode_leg(attempt.sample, run.worker.leg, rid=attempt.rid, bootstrap=None, stream=False)
        if run.worker.role == "prefill":
            run.expect("prefill", self._options.prefill_deadline_s)
        replies = await run.wait(self._legs.fetch(run, body, n=attempt.sample.options.sampling.n))
        return [await self._whole(attempt, reply) for reply in replies]

    async def stream(self, attempt: Attempt) -> AsyncGenerator[SampleEvent, None]:
        """Run a prompt: its events as they come, and an Answer as each sample's last one."""
        (run,), sample = attempt.runs, attempt.sample
        if sample.options.sampling.max_new_tokens == 0:
            (answer,) = await self.answer(attempt)
            yield SampleEvent(0, answer)
            return
        num_running = n = sample.options.sampling.n
        body = encode_leg(sample, run.worker.leg, rid=attempt.rid, bootstrap=None, stream=True)
        run.expect("first_token", self._options.first_token_deadline_s)
        async with aclosing(self._legs.stream(run, body, n=n)) as events:
            while num_running:
                event = await run.next_of(events, self._options.idle_deadline_s)
                if isinstance(event, LegReply):
                    num_running -= 1
                    yield SampleEvent(event.index, await self._whole(attempt, event))
                else:
                    yield progress_event(event, sample.rid)

    async def _whole(self, attempt: Attempt, reply: LegReply) -> Answer:
        (run,), wants_rows = attempt.runs, attempt.sample.options.return_routed_experts
        leg, verify_rows = run.worker.leg, self._options.verify_rows
        arrived = await arrive(leg, reply, wants_rows=wants_rows, verify_rows=verify_rows)
        return await combine_whole(attempt.sample, leg, arrived)
