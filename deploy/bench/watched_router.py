"""`python -m deploy.bench.watched_router PORT PREFILL_URL DECODE_URL`: the router with a heartbeat in its event loop."""

import uvloop

from common.observability.logging import configure_logging
from common.process import run_main
from deploy.bench.heartbeat import serve_watched
from router.app import create_app
from router.config import RouterConfig, RouterOptions


def main(argv: list[str]) -> None:
    """Serve until the process is told to stop."""
    configure_logging("router", "warning")
    port, prefill_url, decode_url = argv
    options = RouterOptions(prefill=((prefill_url, 1),), decode=(decode_url,))
    uvloop.run(_serve(int(port), RouterConfig(router=options)))


async def _serve(port: int, config: RouterConfig) -> None:
    await serve_watched(await create_app(config), port)


if __name__ == "__main__":
    run_main(main)
