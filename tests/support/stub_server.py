"""A stand-in for a worker or the router: takes their flags, answers the health paths, and can misbehave."""

import sys
from typing import Annotated, Literal

from aiohttp import ClientSession, web
from msgspec import Struct

from common.config import EngineOptions, ModelOptions, ServerOptions, option, parse_config
from common.errors import UsageError
from common.process import run_main


class StubOptions(Struct, frozen=True, kw_only=True):
    """What the stand-in does wrong."""

    fault: Annotated[
        Literal["none", "usage", "crash", "unhealthy"], option("fail with exit code 2 or 3, or never be healthy")
    ] = "none"


class StubPrefillOptions(Struct, frozen=True, kw_only=True):
    """Options of the prefill worker alone."""

    bootstrap_port: Annotated[int, option("port for the decode workers", ge=1)]
    chunked_prefill_tokens: Annotated[int, option("largest chunk", ge=1)] = 64


class StubRouterOptions(Struct, frozen=True, kw_only=True):
    """Options of the router alone."""

    prefill: Annotated[tuple[tuple[str, int], ...], option("prefill worker", metavar=("URL", "BOOTSTRAP_PORT"))] = ()
    decode: Annotated[tuple[str, ...], option("decode worker")] = ()
    worker: Annotated[tuple[str, ...], option("aggregated worker")] = ()
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
    stub = StubOptions()
    if any(word.startswith("--bootstrap-port") for word in argv):
        prefill = parse_config(StubPrefillConfig, argv, prog="stub", description="")
        server, stub = prefill.server, prefill.stub
    elif "--decode" in argv or "--worker" in argv:
        router = parse_config(StubRouterConfig, argv, prog="stub", description="")
        server, workers = (
            router.server,
            [*(url for url, _ in router.router.prefill), *router.router.decode, *router.router.worker],
        )
    else:
        decode = parse_config(StubDecodeConfig, argv, prog="stub", description="")
        server, stub = decode.server, decode.stub
    if stub.fault == "usage":
        raise UsageError("this stub cannot be used")
    if stub.fault == "crash":
        return 3

    async def health(request: web.Request) -> web.Response:
        return web.Response(status=500 if stub.fault == "unhealthy" else 200, text=stub.fault)

    async def health_generate(request: web.Request) -> web.Response:
        async with ClientSession() as session:
            for url in workers:
                async with session.get(f"{url}/health") as response:
                    response.raise_for_status()
        return web.Response()

    app = web.Application()
    app.add_routes([web.get("/health", health), web.get("/health_generate", health_generate)])
    web.run_app(app, host=server.host, port=server.port, print=None)
    print("the stub has stopped", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_main(main)
