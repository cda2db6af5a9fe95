"""What every HTTP process does alike: errors as the contract's bodies, the API key, several samples at once, serving.

Neighbours: `common.server.app` and `router.app`, which differ in everything else; `bodies` (large replies). It reaches no
torch and no tokenizer, so that the router may use it.
"""

import asyncio
import hmac
import logging
import signal
from collections.abc import Coroutine, Sequence
from typing import Final, TypeVar

import aiohttp
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from common.config import ServerOptions
from common.errors import TandemError
from common.messages import ErrorReport, Leg
from common.protocol.replies import error_body
from common.server.bodies import Body
from common.server.writing import WRITE_DEADLINE_S, ClientWriter

log = logging.getLogger(__name__)

Result = TypeVar("Result")

TAKES_NO_MORE: Final = frozenset(("draining", "crowded", "released"))
"""What `status` is in the 503 of a /health whose process takes no new requests, and goes on with those that it has."""

_OPEN_PATHS: Final = frozenset(("/health", "/metrics"))
_RETRY_AFTER_S: Final = 1


def make_application(options: ServerOptions, leg: Leg | None = None) -> web.Application:
    """Make an application without routes that refuses, fails and writes as all of ours do."""
    app = web.Application(
        client_max_size=options.max_body_bytes, middlewares=[answer_errors(leg), require_key(options.api_key)]
    )
    app[WRITE_DEADLINE_S] = options.write_deadline_s
    return app


def answer_errors(leg: Leg | None = None) -> Middleware:
    """Make the middleware that gives every refusal and every defect the contract's body: nothing goes unanswered."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            code = "not_found" if error.status == 404 else "invalid_request"
            report = ErrorReport(status=error.status, message=error.text or error.reason, code=code, leg=leg)
        except aiohttp.ClientConnectionResetError as error:
            # The client is gone: there is nobody to answer, and nothing to report.
            raise asyncio.CancelledError from error
        except TandemError as error:
            report = ErrorReport.of(error, leg=leg)
            log.warning("request %s failed with %d: %s", report.rid, report.status, report.message)
        except Exception as error:
            log.exception("a defect at %s", request.path)
            report = ErrorReport.of(error, leg=leg)
        return error_response(report)

    return middleware


def require_key(api_key: str) -> Middleware:
    """Make the middleware that asks for `Authorization: Bearer KEY` on every route but /health and /metrics; "" asks not.

    It belongs inside of `answer_errors`.
    """
    expected = api_key.encode()

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if expected and request.path not in _OPEN_PATHS:
            scheme, _, given = request.headers.get("Authorization", "").partition(" ")
            # How long the comparison takes must not tell how much of a guess was right.
            is_right = hmac.compare_digest(given.strip().encode(errors="surrogateescape"), expected)
            if scheme.lower() != "bearer" or not is_right:
                message = "Authorization: the API key is missing or wrong"
                return error_response(ErrorReport(status=401, message=message, code="invalid_api_key"))
        return await handler(request)

    return middleware


def error_response(report: ErrorReport) -> web.Response:
    """Write an error reply; one that says that there is too much to do says when to come back."""
    headers = {"Retry-After": str(_RETRY_AFTER_S)} if report.status == 429 else {}
    if report.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return web.Response(status=report.status, body=error_body(report), headers=headers, content_type="application/json")


def bearer(api_key: str) -> dict[str, str]:
    """The header with which a client shows its key; none for no key."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


async def together(coroutines: Sequence[Coroutine[None, None, Result]]) -> list[Result]:
    """Run all of them and return their results in order; raises the first failure once the others are cancelled."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


class EventStream:
    """A server-sent event stream, begun by its first event; several tasks may send, and each event stays whole."""

    def __init__(self, request: web.Request) -> None:
        self._lock = asyncio.Lock()
        self._is_cut = False
        self.response = web.StreamResponse(headers={"Cache-Control": "no-cache"})
        self.response.content_type = "text/event-stream"
        self._writer = ClientWriter(request, self.response)

    async def send(self, event: bytes) -> None:
        """Write one event."""
        async with self._lock:
            await self._writer.write(event)

    async def send_body(self, event: Body) -> None:
        """Write one event that has rows, part by part."""
        async with self._lock:
            self._is_cut = True
            async for part in event.written():
                await self._writer.write(part)
            self._is_cut = False

    async def end(self, event: bytes) -> None:
        """Write the last event and end the stream."""
        # Whoever wrote a large event may have been cancelled in the middle of it.
        await self.send(b"\n\n" + event if self._is_cut else event)
        await self._writer.end()


def stop_on_signals() -> asyncio.Event:
    """Make an event that SIGTERM and SIGINT set, for the running event loop."""
    stop = asyncio.Event()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signal_number, stop.set)
    return stop


async def start_server(
    app: web.Application, options: ServerOptions, *, shutdown_deadline_s: float | None = None
) -> web.AppRunner:
    """Listen; the caller cleans the runner up, which lets running requests end within the shutdown deadline.

    By default that is the options'; a caller that has let them end before has only their last words to wait for.
    """
    runner = web.AppRunner(
        app,
        access_log=None,
        # A client that leaves must cancel its handler, or its request would run on for nobody.
        handler_cancellation=True,
        shutdown_timeout=options.shutdown_deadline_s if shutdown_deadline_s is None else shutdown_deadline_s,
    )
    await runner.setup()
    await web.TCPSite(runner, options.host, options.port, backlog=1024).start()
    log.info("listening on http://%s:%d", options.host, options.port)
    return runner
