"""One leg over HTTP: the request to one worker, its reply or its stream, and its failures as errors that name it.

It knows neither pairs nor rows. Leaving any of its calls early closes the connection, by which the worker learns that
nobody waits any more. Neighbours: `pair` (runs two of these), `common.protocol.legs` (bodies and replies).
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

import aiohttp
import msgspec

from common.errors import DeadlineExceeded, LegFailed
from common.messages import ErrorReport, ReportedError
from common.protocol.legs import LegReply, decode_error, decode_last_event, decode_samples
from common.protocol.replies import MSGPACK, Reply
from common.server.http import bearer
from router.membership import Worker

_DONE = b"[DONE]"
_MAX_DONE_BYTES = 16
_DATA = b"data:"

# Events with more rows than this are decoded in a thread (R16).
_LARGE_EVENT_BYTES = 2**18


def make_session(*, connect_deadline_s: float, worker_api_key: str = "") -> aiohttp.ClientSession:
    """Make the router's HTTP client: any number of connections, no deadline but that for connecting.

    The caller closes it. How long a whole request may take is `pair`'s to say.
    """
    return aiohttp.ClientSession(
        headers=bearer(worker_api_key),
        connector=aiohttp.TCPConnector(limit=0, limit_per_host=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_deadline_s),
        read_bufsize=2**20,
        cookie_jar=aiohttp.DummyCookieJar(),
    )


async def fetch(session: aiohttp.ClientSession, worker: Worker, body: bytes, *, n: int = 1) -> list[LegReply]:
    """Run a leg that answers once, with `n` replies.

    Raises ReportedError with what the worker said, LegFailed if it could not be reached, died or spoke nonsense, and
    DeadlineExceeded if it took no connection in time.
    """
    with _failures_of(worker):
        async with session.post(f"{worker.url}/generate", data=body, headers=_headers(MSGPACK)) as response:
            # Not by `read`, which would copy all of it at once (R16).
            answer = bytearray()
            async for chunk in response.content.iter_any():
                answer += chunk
    if response.status != 200:
        raise ReportedError(_report(worker, response.status, answer))
    try:
        replies = decode_samples(answer)
    except ValueError as error:
        raise _nonsense(worker, error) from error
    if len(replies) != n:
        raise _nonsense(worker, f"{len(replies)} replies instead of {n}")
    return [_checked(worker, reply) for reply in replies]


async def stream(
    session: aiohttp.ClientSession, worker: Worker, body: bytes, *, n: int
) -> AsyncGenerator[Reply | LegReply, None]:
    """Run a leg of `n` samples that streams: events as they come, and a LegReply as the last one of each sample.

    Events are undecoded but for their JSON; if n > 1 each has its sample's `index`. Close the generator when done with it
    (`contextlib.aclosing`). Raises as `fetch` does; a stream that ends without all its last events is a LegFailed too.
    """
    with _failures_of(worker):
        async with session.post(f"{worker.url}/generate", data=body, headers=_headers("text/event-stream")) as response:
            if response.status != 200:
                raise ReportedError(_report(worker, response.status, await response.read()))
            waiting_for, last = set(range(n)), None
            # Read to the end, beyond the last event: only then can the connection be used again.
            async for data in _events(response.content):
                if len(data) < _MAX_DONE_BYTES and data.strip() == _DONE:
                    continue
                event = await _decoded_event(worker, data)
                index = event.index if isinstance(event, LegReply) else event.get("index", 0)
                if index not in waiting_for:
                    raise _nonsense(worker, f"an event of sample {index}, which has ended or never was")
                if not isinstance(event, LegReply):
                    yield event
                    continue
                waiting_for.remove(event.index)
                if waiting_for:
                    yield event
                else:
                    last = event
    if last is None:
        raise LegFailed(f"{worker.label}: the stream ended without a last event", leg=worker.leg, stage="stream")
    yield last


async def _events(content: aiohttp.StreamReader) -> AsyncGenerator[bytearray, None]:
    """Cut a stream into the data of its events. Not by `readline`: an event with rows may be longer than any buffer."""
    pending = bytearray()
    async for chunk in content.iter_any():
        seen = max(0, len(pending) - 1)
        pending += chunk
        while (end := pending.find(b"\n\n", seen)) >= 0:
            # What follows the event is copied, and not the event, which may be large.
            event, pending = pending, pending[end + 2 :]
            del event[end:]
            seen = 0
            if event.startswith(_DATA):
                del event[: len(_DATA)]
                yield event


async def _decoded_event(worker: Worker, data: bytearray) -> Reply | LegReply:
    try:
        # No string of a JSON document can hold these bytes: its quotes would be escaped.
        if len(data) > _LARGE_EVENT_BYTES and b'"routed_experts":' in data:
            return _checked(worker, await asyncio.to_thread(decode_last_event, data))
        event = msgspec.json.decode(data, type=dict[str, object])
        if "error" in event:
            raise ReportedError(_report(worker, 502, data))
        meta = event.get("meta_info")
        if not isinstance(meta, dict):
            raise _nonsense(worker, "an event without meta_info")
        return event if meta.get("finish_reason") is None else _checked(worker, decode_last_event(data))
    except ValueError as error:
        raise _nonsense(worker, error) from error


def _checked(worker: Worker, reply: LegReply) -> LegReply:
    """Take a reply that is an answer: one that was cut short is one only if somebody asked for that."""
    reason = reply.meta_info.finish_reason
    if reason.type == "abort" and not reply.is_aborted:
        raise LegFailed(
            f"{worker.label} was aborted: {reason.message or reason.cause or 'it says not why'}",
            leg=worker.leg,
            stage="generate",
        )
    return reply


def _nonsense(worker: Worker, why: object) -> LegFailed:
    return LegFailed(f"{worker.label}: its reply cannot be read: {why}", leg=worker.leg, stage="reply")


def _report(worker: Worker, status: int, body: bytes | bytearray) -> ErrorReport:
    """Make the client's error of a worker's: the client's own mistakes as they are, a failure as one of the leg's."""
    report = msgspec.structs.replace(decode_error(status, body), leg=worker.leg)
    if 400 <= status < 500:
        return report
    return msgspec.structs.replace(
        report,
        status=504 if status == 504 else 502,
        message=f"{worker.label} failed: {report.message}",
        stage=report.stage or "generate",
    )


@contextmanager
def _failures_of(worker: Worker) -> Iterator[None]:
    """Turn the HTTP client's exceptions into our own, which name the leg, the worker and the stage."""
    place = worker.label
    try:
        yield
    except aiohttp.ConnectionTimeoutError as error:
        raise DeadlineExceeded(f"{place}: no connection in time", leg=worker.leg, stage="connect") from error
    except aiohttp.ClientConnectorError as error:
        raise LegFailed(f"{place}: no connection: {error}", leg=worker.leg, stage="connect") from error
    except (aiohttp.ClientError, OSError) as error:
        what = str(error) or type(error).__name__
        raise LegFailed(f"{place}: connection lost: {what}", leg=worker.leg, stage="reply") from error


def _headers(accept: str) -> dict[str, str]:
    return {"Content-Type": "application/json", "Accept": accept}
