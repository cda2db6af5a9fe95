"""`python -m deploy.bench.floor_proxy PORT PREFILL_URL DECODE_URL`: the least that a router on aiohttp must do.

It sends the client's body to both workers at once and answers with their two bodies, one after the other: no parsing,
no checks, no merge, no deadline, no error handling. What the router costs more than this is what its work costs; what
this costs more than a worker asked directly is aiohttp.
"""

import asyncio
import signal

import aiohttp
import uvloop
from aiohttp import web

from common.process import run_main


def main(argv: list[str]) -> None:
    """Serve until the process is told to stop."""
    port, *urls = argv
    uvloop.run(_serve(int(port), urls))


async def _serve(port: int, urls: list[str]) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    connector = aiohttp.TCPConnector(limit=0, limit_per_host=0)
    async with aiohttp.ClientSession(connector=connector, read_bufsize=2**20) as session:

        async def ask(url: str, body: bytes, accept: str) -> bytes:
            headers = {"Content-Type": "application/json", "Accept": accept}
            async with session.post(f"{url}/generate", data=body, headers=headers) as response:
                return await response.read()

        async def forward(request: web.Request) -> web.Response:
            body, accept = await request.read(), request.headers["Accept"]
            return web.Response(body=b"".join(await asyncio.gather(*(ask(url, body, accept) for url in urls))))

        app = web.Application()
        app.router.add_post("/generate", forward)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await stop.wait()
        await runner.cleanup()


if __name__ == "__main__":
    run_main(main)
