"""One leg over HTTP: the request to one worker, its reply or its stream, and its failures as errors that name it.

It knows neither pairs nor rows, and waits without a deadline: `LegRun.wait` has that. Leaving any of its calls early closes
the connection, by which the worker learns that nobody waits any more. What a worker sends is read up to a limit. Neighbours:
`pair` and `alone` (run these), `leg_run` (is told how far a leg is), `common.protocol.legs` (bodies and replies).
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import get_args

import aiohttp
import msgspec

from common.errors import DeadlineExceeded, LegFailed, MixedVersions
from common.messages import ErrorReport, Leg, ReportedError
from common.protocol.legs import LegReply, decode_error, decode_last_event, decode_samples
from common.protocol.replies import MSGPACK, Reply
from common.server.http import bearer
from router.leg_run import LegRun
from router.worker import Worker

_DONE = b"[DONE]"
_MAX_DONE_BYTES = 16
_DATA = b"data:"

# Events with more rows than this are decoded in a thread (R16).
_LARGE_EVENT_BYTES = 2**18
_MAX_ERROR_BYTES = 2**16


def make_session(*, connect_deadline_s: float, worker_api_key: str = "") -> aiohttp.ClientSession:
    """Make the router's HTTP client: any number of connections, no deadline but that for connecting.

    The caller closes it. How long a whole request may take is `leg_run`'s to say.
    """
    return aiohttp.ClientSession(
        headers=bearer(worker_api_key),
        connector=aiohttp.TCPConnector(limit=0, limit_per_host=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_deadline_s),
        read_bufsize=2**20,
        cookie_jar=aiohttp.DummyCookieJar(),
    )


class Legs:
    """Runs legs over HTTP."""

    def __init__(self, session: aiohttp.ClientSession, *, max_reply_bytes: int) -> None:
        self._session = session
        self._max_reply_bytes = max_reply_bytes

    async def fetch(self, run: LegRun, body: bytes, *, n: int = 1) -> list[LegReply]:
        """Run a leg that answers once, with `n` replies.

        Raises ReportedError with what the worker said, LegFailed if it could not be reached, died or spoke nonsense, and
        DeadlineExceeded if it took no connection in time.
        """
        worker = run.worker
        with _failures_of(worker):
            async with self._post(worker, body, MSGPACK) as response:
                if response.status != 200:
                    raise await _refusal(run, response)
                answer = await read_at_most(response.content, self._max_reply_bytes + 1)
        if len(answer) > self._max_reply_bytes:
            raise self._too_large(worker)
        run.has_ended = True
        try:
            replies = decode_samples(answer)
        except ValueError as error:
            raise _nonsense(worker, error) from error
        if len(replies) != n:
            raise _nonsense(worker, f"{len(replies)} replies instead of {n}")
        return [_checked(worker, reply) for reply in replies]

    async def stream(self, run: LegRun, body: bytes, *, n: int) -> AsyncGenerator[Reply | LegReply, None]:
        """Run a leg of `n` samples that streams: events as they come, and a LegReply as the last one of each sample.

        Events are undecoded but for their JSON; if n > 1 each has its sample's `index`. Close the generator when done with
        it (`contextlib.aclosing`). Raises as `fetch` does; a stream that ends without all its last events is a LegFailed too.
        """
        worker = run.worker
        with _failures_of(worker):
            async with self._post(worker, body, "text/event-stream") as response:
                if response.status != 200:
                    raise await _refusal(run, response)
                waiting_for, last = set(range(n)), None
                # Read to the end, beyond the last event: only then can the connection be used again.
                async for data in self._events(worker, response.content):
                    if len(data) < _MAX_DONE_BYTES and data.strip() == _DONE:
                        continue
                    event = await _decoded_event(run, data)
                    run.has_begun = True
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
        run.has_ended = True
        if last is None:
            raise LegFailed(f"{worker.label}: the stream ended without a last event", leg=worker.leg, stage="stream")
        yield last

    def _post(self, worker: Worker, body: bytes, accept: str) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        headers = {"Content-Type": "application/json", "Accept": accept}
        return self._session.post(f"{worker.url}/generate", data=body, headers=headers)

    async def _events(self, worker: Worker, content: aiohttp.StreamReader) -> AsyncGenerator[bytearray, None]:
        """Cut a stream into its events' data. Not by `readline`: an event with rows may be longer than any buffer."""
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
            if len(pending) > self._max_reply_bytes:
                raise self._too_large(worker)

    def _too_large(self, worker: Worker) -> LegFailed:
        message = f"{worker.label}: its reply is larger than {self._max_reply_bytes} bytes"
        return LegFailed(message, leg=worker.leg, stage="reply")


async def read_at_most(content: aiohttp.StreamReader, max_bytes: int) -> bytearray:
    """Read a body to its end, or its beginning if it is longer; not by `read`, which would copy all of it at once (R16)."""
    taken = bytearray()
    async for chunk in content.iter_any():
        taken += chunk
        if len(taken) >= max_bytes:
            del taken[max_bytes:]
            break
    return taken


async def _refusal(run: LegRun, response: aiohttp.ClientResponse) -> ReportedError:
    body = await read_at_most(response.content, _MAX_ERROR_BYTES)
    run.has_ended = True
    return ReportedError(_report(run.worker, response.status, body))


async def _decoded_event(run: LegRun, data: bytearray) -> Reply | LegReply:
    worker = run.worker
    try:
        # No string of a JSON document can hold these bytes: its quotes would be escaped.
        if len(data) > _LARGE_EVENT_BYTES and b'"routed_experts":' in data:
            return _checked(worker, await asyncio.to_thread(decode_last_event, data))
        event = msgspec.json.decode(data, type=dict[str, object])
        if "error" in event:
            run.has_ended = True
            raise ReportedError(_report(worker, 502, data))
        meta = event.get("meta_info")
        if not isinstance(meta, dict):
            raise _nonsense(worker, "an event without meta_info")
        return event if meta.get("finish_reason") is None else _checked(worker, decode_last_event(data))
    except (ValueError, RecursionError) as error:
        raise _nonsense(worker, error) from error


def _checked(worker: Worker, reply: LegReply) -> LegReply:
    """Take a reply that is an answer: one that was cut short is one only if somebody asked for that, for good or for later."""
    reason = reply.meta_info.finish_reason
    if reason.type == "abort" and not (reply.is_aborted or reply.is_retracted):
        raise LegFailed(
            f"{worker.label} was aborted: {reason.message or reason.cause or 'it says not why'}",
            leg=worker.leg,
            stage="generate",
        )
    return reply


def _nonsense(worker: Worker, why: object) -> LegFailed:
    return LegFailed(f"{worker.label}: its reply cannot be read: {why}", leg=worker.leg, stage="reply")


def _report(worker: Worker, status: int, body: bytes | bytearray) -> ErrorReport:
    """Make the client's error of a worker's: the client's own mistakes as they are, a failure as one of the leg's.

    A transfer has two ends, and only the worker that tells of its failure knows at which one it failed. That the weights
    have changed is no leg's failure, whichever tells of it.
    """
    report = decode_error(status, body)
    if report.code == MixedVersions.code:
        return msgspec.structs.replace(report, status=MixedVersions.status, leg=None, stage="versions")
    if not (report.stage == "transfer" and report.leg in get_args(Leg)):
        report = msgspec.structs.replace(report, leg=worker.leg)
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
