"""A client that stops reading is dropped after the write deadline; its request ends as if it had left."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from aiohttp import web

from common.config import ServerOptions
from common.messages import Abort, RowBlock
from common.server.bodies import BodyWriter, send_body
from common.server.http import EventStream, make_application
from common.server.writing import WRITE_DEADLINE_S
from tests.support.rows import SPEC, cut, make_rows
from tests.support.scripted_worker import ROOM, scripted_worker
from tests.support.stub_workers import serving

MANY = 4000
ROWS = make_rows(SPEC, 200_000)
SHORT = ServerOptions(write_deadline_s=0.05)


@asynccontextmanager
async def deaf_client(url: str, path: str, body: dict[str, Any]) -> AsyncIterator[None]:
    """A client that sends a request and never reads."""
    address = urlsplit(url)
    data = json.dumps(body).encode()
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(
            b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(data)) + data
        )
        yield


async def test_a_stream_that_nobody_reads_is_aborted_in_the_engine():
    async with scripted_worker(write_deadline_s=0.05) as worker:
        body = {"input_ids": [1], **ROOM, "bootstrap_room": 7, "stream": True}
        async with deaf_client(str(worker.client._base_url), "/generate", body):
            message = await worker.engine.next_generate()
            for position in range(MANY):  # each event has all tokens so far
                worker.engine.tokens(message, [5], first=position)
            assert await worker.engine.next() == Abort(message.rid)
        request = asyncio.create_task(worker.post(**{**body, "stream": False}))
        worker.engine.finish(await worker.engine.next_generate(), [5])
        assert (await request)[0] == 200


Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


def block() -> RowBlock:
    return cut(SPEC, ROWS, 0, len(ROWS))


async def whole(request: web.Request) -> web.StreamResponse:
    writer = BodyWriter()
    return await send_body(request, writer.body(json.dumps(writer.rows(block(), "int32")).encode()), binary=False)


async def one_text(request: web.Request) -> web.StreamResponse:
    return await send_body(request, BodyWriter().body(b"x" * 40_000_000), binary=False)


async def events(request: web.Request) -> web.StreamResponse:
    stream = EventStream(request)
    while True:
        await stream.send(b"data: " + b"x" * 1000 + b"\n\n")


async def event_with_rows(request: web.Request) -> web.StreamResponse:
    stream, writer = EventStream(request), BodyWriter()
    await stream.send_body(writer.body(json.dumps(writer.rows(block(), "int32")).encode()))
    return stream.response


@pytest.mark.parametrize("answer", [whole, one_text, events, event_with_rows])
async def test_every_way_to_answer_has_the_deadline(answer: Answer):
    ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            return await answer(request)
        finally:
            ended.set_result(request.transport is None or request.transport.is_closing())

    app = make_application(SHORT)
    app.router.add_post("/", handle)
    async with asyncio.timeout(20), serving(app) as url, deaf_client(url, "/", {}):
        assert await ended, "the connection is still open"


async def test_a_client_that_reads_gets_all_however_short_the_deadline():
    app = make_application(SHORT)
    app.router.add_post("/", one_text)
    async with asyncio.timeout(20), serving(app) as url:
        address = urlsplit(url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=1024)
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        num_bytes = 0
        while part := await reader.read(100_000):
            num_bytes += len(part)
        assert num_bytes > 40_000_000
        writer.close()


async def test_an_application_without_the_key_has_the_default():
    """Whoever makes a plain application gets the option's default."""
    app = web.Application()
    app.router.add_post("/", one_text)
    assert make_application(ServerOptions())[WRITE_DEADLINE_S] == ServerOptions().write_deadline_s == 60.0
    async with asyncio.timeout(20), serving(app) as url:
        address = urlsplit(url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()
