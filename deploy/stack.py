"""A running stack: the children of a launch plan, from their start over the first answered request to their end.

Three ways in: `python -m deploy.up` (the command), `async with make_stack(...)` (in an event loop), and
`with running_stack(...)` (everywhere else: tests, the demo, the benchmark). A child that ends before it was told to is
an error that names it, or with `--restart` is started again; the other children are not touched.

It knows no option of any role: `deploy.launch_plan` has decided them all. The children are told apart by name, for
example `prefill-0`, `decode-0`, `router`. Neighbours: `deploy.child` (one of them), `deploy.up` (signals and exit codes).
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import aiohttp
import msgspec
from msgspec import Struct

from common.process import ensure_port_free, free_port
from common.server.http import bearer
from deploy.child import POLL_S, Child
from deploy.events import ChildError, ChildFenced, StackError, StackEvent
from deploy.launch_options import RoleName, Roles
from deploy.launch_plan import LaunchPlan, plan_launch
from deploy.process_tree import children_of
from deploy.roles import tandem_roles

__all__ = ["ChildError", "ChildFenced", "Stack", "StackError", "StackEvent", "make_stack", "running_stack"]

log = logging.getLogger(__name__)

FIRST_REQUEST_DEADLINE_S = 30.0

# Nobody may write into a decode worker's pages once it is gone, so its writers go first; the router before both.
STOP_ORDER: tuple[RoleName, ...] = ("router", "prefill", "decode", "aggregated")


class _WorkerHealth(Struct):
    url: str
    status: str


class _RouterHealth(Struct):
    """What is read of the router's GET /health."""

    workers: list[_WorkerHealth]


class Stack:
    """The children of one plan. `start` returns once the router has all workers and a real request has gone through.

    `stop` is always safe to call. The children's output, stdout too, goes to this process's stderr, or to the file
    `log_file` (appended). `events` is what happened to them, oldest first.
    """

    def __init__(self, plan: LaunchPlan, *, log_file: Path | None = None) -> None:
        self.plan = plan
        self.url = plan.url
        self.log_file = log_file
        self.events: list[StackEvent] = []
        self._is_ready = asyncio.Event()
        self._children = {
            command.name: Child(command, plan.launch, log_file=log_file, events=self.events, may_fence=self._is_ready)
            for command in plan.commands
        }
        self._lives: dict[str, asyncio.Task[NoReturn]] = {}

    # -------------------------------------------------------------------------------------------- the children

    def names(self, role: RoleName) -> list[str]:
        """The names of the children that have this role."""
        return [command.name for command in self.plan.commands if command.role == role]

    def pid(self, name: str) -> int:
        """The process id of the child `name`, for whoever kills or stops it: the latest one. Raises StackError if none."""
        process = self._children[name].process
        if process is None:
            raise StackError(f"{name} has not been started")
        return process.pid

    def engine_pids(self, name: str) -> list[int]:
        """The process ids of the engine's ranks below the worker `name`, in order. Raises StackError if there are none."""
        pids = children_of(self.pid(name))
        if not pids:
            raise StackError(f"{name} has no engine process")
        return pids

    def num_starts(self, name: str) -> int:
        """How often the child `name` has been started."""
        return self._children[name].num_starts

    async def wait_started(self, name: str, num_starts: int, deadline_s: float | None = None) -> None:
        """Wait until the child has been started so often and has answered /health with 200, in any event loop.

        Raises StackError past the deadline, by default that of a start, and ChildError if the child is not started again.
        """
        if deadline_s is None:
            deadline_s = self.plan.launch.startup_deadline_s
        child = self._children[name]
        try:
            async with asyncio.timeout(deadline_s):
                # The stack may live in another thread's event loop (`running_stack`), so nothing can be awaited.
                while child.num_starts < num_starts or not child.is_ready:
                    if self._lives[name].done():
                        self._lives[name].result()
                    await asyncio.sleep(POLL_S)
        except TimeoutError as error:
            seen = f"{child.num_starts} starts, last answer of /health: {child.last_answer}"
            raise StackError(f"{name}: no start number {num_starts} within {deadline_s:g} s; {seen}") from error

    def read_log(self) -> str:
        """What the children have written so far; only with a log file."""
        assert self.log_file is not None, "this stack's children write to stderr"
        return self.log_file.read_text(errors="replace")

    # -------------------------------------------------------------------------------------------- its life

    async def start(self) -> None:
        """Start all children, and wait until the router has all workers and the first answer.

        Raises ChildError if one ends for good meanwhile, StackError past the deadline; the caller calls `stop` in any case.
        """
        ensure_port_free(self.plan.launch.host, self.plan.launch.port)
        for note in self.plan.notes:
            log.info("%s", note)
        self._lives = {name: asyncio.create_task(child.live()) for name, child in self._children.items()}
        ready = asyncio.create_task(self._become_ready())
        try:
            done, _ = await asyncio.wait({ready, *self._lives.values()}, return_when=asyncio.FIRST_COMPLETED)
            if ready not in done:
                await self.wait()
            ready.result()
        finally:
            ready.cancel()
        self._is_ready.set()

    async def wait(self) -> NoReturn:
        """Wait until a child has ended for good, and raise ChildError for it."""
        await asyncio.wait(self._lives.values(), return_when=asyncio.FIRST_COMPLETED)
        next(life for life in self._lives.values() if life.done()).result()
        raise AssertionError("a child's life ends with an error")

    async def stop(self) -> None:
        """Stop every child in order, killing those that take longer than their deadline. None is started any more."""
        for life in self._lives.values():
            life.cancel()
        await asyncio.gather(*self._lives.values(), return_exceptions=True)
        for role in STOP_ORDER:
            await asyncio.gather(*(self._children[name].stop() for name in self.names(role)))

    def kill(self) -> None:
        """End every child at once; a `stop` that is under way then returns."""
        for child in self._children.values():
            child.kill()

    async def __aenter__(self) -> "Stack":
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _become_ready(self) -> None:
        deadline_s = self.plan.launch.startup_deadline_s
        waiting_for = ""
        try:
            async with asyncio.timeout(deadline_s):
                for child in self._children.values():
                    while not child.is_ready:
                        waiting_for = f"{child.command.name}'s /health: {child.last_answer}"
                        await asyncio.sleep(POLL_S)
                waiting_for = "the router"
                timeout = aiohttp.ClientTimeout(total=min(FIRST_REQUEST_DEADLINE_S, deadline_s))
                headers = bearer(self.plan.api_key)
                async with aiohttp.ClientSession(timeout=timeout, headers=headers) as session:
                    while obstacle := await self._obstacle(session):
                        waiting_for = f"the router's {obstacle}"
                        await asyncio.sleep(POLL_S)
        except TimeoutError as error:
            raise StackError(f"not ready: {deadline_s:g} s have passed, still waiting for {waiting_for}") from error

    async def _obstacle(self, session: aiohttp.ClientSession) -> str:
        """Say why the router cannot serve yet: a worker that it does not know to be well, or a real request; "" for nothing."""
        for path in ("/health", "/health_generate"):
            try:
                async with session.get(f"{self.url}{path}") as response:
                    body = await response.read()
            except (aiohttp.ClientError, OSError) as error:
                return f"{path}: {type(error).__name__}"
            if response.status != 200:
                return f"{path}: {response.status} {body[:300].decode(errors='replace')}"
            if path == "/health":
                # It asks them now and then: the first requests would all go to the pair that it happens to ask first.
                for worker in msgspec.json.decode(body, type=_RouterHealth).workers:
                    if worker.status != "ok":
                        return f"{path}: {worker.url}: {worker.status}"
        return ""


def make_stack(flags: list[str], *, roles: Roles | None = None, log_file: Path | None = None) -> Stack:
    """Plan a stack without starting it: `flags` are those of `deploy.up`, the port is a free one unless named.

    Raises UsageError.
    """
    return Stack(plan_launch([f"--port={free_port()}", *flags], roles or tandem_roles()), log_file=log_file)


@contextlib.contextmanager
def running_stack(flags: list[str], *, roles: Roles | None = None, log_file: Path | None = None) -> Iterator[Stack]:
    """Run a stack outside of any event loop, watched by a thread of its own.

    Raises UsageError, ChildError or StackError if it does not start.
    """
    stack = make_stack(flags, roles=roles, log_file=log_file)
    loop = asyncio.new_event_loop()
    # The children die with the thread that started them: with this one.
    thread = threading.Thread(target=loop.run_forever, name="stack", daemon=True)
    thread.start()

    def run(coroutine: Coroutine[None, None, None]) -> None:
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
        try:
            future.result()
        finally:
            # An interrupted start must not go on under the stop.
            future.cancel()

    try:
        try:
            run(stack.start())
            yield stack
        finally:
            run(stack.stop())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
