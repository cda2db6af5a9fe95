"""The load generator: several client processes that send their parts of a load at the same moment.

One process with one event loop would be the bottleneck of large replies. Neighbours: `client` (a process), `judge`
(reads what came back).
"""

import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from common.process import spawn, stop_process
from deploy.bench.options import BenchError
from deploy.bench.speed.client import END, GO, Job, Reply

_START_DEADLINE_S = 60.0
_STOP_DEADLINE_S = 5.0
_GRACE_S = 60.0


class Clients:
    """Client processes that are up."""

    def __init__(self, pipes: "Sequence[Connection[bytes, bytes]]") -> None:
        self._pipes = pipes

    def run(self, job: Job) -> Iterator[Reply]:
        """Send the job's bodies at once, dealt out to the processes; its background goes with the first process's.

        All replies are whole, and the clock has stopped, before the first one is given; they come in no order, and each
        is the caller's alone, so that whoever judges and drops them needs the memory of one. Raises BenchError if a
        process fails.
        """
        count = len(self._pipes)
        parts = [job.bodies[index::count] for index in range(count)]
        used = [(pipe, part) for pipe, part in zip(self._pipes, parts, strict=True) if part]
        for number, (pipe, part) in enumerate(used):
            background = [] if number else job.background
            pipe.send_bytes(msgspec.msgpack.encode(msgspec.structs.replace(job, bodies=part, background=background)))
        for pipe, _ in used:
            _receive(pipe, job.deadline_s)
        for pipe, _ in used:
            pipe.send_bytes(GO)
        # Whoever is done first must not be read, and judged, while others are being timed.
        firsts = [(pipe, _receive(pipe, job.deadline_s * (2 if job.background else 1))) for pipe, _ in used]
        for pipe, message in firsts:
            while message != END:
                yield msgspec.msgpack.decode(message, type=Reply)
                message = _receive(pipe, job.deadline_s)


@contextmanager
def running_clients(count: int) -> Iterator[Clients]:
    """Run `count` client processes for as long as the block lasts. Raises BenchError if one does not come up."""
    with ExitStack() as stack:
        address = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tandem-bench-"))) / "clients"
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(address))
        listener.listen(count)
        listener.settimeout(_START_DEADLINE_S)
        for _ in range(count):
            stack.callback(stop_process, spawn("deploy.bench.speed.client", [str(address)]), _STOP_DEADLINE_S)
        pipes: list[Connection[bytes, bytes]] = []
        for _ in range(count):
            try:
                accepted, _address = listener.accept()
            except TimeoutError as error:
                raise BenchError(f"a load generator has not started within {_START_DEADLINE_S:g} s") from error
            accepted.setblocking(True)
            pipes.append(stack.enter_context(Connection(accepted.detach())))
        yield Clients(pipes)


def _receive(pipe: "Connection[bytes, bytes]", deadline_s: float) -> bytes:
    try:
        if not pipe.poll(deadline_s + _GRACE_S):
            raise BenchError(f"a load generator says nothing for {deadline_s + _GRACE_S:g} s")
        return pipe.recv_bytes()
    except (EOFError, ConnectionError) as error:
        raise BenchError("a load generator has ended") from error
