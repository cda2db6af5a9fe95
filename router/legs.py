"""One leg over HTTP: the request to one worker, its reply or its stream, and its failures as errors that name it.

It knows neither pairs nor rows. Leaving any of its calls early closes the connection, by which the worker learns that
nobody waits any more. Neighbours: `pair` (runs two of these), `common.protocol.legs` (bodies and replies).
"""

from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

import aiohttp
import msgspec

from common.errors import DeadlineExceeded, LegFailed
from common.messages import ErrorReport, ReportedError
from common.protocol.legs import LegReply, decode_error, decode_last_event, decode_leg
from common.protocol.replies import MSGPACK, Reply
from router.membership import Worker

_DONE = b"[DONE]"
_DATA = b"data:"


def make_session(*, connect_deadline_s: float) -> aiohttp.ClientSession:
    """Make the router's HTTP client: any number of connections, no deadline but that for connecting.

    The caller closes it. How long a whole request may take is `pair`'s to say.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, limit_per_host=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_deadline_s),
        read_bufsize=2**20,
        cookie_jar=aiohttp.DummyCookieJar(),
    )


async def fetch(session: aiohttp.ClientSession, worker: Worker, body: bytes) -> LegReply:
    """Run a leg that answers once.

    Raises ReportedError with what the worker said, LegFailed if it could not be reached, died or spoke nonsense, and
    DeadlineExceeded if it took no connection in time.
    """
    with _failures_of(worker):
        async with session.post(f"{worker.url}/generate", data=body, headers=_headers(MSGPACK)) as response:
            answer = await response.read()
    if response.status != 200:
        raise ReportedError(_report(worker, response.status, answer))
    return _decoded(worker, answer, is_event=False)


async def stream(session: aiohttp.ClientSession, worker: Worker, body: bytes) -> AsyncGenerator[Reply | LegReply, None]:
    """Run a leg that streams: events as they come, undecoded but for their JSON, and a LegReply as the last one.

    Close the generator when done with it (`contextlib.aclosing`). Raises as `fetch` does; a stream that ends without
    its last event is a LegFailed too.
    """
    with _failures_of(worker):
        async with session.post(f"{worker.url}/generate", data=body, headers=_headers("text/event-stream")) as response:
            if response.status != 200:
                raise ReportedError(_report(worker, response.status, await response.read()))
            last: LegReply | None = None
            # Read to the end, beyond the last event: only then can the connection be used again.
            async for data in _events(response.content):
                if data == _DONE:
                    continue
                event = _decoded_event(worker, data)
                if isinstance(event, LegReply):
                    last = event
                else:
                    yield event
    if last is None:
        raise LegFailed(
            f"decode leg on {worker.url}: the stream ended without a last event", leg="decode", stage="stream"
        )
    yield last


async def _events(content: aiohttp.StreamReader) -> AsyncGenerator[bytes, None]:
    """Cut a stream into the data of its events. Not by `readline`: an event with rows may be longer than any buffer."""
    pending = bytearray()
    async for chunk in content.iter_any():
        seen = max(0, len(pending) - 1)
        pending += chunk
        while (end := pending.find(b"\n\n", seen)) >= 0:
            event = bytes(pending[:end]).strip()
            del pending[: end + 2]
            seen = 0
            if event.startswith(_DATA):
                yield event[len(_DATA) :].strip()


def _decoded(worker: Worker, data: bytes, *, is_event: bool) -> LegReply:
    try:
        return decode_last_event(data) if is_event else decode_leg(data)
    except ValueError as error:
        raise _nonsense(worker, error) from error


def _decoded_event(worker: Worker, data: bytes) -> Reply | LegReply:
    try:
        event = msgspec.json.decode(data, type=dict[str, object])
    except ValueError as error:
        raise _nonsense(worker, error) from error
    if "error" in event:
        raise ReportedError(_report(worker, 502, data))
    meta = event.get("meta_info")
    if not isinstance(meta, dict):
        raise _nonsense(worker, "an event without meta_info")
    return event if meta.get("finish_reason") is None else _decoded(worker, data, is_event=True)


def _nonsense(worker: Worker, why: object) -> LegFailed:
    return LegFailed(
        f"{worker.role} leg on {worker.url}: its reply cannot be read: {why}", leg=worker.role, stage="reply"
    )


def _report(worker: Worker, status: int, body: bytes) -> ErrorReport:
    """Make the client's error of a worker's: the client's own mistakes as they are, a failure as one of the leg's."""
    report = msgspec.structs.replace(decode_error(status, body), leg=worker.role)
    if 400 <= status < 500:
        return report
    return msgspec.structs.replace(
        report,
        status=504 if status == 504 else 502,
        message=f"{worker.role} leg on {worker.url} failed: {report.message}",
        stage=report.stage or "generate",
    )


@contextmanager
def _failures_of(worker: Worker) -> Iterator[None]:
    """Turn the HTTP client's exceptions into our own, which name the leg, the worker and the stage."""
    place = f"{worker.role} leg on {worker.url}"
    try:
        yield
    except aiohttp.ConnectionTimeoutError as error:
        raise DeadlineExceeded(f"{place}: no connection in time", leg=worker.role, stage="connect") from error
    except aiohttp.ClientConnectorError as error:
        raise LegFailed(f"{place}: no connection: {error}", leg=worker.role, stage="connect") from error
    except (aiohttp.ClientError, OSError) as error:
        what = str(error) or type(error).__name__
        raise LegFailed(f"{place}: connection lost: {what}", leg=worker.role, stage="reply") from error


def _headers(accept: str) -> dict[str, str]:
    return {"Content-Type": "application/json", "Accept": accept}
