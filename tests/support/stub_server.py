"""A stand-in for a worker or the router: takes their flags, answers the health paths, and can misbehave."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

from aiohttp import ClientSession, web
from msgspec import Struct

from common.config import EngineOptions, ModelOptions, ServerOptions, option, parse_config
from common.errors import UsageError
from common.process import ensure_port_free, run_main


class StubOptions(Struct, frozen=True, kw_only=True):
    """What the stand-in does wrong."""

    fault: Annotated[
        Literal["none", "usage", "crash", "unhealthy"], option("fail with exit code 2 or 3, or never be healthy")
    ] = "none"
    sick_file: Annotated[str, option("be unhealthy if this file exists at the start; empty: never")] = ""
    lasting_child: Annotated[bool, option("have a child that does not die with this process")] = False
    refusing_file: Annotated[str, option("fail with exit code 2 while this file exists; empty: never")] = ""


class Health:
    """What /health answers; a router at first says `num_unseen` times that it has not asked its workers yet.

    POST /misbehave?status=S&text=T&count=N changes the next N answers; GET /misbehaved counts all those.
    """

    def __init__(self, fault: str, workers: list[str], num_unseen: int) -> None:
        self._workers = workers
        self._num_unseen = num_unseen
        self._text = fault
        self._status = 500
        self._num_left = sys.maxsize if fault in ("sick", "unhealthy") else 0
        self._num_given = 0

    async def misbehave(self, request: web.Request) -> web.Response:
        query = request.query
        self._status, self._text, self._num_left = int(query["status"]), query["text"], int(query["count"])
        return web.Response()

    async def misbehaved(self, request: web.Request) -> web.Response:
        return web.json_response(self._num_given)

    async def answer(self, request: web.Request) -> web.Response:
        if self._num_left == 0:
            status = "not asked yet" if self._num_given < self._num_unseen else "ok"
            self._num_given += status != "ok"
            return web.json_response({"workers": [{"url": url, "status": status} for url in self._workers]})
        self._num_left -= 1
        self._num_given += 1
        return web.Response(status=self._status, text=self._text)


class StubPrefillOptions(Struct, frozen=True, kw_only=True):
    """Options of the prefill worker alone."""

    bootstrap_port: Annotated[int, option("port for the decode workers", ge=1)] = 8998
    chunked_prefill_tokens: Annotated[int, option("largest chunk", ge=1)] = 64


class StubRouterOptions(Struct, frozen=True, kw_only=True):
    """Options of the router alone."""

    prefill: Annotated[tuple[tuple[str, int], ...], option("prefill worker", metavar=("URL", "BOOTSTRAP_PORT"))] = ()
    decode: Annotated[tuple[str, ...], option("decode worker")] = ()
    worker: Annotated[tuple[str, ...], option("aggregated worker")] = ()
    unseen: Annotated[int, option("so many answers name workers that it has not asked yet")] = 0
    policy: Annotated[Literal["random", "round_robin"], option("which pair")] = "random"


class StubPrefillConfig(Struct, frozen=True):
    """As the prefill worker's."""

    model: ModelOptions
    prefill: StubPrefillOptions
    engine: EngineOptions = EngineOptions()
    server: ServerOptions = ServerOptions()
    stub: StubOptions = StubOptions()


class StubDecodeConfig(Struct, frozen=True):
    """As the decode worker's."""

    model: ModelOptions
    engine: EngineOptions = EngineOptions()
    server: ServerOptions = ServerOptions()
    stub: StubOptions = StubOptions()


class StubAggregatedConfig(Struct, frozen=True):
    """As the aggregated worker's."""

    model: ModelOptions
    engine: EngineOptions = EngineOptions()
    server: ServerOptions = ServerOptions()
    stub: StubOptions = StubOptions()


class StubRouterConfig(Struct, frozen=True):
    """As the router's."""

    router: StubRouterOptions
    server: ServerOptions = ServerOptions()


def main(argv: list[str]) -> int:
    """Serve until told to stop."""
    print("a line on stdout that must not reach the launcher's stdout")
    workers: list[str] = []
    num_unseen = 0
    stub = StubOptions()
    if any(word.startswith("--bootstrap-port") for word in argv):
        prefill = parse_config(StubPrefillConfig, argv, prog="stub", description="")
        server, stub = prefill.server, prefill.stub
    elif "--decode" in argv or "--worker" in argv:
        router = parse_config(StubRouterConfig, argv, prog="stub", description="")
        server, num_unseen = router.server, router.router.unseen
        workers = [*(url for url, _ in router.router.prefill), *router.router.decode, *router.router.worker]
    else:
        decode = parse_config(StubDecodeConfig, argv, prog="stub", description="")
        server, stub = decode.server, decode.stub
    if stub.fault == "usage" or (stub.refusing_file and Path(stub.refusing_file).exists()):
        raise UsageError("this stub cannot be used")
    if stub.fault == "crash":
        return 3

    ensure_port_free(server.host, server.port)
    is_sick = bool(stub.sick_file) and Path(stub.sick_file).exists()
    health = Health("sick" if is_sick else stub.fault, workers, num_unseen)

    async def health_generate(request: web.Request) -> web.Response:
        async with ClientSession() as session:
            for url in workers:
                async with session.get(f"{url}/health") as response:
                    response.raise_for_status()
        return web.Response()

    if stub.lasting_child:
        subprocess.Popen(["sleep", "100"])
    app = web.Application()
    app.add_routes(
        [
            web.get("/health", health.answer),
            web.post("/misbehave", health.misbehave),
            web.get("/misbehaved", health.misbehaved),
            web.get("/health_generate", health_generate),
        ]
    )
    web.run_app(app, host=server.host, port=server.port, print=None)
    print("the stub has stopped", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_main(main)
