"""The router as a process: flags, event loop, signals, and an orderly end.

Neighbours: `common.process` (the shell around `main`), `app` (what is served).
"""

import asyncio

import uvloop

from common.observability.logging import configure_logging
from common.process import ensure_port_free
from common.server.http import start_server, stop_on_signals
from router.app import CHECKS, DRAIN, create_app
from router.config import RouterConfig, parse_router_config


def main(argv: list[str]) -> None:
    """Serve until SIGTERM or SIGINT; UsageError for options that cannot be used."""
    config = parse_router_config(argv)
    configure_logging("router", config.server.log_level)
    ensure_port_free(config.server.host, config.server.port)
    uvloop.run(serve(config))


async def serve(config: RouterConfig) -> None:
    """Serve until the process is told to stop; running requests then have the shutdown deadline to end.

    Raises what has ended the health checks, if that was before.
    """
    stop = stop_on_signals()
    app = await create_app(config)
    runner = await start_server(app, config.server)
    waits = [asyncio.create_task(event.wait()) for event in (stop, app[CHECKS].ended)]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    # Connections that are open stay so meanwhile: their clients hear that this router is draining.
    for site in list(runner.sites):
        await site.stop()
    await app[DRAIN].finish(config.server.shutdown_deadline_s)
    await runner.cleanup()
