"""The frontend's view of its engine: requests in, tokens and ends out, over one ZMQ channel.

When the engine process ends, every request that is open fails at once; nothing waits for a process that is gone. It knows no
HTTP. Neighbours: `common.wire.FrontendChannel`, `common.server.app` (its user).
"""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple, assert_never

from msgspec.structs import replace

from common.errors import RequestError, RequestFailed
from common.messages import (
    Abort,
    EngineReady,
    EngineToFrontend,
    ErrorReport,
    Failed,
    Finished,
    Generate,
    GetStats,
    RowBlock,
    Shutdown,
    Stats,
    Tokens,
)
from common.wire import FrontendChannel


class Ended(NamedTuple):
    """A sample's end with its rows, if it asked for any."""

    finished: Finished
    rows: RowBlock | None


Update = Tokens | Ended | Failed


class EngineClient:
    """One engine's requests. All methods belong to one event loop."""

    def __init__(self, channel: FrontendChannel) -> None:
        self._channel = channel
        self._open: set[str] = set()
        self._updates: dict[str, asyncio.Queue[Update]] = {}
        self._stats: dict[int, asyncio.Future[Stats]] = {}
        self._serials = itertools.count()
        self._failure: str | None = None
        self.ready: asyncio.Future[EngineReady] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Take in what the engine sends; runs until cancelled."""
        while True:
            message, frames = await self._channel.receive()
            self._dispatch(message, frames)

    def fail(self, message: str) -> None:
        """The engine is gone: end everything that is open, and refuse what comes."""
        self._failure = message
        for rid, queue in self._updates.items():
            queue.put_nowait(Failed(rid, ErrorReport.of(RequestFailed(message, stage="engine"), rid=rid)))
        for waiting in self._stats.values():
            if not waiting.done():
                waiting.set_exception(RequestFailed(message, stage="engine"))

    @asynccontextmanager
    async def generate(self, message: Generate) -> AsyncIterator[AsyncIterator[Update]]:
        """Run one sample: the updates end with `Ended` or `Failed`. Leaving the context early aborts it.

        Raises RequestError if the rid is in use, RequestFailed if the engine is gone.
        """
        if message.rid in self._open:
            raise RequestError("rid", f"{message.rid!r} is in use by another request")
        if self._failure is not None:
            raise RequestFailed(self._failure, stage="engine")
        # The engine knows each run by a name of its own: when a client leaves and comes back with the same rid, what the
        # engine has said of the first run may still be on its way, and is not the second one's.
        run = f"{message.rid}~{next(self._serials)}"
        queue = self._updates[run] = asyncio.Queue()
        self._open.add(message.rid)
        ended = False

        async def updates() -> AsyncIterator[Update]:
            nonlocal ended
            while not ended:
                update = await queue.get()
                ended = isinstance(update, Ended | Failed)
                yield _renamed(update, message.rid)

        self._channel.send(replace(message, rid=run))
        try:
            yield updates()
        finally:
            del self._updates[run]
            self._open.remove(message.rid)
            if not ended:
                self._channel.send(Abort(run))

    async def stats(self) -> Stats:
        """Ask the engine for its statistics; raises RequestFailed if it is gone."""
        if self._failure is not None:
            raise RequestFailed(self._failure, stage="engine")
        serial = next(self._serials)
        waiting = self._stats[serial] = asyncio.get_running_loop().create_future()
        try:
            self._channel.send(GetStats(serial))
            stats: Stats = await waiting
            return stats
        finally:
            del self._stats[serial]

    def shut_down(self) -> None:
        """Ask the engine process to exit."""
        self._channel.send(Shutdown())

    def _dispatch(self, message: EngineToFrontend, frames: list[memoryview]) -> None:
        match message:
            case EngineReady():
                self.ready.set_result(message)
            case Stats():
                waiting = self._stats.get(message.serial)
                if waiting is not None and not waiting.done():
                    waiting.set_result(message)
            case Tokens() | Failed():
                self._put(message.rid, message)
            case Finished():
                rows = None if message.rows is None else RowBlock(message.rows, frames[0])
                self._put(message.rid, Ended(message, rows))
            case _:
                assert_never(message)

    def _put(self, rid: str, update: Update) -> None:
        queue = self._updates.get(rid)
        if queue is not None:  # else the client has left, and the abort has crossed this
            queue.put_nowait(update)


def _renamed(update: Update, rid: str) -> Update:
    """Put the client's rid in the place of the run's."""
    match update:
        case Tokens():
            return replace(update, rid=rid)
        case Ended():
            return Ended(replace(update.finished, rid=rid), update.rows)
        case Failed():
            return Failed(rid, replace(update.error, rid=rid))
        case _:
            assert_never(update)
