"""What every route that generates has alike: each request is counted, timed and has a deadline.

It knows no body. The server must run with handler cancellation: a client that leaves cancels its handler, and thereby both
legs of all its samples. Neighbours: `generate_api` and `openai_api` (their handlers run in here), `metrics`, `drain`.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import aiohttp
from aiohttp import web
from aiohttp.typedefs import Handler

from common.errors import TandemError
from common.messages import ErrorReport
from router.drain import Drain
from router.metrics import RouterMetrics

CLIENT_GONE = 499


class Times(NamedTuple):
    """When a request came and when it must have ended, in the event loop's time."""

    started: float
    deadline: float


Respond = Callable[[web.Request, Times], Awaitable[tuple[web.StreamResponse, int]]]
"""Answers a request, and says which status tells how it went: a stream's failure comes after its 200."""


class Intake:
    """Runs requests, and counts how they went."""

    def __init__(self, deadline_s: float, metrics: RouterMetrics, drain: Drain) -> None:
        self._deadline_s = deadline_s
        self._metrics = metrics
        self._drain = drain

    def handler(self, respond: Respond) -> Handler:
        """Make a route's handler."""

        async def handle(request: web.Request) -> web.StreamResponse:
            return await self._run(request, respond)

        return handle

    async def _run(self, request: web.Request, respond: Respond) -> web.StreamResponse:
        loop = asyncio.get_running_loop()
        started = loop.time()
        status = 500
        self._metrics.running.inc()
        try:
            with self._drain.entered():
                response, status = await respond(request, Times(started, started + self._deadline_s))
        except TandemError as error:
            status = ErrorReport.of(error).status
            raise
        except (asyncio.CancelledError, aiohttp.ClientConnectionResetError):
            status = CLIENT_GONE
            raise
        except web.HTTPException as error:
            status = error.status
            raise
        else:
            return response
        finally:
            self._metrics.running.dec()
            self._metrics.requests.labels(str(status)).inc()
            self._metrics.request_seconds.observe(loop.time() - started)
