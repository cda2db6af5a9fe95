"""A heartbeat: a timer in an event loop that notes how late it is; whatever blocks the loop for longer than it waits shows.

Beside the delay it notes the processor time that the loop's thread has spent since the last beat. A delay may also come
from another thread that held the interpreter lock, or from another process that had the core; the work is the loop's own.

It knows no server. Neighbours: `watched_router`, `watched_frontend`.
"""

import asyncio
import time
from typing import Final

import msgspec
from aiohttp import web
from msgspec import Struct

from common.config import ServerOptions
from common.server.http import start_server, stop_on_signals

PATH: Final = "/bench/worst_beat"

_INTERVAL_S: Final = 0.001


class Worst(Struct, frozen=True, kw_only=True):
    """The longest delay of a beat, and the most processor time between two, in seconds; perhaps not of the same beat."""

    delay_s: float = 0.0
    work_s: float = 0.0


class Heartbeat:
    """Beats in the running event loop until that ends."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._worst = Worst()
        self._wait()

    def take_worst(self) -> Worst:
        """Give the worst since the last call, the beat that is due included."""
        self._note()
        worst, self._worst = self._worst, Worst()
        return worst

    def _wait(self) -> None:
        # Not the loop's time: uvloop's goes on only when the loop does.
        self._due, self._work_began = time.perf_counter() + _INTERVAL_S, time.thread_time()
        self._loop.call_later(_INTERVAL_S, self._beat)

    def _beat(self) -> None:
        self._note()
        self._wait()

    def _note(self) -> None:
        self._worst = Worst(
            delay_s=max(self._worst.delay_s, time.perf_counter() - self._due),
            work_s=max(self._worst.work_s, time.thread_time() - self._work_began),
        )


async def serve_watched(app: web.Application, port: int) -> None:
    """Serve an application with a heartbeat beside it until the process is told to stop; `PATH` gives the worst beats."""
    stop = stop_on_signals()
    heartbeat = Heartbeat()

    async def worst(_request: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(heartbeat.take_worst()))

    app.router.add_get(PATH, worst)
    runner = await start_server(app, ServerOptions(port=port, shutdown_deadline_s=1.0))
    await stop.wait()
    await runner.cleanup()
