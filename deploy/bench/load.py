"""Load: one request, sent over and over by so many connections for so long, and how many answers came a second.

The generator is `wrk` where it is on PATH (it costs the machine the least), else `load_client`; both run in a process
of their own. Neighbours: `load_client`, `router_rate`.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from deploy.bench.options import BenchError

_GRACE_S = 30.0
_LUA_RESULT = """
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    'RESULT {"answers": %d, "seconds": %f, "failures": %d, "p50_ms": %f}\\n', summary.requests,
    summary.duration / 1e6, e.connect + e.read + e.write + e.status + e.timeout, latency:percentile(50) / 1e3))
end
"""


class Load(Struct, frozen=True, kw_only=True):
    """What to send where, how often at a time and for how long."""

    url: str
    body: bytes
    accept: str
    connections: int
    duration_s: float


class LoadResult(Struct, frozen=True, kw_only=True):
    """What came back: whole answers with status 200, and everything else."""

    answers: int
    seconds: float
    failures: int
    p50_ms: float

    @property
    def answers_per_s(self) -> float:
        """The rate."""
        return self.answers / self.seconds


def generate_load(load: Load) -> LoadResult:
    """Run one load. Raises BenchError if any request fails, or none is answered."""
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        command = load_command(load, Path(folder))
        done = subprocess.run(command, capture_output=True, timeout=load.duration_s + _GRACE_S, check=False)
    found = re.search(rb"^RESULT (.*)$", done.stdout, re.MULTILINE)
    if found is None:
        raise BenchError(f"{command[0]} failed with code {done.returncode}: {done.stderr[-300:].decode()}")
    result = msgspec.json.decode(found[1], type=LoadResult)
    if result.failures or not result.answers:
        raise BenchError(f"{load.url}: {result.failures} requests failed, {result.answers} were answered")
    return result


def load_command(load: Load, folder: Path) -> list[str]:
    """Choose a generator, write its input into `folder`, and give its command."""
    return _wrk_command(load, folder) or _own_command(load, folder)


def _wrk_command(load: Load, folder: Path) -> list[str] | None:
    wrk = shutil.which("wrk")
    # It counts in whole seconds.
    if wrk is None or load.duration_s < 1:
        return None
    script = folder / "load.lua"
    headers: Mapping[str, str] = {"Content-Type": "application/json", "Accept": load.accept}
    set_headers = "".join(f'wrk.headers["{name}"] = "{value}"\n' for name, value in headers.items())
    # Lua takes a long string between these brackets as it is.
    script.write_text(f'wrk.method = "POST"\nwrk.body = [==[{load.body.decode()}]==]\n{set_headers}{_LUA_RESULT}')
    flags = [f"-c{load.connections}", "-t1", f"-d{round(load.duration_s)}s", f"-s{script}"]
    return [wrk, *flags, f"{load.url}/generate"]


def _own_command(load: Load, folder: Path) -> list[str]:
    request = folder / "request"
    parts = urlsplit(load.url)
    head = (
        f"POST /generate HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        f"Accept: {load.accept}\r\nContent-Length: {len(load.body)}\r\n\r\n"
    )
    request.write_bytes(head.encode() + load.body)
    where = [str(parts.hostname), str(parts.port), str(request), str(load.connections), str(load.duration_s)]
    return [sys.executable, "-m", "deploy.bench.load_client", *where]
