"""Ending legs on their workers: of prompts that somebody aborts, and, in the background, those that nobody waits for any more.

Closing a leg's connection says the latter too, but not to a worker that is stopped, or behind a proxy; and nobody waits for the
answers. Neighbours: `attempts` (says which legs), `control` and `pause_api` (abort prompts), `fanout`, `app` (closes this).
"""

import asyncio
import json
from collections.abc import Sequence

from router.fanout import Fanout, WorkerAnswer
from router.registry import OpenSample
from router.worker import Worker

# A leg that its worker does not know may just be on its way there.
_PAUSES_S = (0.01, 0.05, 0.25, 1.0)


class Aborts:
    """Sends POST /abort_request for single legs."""

    def __init__(self, fanout: Fanout, *, deadline_s: float) -> None:
        self._fanout = fanout
        self._deadline_s = deadline_s
        # The event loop itself keeps no task alive.
        self._sending: set[asyncio.Task[WorkerAnswer]] = set()

    def send(self, worker: Worker, rid: str) -> None:
        """Have a worker end a leg."""
        task = asyncio.create_task(self._ask(worker, rid))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def end(self, samples: Sequence[OpenSample]) -> list[tuple[OpenSample, WorkerAnswer]]:
        """Have prompts end with what they have; gives what the workers of their legs say to that."""
        for sample in samples:
            sample.aborted.set()
        legs = [
            (sample, rid, worker) for sample in samples for rid, workers in sample.legs.items() for worker in workers
        ]
        answers = await asyncio.gather(*(self._end(*leg) for leg in legs))
        return [(sample, answer) for (sample, _, _), answer in zip(legs, answers, strict=True)]

    async def close(self) -> None:
        """Give up what has not been sent yet."""
        for task in self._sending:
            task.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)

    async def _end(self, sample: OpenSample, rid: str, worker: Worker) -> WorkerAnswer:
        for pause_s in _PAUSES_S:
            answer = await self._ask(worker, rid)
            if answer.fields.get("aborted") != [] or rid not in sample.legs:
                return answer
            await asyncio.sleep(pause_s)
        return await self._ask(worker, rid)

    async def _ask(self, worker: Worker, rid: str) -> WorkerAnswer:
        body = json.dumps({"rid": rid}).encode()
        return await self._fanout.call("POST", worker, "/abort_request", body=body, deadline_s=self._deadline_s)
