"""The router's HTTP side: POST /generate, and errors as the contract's bodies.

A request is refused here, or handed to `pair`, one call a sample. The server must run with handler cancellation: a
client that leaves cancels its handler, and thereby both legs of all its samples. Neighbours: `replies` (bodies),
`streaming` (event streams), `control` (the other routes), `process` (runs this).
"""

import asyncio

import aiohttp
from aiohttp import web

from common.errors import TandemError
from common.messages import ErrorReport
from common.protocol.generate import GenerateCall, parse_generate
from common.protocol.replies import MSGPACK, wants_msgpack
from common.server.http import answer_errors, together
from router.config import RouterConfig
from router.control import Control
from router.legs import make_session
from router.membership import Membership
from router.metrics import RouterMetrics
from router.pair import Pairs
from router.replies import msgpack_body, send_json
from router.streaming import send_stream

CLIENT_GONE = 499


async def create_app(config: RouterConfig) -> web.Application:
    """Make the router's application, for the running event loop. It closes its connections when it is cleaned up."""
    session = make_session(connect_deadline_s=config.router.connect_deadline_s)
    membership = Membership(config.router)
    metrics = RouterMetrics(membership)
    pairs = Pairs(session, membership, metrics, verify_rows=config.router.verify_rows)

    async def close_session(_: web.Application) -> None:
        await session.close()

    app = web.Application(client_max_size=config.server.max_body_bytes, middlewares=[answer_errors()])
    app.on_cleanup.append(close_session)
    app.router.add_post("/generate", _GenerateRoute(config.server.request_deadline_s, pairs, metrics).handle)
    app.add_routes(Control(config, session, membership, pairs, metrics).routes())
    return app


class _GenerateRoute:
    """POST /generate."""

    def __init__(self, deadline_s: float, pairs: Pairs, metrics: RouterMetrics) -> None:
        self._deadline_s = deadline_s
        self._pairs = pairs
        self._metrics = metrics

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer, and count how it went."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        status = 500
        self._metrics.running.inc()
        try:
            response, status = await self._respond(request, started)
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

    async def _respond(self, request: web.Request, started: float) -> tuple[web.StreamResponse, int]:
        """Answer, and say which status tells how it went: a stream's failure comes after its 200."""
        call = parse_generate(await request.read())
        as_msgpack = wants_msgpack(request.headers.get("Accept"), stream=call.stream)
        deadline = started + self._deadline_s
        if call.stream:
            return await send_stream(request, call, self._pairs, started=started, deadline=deadline)
        return await self._send_whole(request, call, as_msgpack, started, deadline), 200

    async def _send_whole(
        self, request: web.Request, call: GenerateCall, as_msgpack: bool, started: float, deadline: float
    ) -> web.StreamResponse:
        answers = await together([self._pairs.answer(sample, deadline=deadline) for sample in call.samples])
        latency_s = asyncio.get_running_loop().time() - started
        if as_msgpack:
            body = msgpack_body(call.samples, answers, is_list=call.is_list, e2e_latency_s=latency_s)
            return web.Response(body=body, content_type=MSGPACK)
        return await send_json(request, call.samples, answers, is_list=call.is_list, e2e_latency_s=latency_s)
