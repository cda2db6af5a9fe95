"""`python -m deploy.bench.speed.client ADDRESS`: a process that sends requests at once and keeps the raw replies.

Over a Unix socket it is given one job after the other: it opens the job's connections, says so, waits for the word, sends
everything, and hands the replies over, one message each. It reads nothing in them: while the clock runs, a reply is bytes
and the times at which they came. Times are `time.perf_counter`'s, which on Linux all processes of a machine share.

It imports no torch and no transformers, so that it is up at once. Neighbour: `clients` (the other end of the socket).
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from multiprocessing.connection import Client, Connection
from typing import Any, Final

import aiohttp
import msgspec
import uvloop
from msgspec import Struct

from common.process import run_main

READY: Final = b"ready"
GO: Final = b"go"
END: Final = b"end"

_READ_BUFFER_BYTES: Final = 2**21


class Job(Struct, frozen=True, kw_only=True):
    """Requests to one URL: `bodies` all at once; `background` one after the other while those are being answered.

    The background begins when every one of `bodies` has had a first byte of its answer.
    """

    url: str
    path: str
    headers: dict[str, str]
    bodies: list[bytes]
    background: list[bytes] = []
    deadline_s: float


class Reply(Struct, frozen=True, kw_only=True):
    """What came back: the raw body, and after each piece of it the time and the bytes so far.

    `failure` says why there is no whole answer; then the status may be 0.
    """

    started_s: float
    ended_s: float
    status: int = 0
    body: bytes = b""
    arrivals: list[tuple[float, int]] = []
    failure: str | None = None
    in_background: bool = False


def main(argv: list[str]) -> None:
    """Do jobs until the other end closes the socket."""
    [address] = argv
    with Client(address, family="AF_UNIX") as pipe, contextlib.suppress(EOFError):
        while True:
            job = msgspec.msgpack.decode(pipe.recv_bytes(), type=Job)
            for reply in uvloop.run(_do(job, pipe)):
                pipe.send_bytes(msgspec.msgpack.encode(reply))
            pipe.send_bytes(END)


async def _do(job: Job, pipe: "Connection[bytes, bytes]") -> list[Reply]:
    timeout = aiohttp.ClientTimeout(total=job.deadline_s)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=job.deadline_s)
    async with aiohttp.ClientSession(
        timeout=timeout,
        connector=connector,
        headers=job.headers | {"Accept-Encoding": "identity"},
        read_bufsize=_READ_BUFFER_BYTES,
    ) as session:
        await _open_connections(session, job)
        pipe.send_bytes(READY)
        # Blocks the loop, in which nothing else is going on.
        pipe.recv_bytes()
        return await _send_all(session, job)


async def _open_connections(session: aiohttp.ClientSession, job: Job) -> None:
    """Have as many connections in the pool as requests will be sent at once."""

    async def ask() -> None:
        # Whatever is wrong will be wrong with the requests too, and they report it.
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with session.get(f"{job.url}/health") as response:
                await response.read()

    await asyncio.gather(*(ask() for _ in job.bodies))


async def _send_all(session: aiohttp.ClientSession, job: Job) -> list[Reply]:
    num_begun = 0
    all_begun = asyncio.Event()

    def on_first_bytes() -> None:
        nonlocal num_begun
        num_begun += 1
        if num_begun == len(job.bodies):
            all_begun.set()

    url = job.url + job.path
    sending = asyncio.gather(*(_send(session, url, body, on_first_bytes) for body in job.bodies))
    background: list[Reply] = []
    if job.background:
        begun = asyncio.create_task(all_begun.wait())
        either: list[asyncio.Future[Any]] = [sending, begun]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        begun.cancel()
        for body in job.background:
            if sending.done():
                break
            reply = await _send(session, url, body, lambda: None)
            background.append(msgspec.structs.replace(reply, in_background=True))
    return [*await sending, *background]


async def _send(session: aiohttp.ClientSession, url: str, body: bytes, on_first_bytes: Callable[[], None]) -> Reply:
    pieces: list[bytes] = []
    arrivals: list[tuple[float, int]] = []
    status, num_bytes, failure = 0, 0, None
    started_s = time.perf_counter()
    try:
        async with session.post(url, data=body) as response:
            status = response.status
            async for piece in response.content.iter_any():
                num_bytes += len(piece)
                pieces.append(piece)
                arrivals.append((time.perf_counter(), num_bytes))
                if len(pieces) == 1:
                    on_first_bytes()
    except TimeoutError:
        failure = "the deadline has passed"
    except aiohttp.ClientError as error:
        failure = f"{type(error).__name__}: {error}"
    ended_s = time.perf_counter()
    return Reply(
        started_s=started_s,
        ended_s=ended_s,
        status=status,
        body=b"".join(pieces),
        arrivals=arrivals,
        failure=failure,
    )


if __name__ == "__main__":
    run_main(main)
