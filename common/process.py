"""What every process of Tandem needs: an entry, an end that cannot be missed, children, and ports.

Entry: `run_main` is the whole of each `__main__.py`; a UsageError becomes one line and exit code 2. End: a child that
`spawn` started is killed by the kernel when its parent is gone, however that went, so nothing outlives its launcher.
Each child is a session of its own: Ctrl-C in a terminal reaches the launcher alone, which stops the rest in order.

A process can also be told from all others that ever ran (`own_mark`), and proven to be gone (`is_gone`).

It knows no role and no HTTP. Neighbours: `deploy.stack` starts workers and router with it, a worker its engine.
"""

import asyncio
import contextlib
import ctypes
import errno
import os
import random
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any, NoReturn

from msgspec import Struct

from common.errors import UsageError

PARENT_PID_VARIABLE = "TANDEM_PARENT_PID"
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

_PR_SET_PDEATHSIG = 1
_LISTENING_PORTS = range(10240, 32768)

Stream = int | IO[Any] | None
"""What `subprocess` takes as a child's stdout or stderr; None: the parent's."""


def run_main(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Run a process: `main` gets the arguments and returns the exit code, None for 0.

    Arranges `die_with_parent` first. A UsageError is one line on stderr and exit code 2, an interrupt is 130.
    """
    die_with_parent()
    try:
        code = main(sys.argv[1:]) or 0
    except UsageError as error:
        code = _say(error)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    sys.exit(code)


def run_and_leave(run: Callable[[], None]) -> NoReturn:
    """Run, and end the process at once, with the exit codes of `run_main`.

    Nothing is torn down in order: a device's libraries could wait for ever for other ranks that are gone or stuck.
    """
    code = 1
    try:
        run()
        code = 0
    except UsageError as error:
        code = _say(error)
    except Exception:  # noqa: BLE001  the top of a process
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _say(error: UsageError) -> int:
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    return EXIT_USAGE


def die_with_parent() -> None:
    """Let the kernel kill this process when the one that spawned it is gone (Linux); does nothing if nobody did.

    The kernel's "parent" is the *thread* that spawned us: see `spawn`.
    """
    # Taken out of the environment: a grandchild started in some other way must not mistake our parent for its own.
    parent_pid = os.environ.pop(PARENT_PID_VARIABLE, None)
    if parent_pid is None or sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # A parent that died before the call above sends no signal any more; by now we have been given to another process.
    if os.getppid() != int(parent_pid):
        sys.exit(1)


# ------------------------------------------------------------------------------------------------ who is alive


class ProcessMark(Struct, frozen=True, kw_only=True):
    """Tells one process from all others that ever ran; by it others on the same host can see whether it is gone."""

    boot_id: str
    """Drawn anew by the kernel at every start of the host."""
    network_namespace: int
    """Where no two processes can listen at one address at a time."""
    pid_namespace: int
    pid: int
    started_ticks: int
    """When the process started, by its host's clock."""


def own_mark() -> ProcessMark:
    """The mark of this process (Linux)."""
    started = _start_of(os.getpid())
    assert started is not None, "this process is running"
    return ProcessMark(
        boot_id=_boot_id(),
        network_namespace=_namespace("net"),
        pid_namespace=_namespace("pid"),
        pid=os.getpid(),
        started_ticks=started,
    )


def is_gone(mark: ProcessMark) -> bool:
    """Whether a process is proven to have ended: True only for one of this host that no longer runs.

    A stopped process still runs. Of a process elsewhere nothing can be said, so it is never proven to be gone.
    """
    if (mark.boot_id, mark.pid_namespace) != (_boot_id(), _namespace("pid")):
        return False
    return _start_of(mark.pid) != mark.started_ticks


def _start_of(pid: int) -> int | None:
    """When a process started, in the host's ticks; None if there is none, or only what is left of one that has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        # The second field, the name, may hold anything, spaces and brackets too.
        state, *fields = stat[stat.rindex(")") + 2 :].split()
        # A zombie whose other threads still run has not let go of its memory.
        if state in "ZX" and len(os.listdir(f"/proc/{pid}/task")) <= 1:
            return None
    except (OSError, ValueError):
        return None
    return int(fields[18])


@cache
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@cache
def _namespace(kind: str) -> int:
    return os.stat(f"/proc/self/ns/{kind}").st_ino


# ------------------------------------------------------------------------------------------------ children


def spawn(
    module: str,
    arguments: list[str],
    *,
    environment: Mapping[str, str] | None = None,
    stdout: Stream = None,
    stderr: Stream = None,
) -> subprocess.Popen[bytes]:
    """Start `python -m module arguments...` with this interpreter; the child dies with this process.

    Call it from a thread that lives as long as the child should, normally the main one. `environment` is added to ours.
    """
    return subprocess.Popen(
        _command(module, arguments),
        env=_child_environment(environment),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )


async def spawn_async(
    module: str,
    arguments: list[str],
    *,
    environment: Mapping[str, str] | None = None,
    stdout: Stream = None,
    stderr: Stream = None,
) -> asyncio.subprocess.Process:
    """Do as `spawn` does, for an event loop: `wait()` is awaitable, and the loop's thread is the child's parent."""
    return await asyncio.create_subprocess_exec(
        *_command(module, arguments),
        env=_child_environment(environment),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )


def stop_process(process: subprocess.Popen[bytes], deadline_s: float) -> int:
    """SIGTERM, and SIGKILL when `deadline_s` have passed; returns the exit code (negative: the signal that did it)."""
    process.terminate()
    try:
        return process.wait(deadline_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


async def stop_process_async(process: asyncio.subprocess.Process, deadline_s: float) -> int:
    """Do as `stop_process` does, for a child of `spawn_async`."""
    # The child may have ended without the loop having been told so yet: then there is nobody to signal.
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        return await asyncio.wait_for(process.wait(), deadline_s)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        return await process.wait()


def _command(module: str, arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def _child_environment(added: Mapping[str, str] | None) -> dict[str, str]:
    return {**os.environ, **(added or {}), PARENT_PID_VARIABLE: str(os.getpid())}


# ------------------------------------------------------------------------------------------------ ports


def ensure_port_free(host: str, port: int) -> None:
    """Raise UsageError if nobody could listen on `host:port` now: the operator reads one line, not a traceback."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As servers do: a port whose last connections are only lingering in TIME_WAIT is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"port {port} on {host} is in use") from error
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


def free_port_runs(lengths: Sequence[int], host: str = "127.0.0.1") -> list[int]:
    """Choose the first ports of runs of so many consecutive ports that nobody listens on; no two runs overlap.

    Another process may still be faster: use them soon. They lie below the range from which systems choose the ports of
    outgoing connections, which could take them meanwhile.
    """
    starts: list[int] = []
    taken: set[int] = set()
    candidates = iter(random.sample(_LISTENING_PORTS, len(_LISTENING_PORTS)))
    for length in lengths:
        for start in candidates:
            run = range(start, start + length)
            if taken.isdisjoint(run) and run.stop <= _LISTENING_PORTS.stop and _are_free(host, run):
                break
        else:
            raise UsageError(f"there are no {length} consecutive free ports on {host}")
        starts.append(start)
        taken.update(run)
    return starts


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Choose `count` different ports that nobody listens on, as `free_port_runs` does."""
    return free_port_runs([1] * count, host)


def free_port(host: str = "127.0.0.1") -> int:
    """Choose one port that nobody listens on."""
    return free_ports(1, host)[0]


def _are_free(host: str, ports: range) -> bool:
    try:
        for port in ports:
            ensure_port_free(host, port)
    except UsageError:
        return False
    return True
