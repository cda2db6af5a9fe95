"""The load: so many requests at a time, of mixed shapes; some are aborted, some left, each at a random moment of its life.

Neighbours: `cases` and `client` (what is sent, and how), `judge` (gives each its verdict).
"""

import asyncio
import random
from collections.abc import Sequence

from deploy.client import TandemClient
from deploy.connection import NO_RETRIES
from deploy.soak.cases import Case
from deploy.soak.client import Job, abort, send
from deploy.soak.judge import Verdict, judge

LONGEST_PATIENCE_S = 1.0
"""A request that is aborted or left lives for a part of this."""
LONGEST_PAUSE_S = 0.5
"""A client whose request failed makes the next one after a part of this, as one would that does not want to make it worse."""


class Load:
    """Runs requests until it is told to stop; `verdicts` are of those that have ended, in that order."""

    def __init__(self, url: str, cases: Sequence[Case], *, seed: int, concurrency: int, deadline_s: float) -> None:
        self.verdicts: list[Verdict] = []
        self._url = url
        self._cases = cases
        self._rng = random.Random(f"{seed} load")
        self._concurrency = concurrency
        self._deadline_s = deadline_s
        self._num_requests = 0
        self._is_over = False

    async def run(self) -> None:
        """Keep the requests coming; returns once `stop` was called and the last request has ended."""
        self._began = asyncio.get_running_loop().time()
        async with (
            TandemClient(self._url, deadline_s=self._deadline_s, retries=NO_RETRIES) as client,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(self._concurrency):
                group.create_task(self._one_after_another(client))

    def stop(self) -> None:
        """Begin no more requests."""
        self._is_over = True

    async def _one_after_another(self, client: TandemClient) -> None:
        while not self._is_over:
            verdict = await self._request(client)
            self.verdicts.append(verdict)
            if verdict.end in ("failed", "unnamed"):
                await asyncio.sleep(self._rng.random() * LONGEST_PAUSE_S)

    async def _request(self, client: TandemClient) -> Verdict:
        job = self._draw()
        fate = self._rng.choices(("let be", "abort", "leave"), (8, 1, 1))[0]
        patience_s = self._rng.random() * LONGEST_PATIENCE_S
        sending = asyncio.create_task(send(client, job))
        if fate != "let be":
            await asyncio.wait([sending], timeout=patience_s)
        is_aborted = fate == "abort" and not sending.done()
        if fate == "leave" and not sending.done():
            sending.cancel()
            await asyncio.wait([sending])
            return Verdict(rid=job.rid, end="left", at_s=self._passed_s(), is_ours=True)
        if is_aborted and not await abort(client, job):
            sending.cancel()
            detail = "/abort_request was not answered"
            return Verdict(rid=job.rid, end="hung", at_s=self._passed_s(), is_ours=True, detail=detail)
        received = await sending
        return judge(job, received, is_aborted=is_aborted, at_s=self._passed_s())

    def _draw(self) -> Job:
        rng = self._rng
        self._num_requests += 1
        is_list = rng.random() < 0.2
        cases = rng.sample(self._cases, 2 if is_list else 1)
        shortest = min(len(case.prompt) for case in cases)
        return Job(
            # No rid is the beginning of another's, by which an abort would find it too.
            rid=f"soak-{self._num_requests:08d}",
            cases=cases,
            is_list=is_list,
            n=rng.choice((1, 1, 1, 2)),
            form=rng.choice(("json", "msgpack", "stream")),
            dtype=rng.choice(("int32", "auto")),
            start=rng.choice((0, 0, rng.randint(0, shortest))),
        )

    def _passed_s(self) -> float:
        return asyncio.get_running_loop().time() - self._began
