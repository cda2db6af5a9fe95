"""HTTP calls to a server of ours: what is tried again, what a failure is called, and bodies and events as they came.

It reads nothing but errors, so that whoever judges or measures replies can keep them raw. Neighbours: `deploy.client` (knows the
routes), `deploy.answers` (reads bodies).
"""

import asyncio
import random
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import aiohttp
import msgspec
from msgspec import Struct

from common.errors import TandemError
from common.messages import ErrorReport, ReportedError
from common.server.http import bearer
from deploy.answers import Answer, read_error

Result = TypeVar("Result")

_CONNECT_DEADLINE_S: Final = 10.0
_BUSY: Final = (429, 503)
_LOST: Final = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError)
_DATA: Final = b"data: "
_DONE: Final = b"[DONE]"
_ERROR_EVENT: Final = b'{"error":'


class ServerError(ReportedError):
    """The server's own words: `report` has the fields of its error and the status, `content` the body as it came.

    A stream that fails after its beginning has the status 200.
    """

    def __init__(self, report: ErrorReport, content: bytes = b"", retry_after_s: float | None = None) -> None:
        super().__init__(report)
        self.content = content
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.report.status}: {self.report.message}"


class NoAnswerError(TandemError):
    """The connection could not be made or broke before the answer was whole."""


class DeadlinePassedError(NoAnswerError, TimeoutError):
    """There was no whole answer before the client's deadline."""


class Retries(Struct, frozen=True):
    """How often a call is made again, and after what pauses, in seconds; all of it within the call's deadline.

    Made again is a call that found nobody, or was told 429 or 503, or, where repeating it does no harm, one whose connection
    broke. A generation does none: its seed is drawn by the client, so it repeats itself. A stream that has begun is not
    begun again.
    """

    most: int = 8
    first_pause_s: float = 0.1
    longest_pause_s: float = 5.0

    def pause_s(self, number: int, retry_after_s: float | None) -> float:
        """How long to wait before the retry of this number, from 0; not shorter than the server asks for."""
        pause_s = min(self.longest_pause_s, self.first_pause_s * 2.0**number) * random.uniform(0.5, 1.0)
        return max(pause_s, retry_after_s or 0.0)


RETRIES: Final = Retries()
NO_RETRIES: Final = Retries(most=0)


class Connection:
    """Talks to one server; an async context manager, for one event loop. `deadline_s` is of each call, retries included.

    Every call raises ServerError, NoAnswerError or DeadlinePassedError.
    """

    def __init__(self, url: str, *, api_key: str = "", deadline_s: float = 600.0, retries: Retries = RETRIES) -> None:
        self.url = url.rstrip("/")
        self.deadline_s = deadline_s
        self._api_key = api_key
        self._retries = retries

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=bearer(self._api_key))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        accept: str = "application/json",
        session_id: str = "",
        is_repeatable: bool = True,
        deadline_s: float | None = None,
    ) -> Answer:
        """Make a call, again if need be, and give the body of its good answer as it came."""

        async def attempt(timeout: aiohttp.ClientTimeout) -> Answer:
            async with await self._request(method, path, body, accept, session_id, timeout) as response:
                return Answer(await response.read(), response.content_type)

        return await self._until_answered(attempt, is_repeatable, deadline_s)

    async def events(self, path: str, body: dict[str, Any], *, session_id: str = "") -> AsyncIterator[bytes]:
        """Give the data of each event of a stream up to `[DONE]`; an error among them is raised."""

        async def begin(timeout: aiohttp.ClientTimeout) -> aiohttp.ClientResponse:
            return await self._request("POST", path, body, "text/event-stream", session_id, timeout)

        async with await self._until_answered(begin, True, None) as response:
            try:
                async for data in cut_events(response.content.iter_any()):
                    if data == _DONE:
                        return
                    if data.startswith(_ERROR_EVENT):
                        raise ServerError(read_error(response.status, data), data)
                    yield data
            except (aiohttp.ClientError, OSError) as error:
                raise _no_answer(error) from error
        raise NoAnswerError("the stream ended with neither [DONE] nor an error")

    async def _request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        accept: str,
        session_id: str,
        timeout: aiohttp.ClientTimeout,
    ) -> aiohttp.ClientResponse:
        """Send once. Raises ServerError, and what aiohttp raises."""
        headers = {"Accept": accept} | ({"x-session-id": session_id} if session_id else {})
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = msgspec.json.encode(body)
        response = await self._session.request(method, self.url + path, data=data, headers=headers, timeout=timeout)
        if response.ok:
            return response
        async with response:
            content = await response.read()
        retry_after = response.headers.get("Retry-After", "")
        retry_after_s = float(retry_after) if retry_after.isdecimal() else None
        raise ServerError(read_error(response.status, content), content, retry_after_s)

    async def _until_answered(
        self,
        attempt: Callable[[aiohttp.ClientTimeout], Awaitable[Result]],
        is_repeatable: bool,
        deadline_s: float | None,
    ) -> Result:
        clock = asyncio.get_running_loop().time
        deadline = clock() + (self.deadline_s if deadline_s is None else deadline_s)
        number = 0
        while True:
            # aiohttp takes 0 for no limit.
            left_s = max(0.001, deadline - clock())
            retry_after_s: float | None = None
            failure: TandemError
            try:
                return await attempt(aiohttp.ClientTimeout(total=left_s, sock_connect=_CONNECT_DEADLINE_S))
            except ServerError as error:
                failure, retry_after_s = error, error.retry_after_s
                is_tried_again = is_repeatable and error.report.status in _BUSY
            except (aiohttp.ClientError, OSError) as error:
                failure = _no_answer(error)
                failure.__cause__ = error
                is_tried_again = isinstance(error, _LOST) and (
                    is_repeatable or isinstance(error, aiohttp.ClientConnectorError)
                )
            pause_s = self._retries.pause_s(number, retry_after_s)
            if not is_tried_again or number >= self._retries.most or clock() + pause_s >= deadline:
                raise failure
            await asyncio.sleep(pause_s)
            number += 1


def _no_answer(error: Exception) -> NoAnswerError:
    if isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ClientError):
        return DeadlinePassedError("no answer before the deadline")
    return NoAnswerError(f"{type(error).__name__}: {error}")


async def cut_events(chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """Cut a stream into its events' data."""
    pending = bytearray()
    async for chunk in chunks:
        seen = max(0, len(pending) - 1)
        pending += chunk
        while (end := pending.find(b"\n\n", seen)) >= 0:
            event = bytes(memoryview(pending)[:end])
            del pending[: end + 2]
            seen = 0
            if event.startswith(_DATA):
                yield event[len(_DATA) :]
                # A burst of events must not keep the loop from its other clients.
                await asyncio.sleep(0)
