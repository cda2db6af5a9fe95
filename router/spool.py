"""A request's body that goes to several workers: taken once, into a file, and read again for each of them.

Weights are larger than what should lie in memory several times. Neighbour: `orders_api`.
"""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import IO, Final

import aiohttp
from aiohttp import web

_PART_BYTES: Final = 2**20


class Spool:
    """A body on disk; any number of readers may read it at the same time."""

    def __init__(self, file: IO[bytes], num_bytes: int) -> None:
        self._file = file
        self.num_bytes = num_bytes

    async def parts(self) -> AsyncIterator[bytes]:
        """Read it, from its beginning to its end."""
        for offset in range(0, self.num_bytes, _PART_BYTES):
            yield await asyncio.to_thread(os.pread, self._file.fileno(), _PART_BYTES, offset)


@asynccontextmanager
async def spooled(content: aiohttp.StreamReader, max_bytes: int) -> AsyncIterator[Spool]:
    """Take a body, which is kept as long as the block lasts. Raises HTTPRequestEntityTooLarge."""
    with tempfile.TemporaryFile() as file:
        num_bytes = 0
        async for chunk in content.iter_chunked(_PART_BYTES):
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise web.HTTPRequestEntityTooLarge(max_bytes, num_bytes)
            await asyncio.to_thread(file.write, chunk)
        await asyncio.to_thread(file.flush)
        yield Spool(file, num_bytes)
