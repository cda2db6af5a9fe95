"""The benchmarks' helper processes: started, waited for until they listen, and stopped.

It knows no helper. Neighbours: `common.process` (starts them), `router_rate` and `loop_stall` (need them).
"""

import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from common.process import spawn, stop_process
from deploy.bench.options import BenchError

HOST = "127.0.0.1"

_START_DEADLINE_S = 60.0
_STOP_DEADLINE_S = 5.0
_POLL_S = 0.02
_QUOTED_CHARS = 500


@contextmanager
def child(module: str, arguments: Sequence[str], *, ports: Sequence[int]) -> Iterator[None]:
    """Run `python -m module arguments...` for as long as the block lasts, from when it listens on all `ports`.

    What it prints is read only if it fails: load generators leave in the middle of answers, and servers tell of that.
    Raises BenchError if it does not come up.
    """
    with tempfile.TemporaryFile() as output:
        process = spawn(module, list(arguments), stdout=output, stderr=output)
        try:
            for port in ports:
                if not _listens(port, process):
                    output.seek(0)
                    told = output.read()[-_QUOTED_CHARS:].decode(errors="replace")
                    raise BenchError(f"{module} does not listen on port {port}: {told}")
            yield
        finally:
            stop_process(process, _STOP_DEADLINE_S)


def url_of(port: int) -> str:
    """Name a helper by its port."""
    return f"http://{HOST}:{port}"


def _listens(port: int, process: "subprocess.Popen[bytes]") -> bool:
    """Wait until somebody listens on the port; False if the process has ended, or time is up."""
    give_up = time.monotonic() + _START_DEADLINE_S
    while process.poll() is None and time.monotonic() < give_up:
        try:
            socket.create_connection((HOST, port), timeout=1).close()
        except OSError:
            time.sleep(_POLL_S)
        else:
            return True
    return False
