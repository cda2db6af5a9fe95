"""Where held engines ask, and the test decides who may go on. Neighbour: `held`, the other end."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

PACE_S = 0.02
"""While it is waited for company, a step takes so long, so that nobody is done before all are there."""


class Hold:
    """One stage's hold: the first engine whose question `is_it` accepts stays where it is until `release`."""

    def __init__(self, stage: str, is_it: Callable[[int], bool]) -> None:
        self.reached: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        """The process id of the engine that is held."""
        self._stage = stage
        self._is_it = is_it
        self._released = asyncio.Event()

    def release(self) -> None:
        """Let everybody go on."""
        self._released.set()

    async def on_question(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer an engine, by closing its connection."""
        try:
            stage, count, pid = (await reader.readline()).decode().split()
            if stage != self._stage:
                return
            if self._is_it(int(count)) and not self.reached.done():
                self.reached.set_result(int(pid))
            if self.reached.done() and self.reached.result() == int(pid):
                await self._released.wait()
            elif stage == "decode":
                await asyncio.sleep(PACE_S)
        finally:
            writer.close()


@asynccontextmanager
async def holding(path: Path, stage: str, is_it: Callable[[int], bool]) -> AsyncIterator[Hold]:
    """Hold a stage at the socket `path` until the block is left."""
    hold = Hold(stage, is_it)
    server = await asyncio.start_unix_server(hold.on_question, path)
    try:
        yield hold
    finally:
        hold.release()
        server.close()
        os.unlink(path)
