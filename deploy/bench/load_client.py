"""`python -m deploy.bench.load_client HOST PORT REQUEST_FILE CONNECTIONS SECONDS`: a load generator, where there is no wrk.

It sends the file's bytes, a whole HTTP/1.1 request, on every connection, and again as soon as the answer is whole. Of
an answer it reads the status and the length, which must be there, and counts the rest: some 15,000 small answers a
second on a core. It ends with one line `RESULT {...}`, a `deploy.bench.load.LoadResult`.
"""

import asyncio
import json
import re
import statistics
import time
from pathlib import Path
from typing import Final, cast

import uvloop

from common.process import run_main

_HEAD_END: Final = b"\r\n\r\n"
_LENGTH: Final = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")


class Tally:
    """What all connections have seen."""

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.latencies_s: list[float] = []
        self.failures = 0
        self.is_over = False


class Connection(asyncio.Protocol):
    """One connection: a request, its answer, the next request."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._head = b""
        self._missing_bytes: int | None = None
        self._began = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def data_received(self, data: bytes) -> None:
        """Count an answer's bytes."""
        if self._missing_bytes is None:
            self._head += data
            end = self._head.find(_HEAD_END)
            if end < 0:
                return
            found = _LENGTH.search(self._head, 0, end + 2)
            if found is None or not self._head.startswith(b"HTTP/1.1 200"):
                self._tally.failures += 1
                self._transport.abort()
                return
            self._missing_bytes = int(found[1]) - (len(self._head) - end - len(_HEAD_END))
        else:
            self._missing_bytes -= len(data)
        if self._missing_bytes <= 0 and not self._tally.is_over:
            self._tally.latencies_s.append(time.perf_counter() - self._began)
            self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        """Count it, unless all is over."""
        self._tally.failures += not self._tally.is_over

    def _send(self) -> None:
        self._head, self._missing_bytes, self._began = b"", None, time.perf_counter()
        self._transport.write(self._tally.request)


def main(argv: list[str]) -> None:
    """Run one load and print what came of it."""
    host, port, request_file, connections, seconds = argv
    tally = Tally(Path(request_file).read_bytes())
    elapsed_s = uvloop.run(_load(tally, host, int(port), int(connections), float(seconds)))
    p50_ms = 1e3 * statistics.median(tally.latencies_s) if tally.latencies_s else 0.0
    result = {"answers": len(tally.latencies_s), "seconds": elapsed_s, "failures": tally.failures, "p50_ms": p50_ms}
    print("RESULT", json.dumps(result))


async def _load(tally: Tally, host: str, port: int, connections: int, seconds: float) -> float:
    loop = asyncio.get_running_loop()
    began = time.perf_counter()
    made = await asyncio.gather(
        *(loop.create_connection(lambda: Connection(tally), host, port) for _ in range(connections))
    )
    await asyncio.sleep(seconds)
    tally.is_over = True
    elapsed_s = time.perf_counter() - began
    for transport, _ in made:
        transport.abort()
    return elapsed_s


if __name__ == "__main__":
    run_main(main)
