"""`python -m deploy.bench.stub_workers PREFILL_PORT DECODE_PORT P G`: two workers that answer at once, in one process.

Every answer was made before: a reply of P prompt tokens and G output tokens, with its rows if the request asks for
them, as msgpack, int32 JSON or an event stream. HTTP is read only as far as the requests of the router, the proxy and the load
generators need, because whatever is spent here is missing from what is measured.

Neighbours: `material` (the replies), `router_rate` and `loop_stall` (start this).
"""

import asyncio
import re
import signal
from functools import cache
from typing import Final, cast

import uvloop

from common.messages import Leg
from common.process import run_main
from common.protocol.replies import MSGPACK
from deploy.bench.material import Exchange, LegForm

_HEAD_END: Final = b"\r\n\r\n"
_LENGTH: Final = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
_CONTENT_TYPES: Final[dict[LegForm, str]] = {
    "msgpack": MSGPACK,
    "json": "application/json",
    "stream": "text/event-stream",
}


def main(argv: list[str]) -> None:
    """Serve until the process is told to stop."""
    prefill_port, decode_port, prompt_tokens, output_tokens = map(int, argv)
    uvloop.run(_serve({"prefill": prefill_port, "decode": decode_port}, Exchange(prompt_tokens, output_tokens)))


async def _serve(ports: dict[Leg, int], exchange: Exchange) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    for leg, port in ports.items():
        await loop.create_server(_answers_of(leg, exchange), "127.0.0.1", port)
    await stop.wait()


def _answers_of(leg: Leg, exchange: Exchange) -> type[asyncio.Protocol]:
    @cache
    def answer(form: LegForm, rows: bool) -> bytes:
        body = exchange.leg_body(leg, form, rows=rows)
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {_CONTENT_TYPES[form]}\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    class Connection(asyncio.Protocol):
        """One connection; requests on it are answered one after the other."""

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self._transport = cast(asyncio.Transport, transport)
            self._pending = b""

        def data_received(self, data: bytes) -> None:
            self._pending += data
            while (end := self._pending.find(_HEAD_END)) >= 0:
                head, begin = self._pending[:end], end + len(_HEAD_END)
                found = _LENGTH.search(head)
                stop = begin + (int(found[1]) if found else 0)
                if len(self._pending) < stop:
                    return
                self._answer(head, self._pending[begin:stop])
                self._pending = self._pending[stop:]

        def _answer(self, head: bytes, body: bytes) -> None:
            form: LegForm = "msgpack" if MSGPACK.encode() in head else "json"
            if b'"stream":true' in body:
                form = "stream"
            self._transport.write(answer(form, b'"return_routed_experts":true' in body))

    return Connection


if __name__ == "__main__":
    run_main(main)
