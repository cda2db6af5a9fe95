"""One child of a stack: started, asked for its health, killed when it stays silent, and started again if that is wanted.

It decides nothing about when: `deploy.fence` counts. It knows no other child. Neighbours: `deploy.stack`, which owns the
children, `deploy.launch_plan`, which made the command.
"""

import asyncio
import contextlib
import logging
import time
from pathlib import Path
from typing import Literal, NoReturn

import aiohttp
import msgspec
from msgspec import Struct

from common.errors import UsageError
from common.process import EXIT_USAGE, ensure_port_free, spawn_async, stop_process_async
from common.server.http import TAKES_NO_MORE
from deploy.events import ChildError, ChildFenced, EventKind, StackEvent
from deploy.fence import PROBE_DEADLINE_S, PROBE_PERIOD_S, Fence, Restarts
from deploy.launch_options import LaunchOptions
from deploy.launch_plan import Command
from deploy.process_tree import Processes, children_of

log = logging.getLogger(__name__)

POLL_S = 0.1
RELEASE_DEADLINE_S = 30.0
STDERR = 2

Health = Literal["good", "closed", "bad"]


class _HealthBody(Struct):
    """What is read of a bad answer to GET /health."""

    status: str = ""


class Child:
    """The processes that run one command, one after the other. What happens is appended to `events`.

    Nobody is fenced before `may_fence` is set: a stack that starts has a deadline of its own.
    """

    def __init__(
        self,
        command: Command,
        launch: LaunchOptions,
        *,
        log_file: Path | None,
        events: list[StackEvent],
        may_fence: asyncio.Event,
    ) -> None:
        self.command = command
        self.process: asyncio.subprocess.Process | None = None
        self.num_starts = 0
        self.is_ready = False
        """Whether this life of the child has given a good answer."""
        self.last_answer = "none yet"
        self._launch = launch
        self._log_file = log_file
        self._events = events
        self._may_fence = may_fence
        self._below = Processes([])

    async def live(self) -> NoReturn:
        """Run the child until it ends for good. Raises ChildError for that end."""
        restarts = Restarts(self._launch.max_restarts)
        while True:
            begun = time.monotonic()
            end = await self._live_once()
            is_refused = end.returncode == EXIT_USAGE and self.num_starts == 1
            if not self._launch.restart or is_refused:
                raise end
            pause_s = restarts.pause_after(time.monotonic() - begun)
            if pause_s is None:
                log.error("%s is given up: over %d ends in a minute", self.command.name, self._launch.max_restarts)
                raise end
            log.error("%s; it is started again in %.1f s", end, pause_s)
            await asyncio.sleep(pause_s)
            await self._wait_released()

    async def stop(self) -> None:
        """Tell the process to end, and kill it past its deadline; `live` must have been cancelled."""
        self._below.close()
        if self.process is None or self.process.returncode is not None:
            return
        returncode = await stop_process_async(self.process, self.command.stop_deadline_s)
        if returncode == 0:
            log.info("stopped %s", self.command.name)
        else:
            log.warning("%s, when told to stop", ChildError(self.command.name, returncode))

    def kill(self) -> None:
        """End the process at once."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()

    # -------------------------------------------------------------------------------------------- one life

    async def _live_once(self) -> ChildError:
        """Start the process and see it to its end; returns what that was."""
        process = await self._start()
        ending = asyncio.create_task(process.wait())
        watching = asyncio.create_task(self._watch())
        try:
            await asyncio.wait({ending, watching}, return_when=asyncio.FIRST_COMPLETED)
            if ending.done():
                end = ChildError(self.command.name, ending.result())
            else:
                why = watching.result()
                self._note("fenced", why)
                log.error("%s is killed: %s", self.command.name, why)
                self._remember_below()
                # The engine dies with it, even one that is stopped.
                self.kill()
                end = ChildFenced(self.command.name, await ending, why)
        finally:
            watching.cancel()
            ending.cancel()
        self.is_ready = False
        self._note("ended", str(end))
        return end

    async def _start(self) -> asyncio.subprocess.Process:
        command = self.command
        with contextlib.ExitStack() as files:
            output = files.enter_context(self._log_file.open("ab")) if self._log_file else STDERR
            process = await spawn_async(
                command.module, command.arguments, environment=command.environment, stdout=output, stderr=output
            )
        self.process = process
        self.num_starts += 1
        self.last_answer = "none yet"
        self._note("started" if self.num_starts == 1 else "restarted", f"pid {process.pid}")
        log.info("started %s, pid %d, %s", command.name, process.pid, command.url)
        return process

    async def _wait_released(self) -> None:
        """Wait until what the last process held is free, within bounds: it ends before the engine below it has."""
        last_obstacle = ""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RELEASE_DEADLINE_S):
                while obstacle := self._obstacle():
                    if obstacle != last_obstacle:
                        log.info("%s is not started again yet: %s", self.command.name, obstacle)
                    last_obstacle = obstacle
                    await asyncio.sleep(POLL_S)
        self._below.close()

    def _remember_below(self) -> None:
        assert self.process is not None
        self._below.close()
        self._below = Processes(children_of(self.process.pid))

    def _obstacle(self) -> str:
        """What a new process would find in its way; "" for nothing."""
        if not self._below.are_gone():
            return "its engine is still there"
        try:
            for host, port in self.command.addresses:
                ensure_port_free(host, port)
        except UsageError as error:
            return str(error)
        return ""

    # -------------------------------------------------------------------------------------------- health

    async def _watch(self) -> str:
        """Ask for the process's health for as long as it is well enough; returns why it must be killed."""
        timeout = aiohttp.ClientTimeout(total=PROBE_DEADLINE_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            # The first start is part of the stack's, which has a deadline.
            deadline_s = None if self.num_starts == 1 else self._launch.startup_deadline_s
            try:
                async with asyncio.timeout(deadline_s):
                    while True:
                        if await self._ask(session) == "good":
                            break
                        await asyncio.sleep(POLL_S)
            except TimeoutError:
                late = f"not healthy {self._launch.startup_deadline_s:g} s after its start"
                return f"{late}, last answer: {self.last_answer}"
            self._remember_below()
            self.is_ready = True
            self._note("ready")
            await self._may_fence.wait()
            fence = Fence(self._launch.fence_deadline_s)
            asked = time.monotonic()
            while True:
                await asyncio.sleep(PROBE_PERIOD_S)
                # Who drains will end, and who is crowded waits for another one to be fenced: killing either would cut requests.
                is_good = await self._ask(session) != "bad"
                now = time.monotonic()
                if fence.is_due(is_good=is_good, passed_s=now - asked):
                    silent = f"not healthy for {self._launch.fence_deadline_s:g} s"
                    return f"{silent}, last answer: {self.last_answer}"
                asked = now

    async def _ask(self, session: aiohttp.ClientSession) -> Health:
        """Ask once how the process is."""
        try:
            async with session.get(f"{self.command.url}/health") as response:
                body = await response.read()
        except (aiohttp.ClientError, OSError) as error:
            # A TimeoutError is an OSError.
            self.last_answer = f"none ({type(error).__name__})"
            return "bad"
        self.last_answer = f"{response.status} {body[:300].decode(errors='replace')}".rstrip()
        if response.status == 200:
            return "good"
        with contextlib.suppress(msgspec.DecodeError):
            if msgspec.json.decode(body, type=_HealthBody).status in TAKES_NO_MORE:
                return "closed"
        return "bad"

    def _note(self, kind: EventKind, detail: str = "") -> None:
        self._events.append(StackEvent(time.monotonic(), self.command.name, kind, detail))
