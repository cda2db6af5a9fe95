"""Starting processes; waiting without sleeping until one is gone, has printed a line, until something holds, with deadlines."""

import asyncio
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

DEADLINE_S = 60.0
REPOSITORY = Path(__file__).resolve().parents[2]


class Watched:
    """A process that need not be our child, watched from before whatever is about to end it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._fd = os.pidfd_open(pid)

    def wait_gone(self, deadline_s: float = DEADLINE_S) -> None:
        """Return once the process has ended; the system tells us, whoever its parent is by then."""
        try:
            readable, _, _ = select.select([self._fd], [], [], deadline_s)
            assert readable, f"process {self.pid} is still there after {deadline_s} s"
        finally:
            os.close(self._fd)


async def until(condition: Callable[[], bool]) -> None:
    """Return in the event loop's turn in which the condition has become true."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if condition():
                return
            await asyncio.sleep(0)


def read_line(process: subprocess.Popen[bytes], deadline_s: float = DEADLINE_S) -> str:
    """One line of the process's stdout; "" if it has closed it instead. stdout must be an unbuffered pipe."""
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], deadline_s)
    assert readable, f"no line on stdout within {deadline_s} s"
    return process.stdout.readline().decode().rstrip("\n")


@contextmanager
def started(module: str, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
    """A module of ours as a process, which ends with the block; stderr goes where stdout goes, for `read_line`."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *flags],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
    )
    try:
        yield process
    finally:
        end(process)


def until_listening(process: subprocess.Popen[bytes]) -> None:
    """Read what a server prints until it says that it listens."""
    lines = []
    while "listening on" not in (line := read_line(process)):
        lines.append(line)
        assert process.poll() is None, lines


def started_pids(log: str) -> dict[str, int]:
    """The children that the launcher has named in its log."""
    return {name: int(pid) for name, pid in re.findall(r"started (\S+), pid (\d+)", log)}


def end(process: subprocess.Popen[bytes]) -> None:
    """Make sure that a test leaves nothing behind, also when it fails."""
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
