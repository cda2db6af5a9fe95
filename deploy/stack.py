"""A running stack: the children of a launch plan, from their start over the first answered request to their end.

Three ways in: `python -m deploy.up` (the command), `async with make_stack(...)` (in an event loop), and
`with running_stack(...)` (everywhere else: tests, the demo, the benchmark). A child that ends before it was told to is
an error that names it.

It knows no option of any role: `deploy.launch_plan` has decided them all. The children are told apart by name, for
example `prefill-0`, `decode-0`, `router`.
"""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import aiohttp

from common.errors import TandemError
from common.process import ensure_port_free, free_port, spawn_async, stop_process_async
from common.server.http import bearer
from deploy.launch_options import RoleName, Roles
from deploy.launch_plan import Command, LaunchPlan, plan_launch
from deploy.roles import tandem_roles

log = logging.getLogger(__name__)

POLL_S = 0.1
PROBE_DEADLINE_S = 30.0
STDERR = 2

# Nobody may write into a decode worker's pages once it is gone, so its writers go first; the router before both.
STOP_ORDER: tuple[RoleName, ...] = ("router", "prefill", "decode", "aggregated")


class StackError(TandemError):
    """The stack could not start, or could not go on."""


class ChildError(StackError):
    """A child ended by itself. `returncode` is negative for a signal."""

    def __init__(self, name: str, returncode: int) -> None:
        how = (
            f"was killed by {signal.Signals(-returncode).name}" if returncode < 0 else f"exited with code {returncode}"
        )
        super().__init__(f"{name} {how}")
        self.name = name
        self.returncode = returncode


class Stack:
    """The children of one plan. `start` returns once a real request has gone through; `stop` is always safe to call.

    The children's output, stdout too, goes to this process's stderr, or to the file `log_file` (appended).
    """

    def __init__(self, plan: LaunchPlan, *, log_file: Path | None = None) -> None:
        self.plan = plan
        self.url = plan.url
        self.log_file = log_file
        self._children: dict[str, asyncio.subprocess.Process] = {}
        self._ends: dict[str, asyncio.Task[int]] = {}
        self._waiting_for = "the children's start"

    def pid(self, name: str) -> int:
        """The process id of the child `name`, for tests that kill or stop one."""
        return self._children[name].pid

    def read_log(self) -> str:
        """What the children have written so far; only with a log file."""
        assert self.log_file is not None, "this stack's children write to stderr"
        return self.log_file.read_text(errors="replace")

    async def start(self) -> None:
        """Start all children and wait for the first answer.

        Raises ChildError if one ends meanwhile, StackError past the deadline; the caller calls `stop` in any case.
        """
        ensure_port_free(self.plan.host, self.plan.port)
        for note in self.plan.notes:
            log.info("%s", note)
        for command in self.plan.commands:
            await self._start_child(command)
        ready = asyncio.create_task(self._become_ready())
        try:
            done, _ = await asyncio.wait({ready, *self._ends.values()}, return_when=asyncio.FIRST_COMPLETED)
            if ready not in done:
                await self.wait()
            ready.result()
        finally:
            ready.cancel()

    async def wait(self) -> NoReturn:
        """Wait until a child ends by itself, and raise ChildError for it."""
        await asyncio.wait(self._ends.values(), return_when=asyncio.FIRST_COMPLETED)
        name, end = next((name, end) for name, end in self._ends.items() if end.done())
        raise ChildError(name, end.result())

    async def stop(self) -> None:
        """Stop every child in order, killing those that take longer than their deadline."""
        for role in STOP_ORDER:
            await asyncio.gather(*(self._stop_child(each) for each in self.plan.commands if each.role == role))

    def kill(self) -> None:
        """End every child at once; a `stop` that is under way then returns."""
        for child in self._children.values():
            with contextlib.suppress(ProcessLookupError):
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

    async def _start_child(self, command: Command) -> None:
        with contextlib.ExitStack() as files:
            output = files.enter_context(self.log_file.open("ab")) if self.log_file else STDERR
            child = await spawn_async(
                command.module, command.arguments, environment=command.environment, stdout=output, stderr=output
            )
        self._children[command.name] = child
        self._ends[command.name] = asyncio.create_task(child.wait())
        log.info("started %s, pid %d, %s", command.name, child.pid, command.url)

    async def _stop_child(self, command: Command) -> None:
        child = self._children.get(command.name)
        if child is None or child.returncode is not None:
            return
        returncode = await stop_process_async(child, command.stop_deadline_s)
        if returncode == 0:
            log.info("stopped %s", command.name)
        else:
            log.warning("%s, when told to stop", ChildError(command.name, returncode))

    async def _become_ready(self) -> None:
        timeout = aiohttp.ClientTimeout(total=min(PROBE_DEADLINE_S, self.plan.startup_deadline_s))
        try:
            async with (
                asyncio.timeout(self.plan.startup_deadline_s),
                aiohttp.ClientSession(timeout=timeout, headers=bearer(self.plan.api_key)) as session,
            ):
                for command in self.plan.commands:
                    await self._answer_of(session, f"{command.name}'s /health", f"{command.url}/health")
                await self._answer_of(session, "the router's /health_generate", f"{self.url}/health_generate")
        except TimeoutError as error:
            passed = f"{self.plan.startup_deadline_s:g} s have passed"
            raise StackError(f"not ready: {passed}, still waiting for {self._waiting_for}") from error

    async def _answer_of(self, session: aiohttp.ClientSession, what: str, url: str) -> None:
        """Ask until the answer is 200; the last other answer is kept for the error message."""
        self._waiting_for = what
        while True:
            try:
                async with session.get(url) as response:
                    if response.status == 200:
                        return
                    self._waiting_for = f"{what}: {response.status} {(await response.text())[:300]}"
            except (aiohttp.ClientError, TimeoutError) as error:
                self._waiting_for = f"{what}: {type(error).__name__}"
            await asyncio.sleep(POLL_S)


def make_stack(flags: list[str], *, roles: Roles | None = None, log_file: Path | None = None) -> Stack:
    """Plan a stack without starting it: `flags` are those of `deploy.up`, the port is a free one unless named.

    Raises UsageError.
    """
    return Stack(plan_launch([f"--port={free_port()}", *flags], roles or tandem_roles()), log_file=log_file)


@contextlib.contextmanager
def running_stack(flags: list[str], *, roles: Roles | None = None, log_file: Path | None = None) -> Iterator[Stack]:
    """Run a stack outside of any event loop.

    Raises UsageError, ChildError or StackError if it does not start. Call it from the main thread: the children die
    with the thread that started them.
    """
    stack = make_stack(flags, roles=roles, log_file=log_file)
    with asyncio.Runner() as runner:
        try:
            runner.run(stack.start())
            yield stack
        finally:
            runner.run(stack.stop())
