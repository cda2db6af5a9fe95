"""Writing to a client that may have stopped reading: every write has a deadline, after which the connection is cut (R13).

A client that takes nothing would hold its handler for ever, and with it the request's pages on both workers. Neighbours: `http`
(event streams; sets the deadline for an application) and `bodies` (whole replies), which write through this alone.
"""

import asyncio
import logging
from collections.abc import Awaitable
from typing import Final

import aiohttp
from aiohttp import web

from common.config import ServerOptions

log = logging.getLogger(__name__)

WRITE_DEADLINE_S: Final = web.AppKey("write_deadline_s", float)
"""An application's deadline for one write, in seconds; without it, the option's default holds."""

_DEFAULT_S: Final = ServerOptions().write_deadline_s
# A client that is only slow takes so much within any sensible deadline.
_BYTES_PER_WRITE: Final = 2**18


class ClientWriter:
    """Writes one answer. Raises ClientConnectionResetError when the client has left, or has taken nothing for too long."""

    def __init__(self, request: web.Request, response: web.StreamResponse) -> None:
        self._request = request
        self._response = response
        self._deadline_s = request.app.get(WRITE_DEADLINE_S, _DEFAULT_S)

    async def write(self, data: bytes | memoryview) -> None:
        """Write part of the body; the first one sends the headers too."""
        if not self._response.prepared:
            await self._response.prepare(self._request)
        if len(data) <= _BYTES_PER_WRITE:
            await self._bounded(self._response.write(data))
            return
        view = memoryview(data)
        for begin in range(0, len(view), _BYTES_PER_WRITE):
            await self._bounded(self._response.write(view[begin : begin + _BYTES_PER_WRITE]))

    async def end(self) -> None:
        """End the body."""
        if not self._response.prepared:
            await self._response.prepare(self._request)
        await self._bounded(self._response.write_eof())

    async def _bounded(self, writing: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(self._deadline_s):
                await writing
        except TimeoutError as error:
            message = f"the client has taken nothing for {self._deadline_s:g} s"
            log.warning("%s: %s", self._request.path, message)
            if self._request.transport is not None:
                self._request.transport.abort()
            raise aiohttp.ClientConnectionResetError(message) from error
