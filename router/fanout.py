"""Asking workers, and telling all of them something at once; what each has answered, and what that comes to.

Neighbours: `control`, `pause_api` and `orders_api` (the routes that need it), `aborts`.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

import aiohttp
from aiohttp import web
from msgspec import Struct

from router.legs import read_at_most
from router.membership import Membership
from router.worker import Worker

_MAX_ANSWER_BYTES = 2**24

Body = bytes | AsyncIterator[bytes] | None


class WorkerAnswer(Struct, frozen=True):
    """What one worker answered: its status, None if it did not in time, and its body if that is JSON."""

    worker: Worker
    status: int | None
    body: object = None

    @property
    def is_good(self) -> bool:
        """Say whether the worker did what it was asked for."""
        return self.status == 200

    @property
    def fields(self) -> Mapping[str, object]:
        """The body's fields; none if it is no object."""
        return self.body if isinstance(self.body, dict) else {}

    @property
    def message(self) -> str:
        """What the worker says of how it went."""
        error = self.fields.get("error")
        said = error.get("message") if isinstance(error, dict) else self.fields.get("message")
        return said if isinstance(said, str) else ""

    def report(self) -> dict[str, object]:
        """Make the worker's entry in an answer."""
        return {
            "url": self.worker.url,
            "worker_type": self.worker.role,
            "status": "unreachable" if self.status is None else self.status,
        }


class Fanout:
    """Speaks to the workers of one router."""

    def __init__(self, session: aiohttp.ClientSession, membership: Membership) -> None:
        self._session = session
        self._membership = membership

    async def ask_all(self, path: str, deadline_s: float) -> list[WorkerAnswer]:
        """GET a route of every worker."""
        return await self._of_all(lambda worker: self.call("GET", worker, path, deadline_s=deadline_s))

    async def tell_all(self, path: str, body: Mapping[str, object], deadline_s: float) -> list[WorkerAnswer]:
        """POST the same JSON to every worker."""
        return await self.send_all(path, lambda _: json.dumps(body).encode(), deadline_s=deadline_s)

    async def send_all(
        self,
        path: str,
        body_for: Callable[[Worker], Body],
        *,
        deadline_s: float,
        headers: Mapping[str, str] | None = None,
    ) -> list[WorkerAnswer]:
        """POST to all workers at the same time: what they do together, none of them ends before the others have begun."""
        return await self._of_all(
            lambda worker: self.call(
                "POST", worker, path, body=body_for(worker), headers=headers, deadline_s=deadline_s
            )
        )

    async def call(
        self,
        method: str,
        worker: Worker,
        path: str,
        *,
        deadline_s: float,
        body: Body = None,
        headers: Mapping[str, str] | None = None,
    ) -> WorkerAnswer:
        """Ask one worker; bodies are JSON unless the headers say otherwise."""
        timeout = aiohttp.ClientTimeout(total=deadline_s)
        if body is not None and headers is None:
            headers = {"Content-Type": "application/json"}
        try:
            async with self._session.request(
                method, worker.url + path, data=body, headers=headers, timeout=timeout
            ) as response:
                answer = await read_at_most(response.content, _MAX_ANSWER_BYTES)
        except (aiohttp.ClientError, OSError, TimeoutError):
            return WorkerAnswer(worker, None)
        try:
            return WorkerAnswer(worker, response.status, json.loads(answer))
        except (ValueError, RecursionError):
            return WorkerAnswer(worker, response.status)

    async def _of_all(self, ask: Callable[[Worker], Awaitable[WorkerAnswer]]) -> list[WorkerAnswer]:
        return await asyncio.gather(*map(ask, self._membership.workers))


def status_of(answers: Sequence[WorkerAnswer]) -> int:
    """Give 200 if all workers did as they were told, 400 if one refused, else 502."""
    statuses = [answer.status for answer in answers]
    if all(status == 200 for status in statuses):
        return 200
    return 400 if any(status is not None and 400 <= status < 500 for status in statuses) else 502


def outcome(answers: Sequence[WorkerAnswer], body: Mapping[str, object]) -> web.Response:
    """Answer with the status that theirs come to."""
    status = status_of(answers)
    return web.json_response({"status": "ok" if status == 200 else "failed", **body}, status=status)
