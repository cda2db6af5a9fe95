"""The router's application: its parts put together, and a route for each thing that it can be asked.

Neighbours: `generate_api` and `openai_api` (the routes that generate), `intake` (what those share), `pause_api` and `orders_api`
(a trainer's orders), `workers_api`, `control` (the other routes), `health` (runs beside them), `process` (runs this).
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from aiohttp import web

from common.server.admission import Admission
from common.server.http import make_application
from router.aborts import Aborts
from router.alone import Alone
from router.attempts import Attempts
from router.config import RouterConfig
from router.control import Control
from router.drain import Drain
from router.fanout import Fanout
from router.gate import Gate
from router.generate_api import GenerateApi
from router.health import HealthChecks
from router.intake import Intake
from router.legs import Legs, make_session
from router.membership import Membership
from router.metrics import RouterMetrics
from router.openai_api import OpenAIApi
from router.orders_api import OrdersApi
from router.pair import Pairs
from router.pause_api import PauseApi
from router.registry import Registry
from router.resume import Resumed
from router.workers_api import WorkersApi

DRAIN: Final = web.AppKey("drain", Drain)
"""Under this key an application has its orderly end."""
CHECKS: Final = web.AppKey("checks", HealthChecks)
"""Under this key it has what watches its workers."""


async def create_app(config: RouterConfig) -> web.Application:
    """Make the router's application, for the running event loop. It closes its connections when it is cleaned up."""
    options = config.router
    session = make_session(connect_deadline_s=options.connect_deadline_s, worker_api_key=options.worker_api_key)
    membership, registry, drain, gate = Membership(options), Registry(), Drain(), Gate()
    fanout = Fanout(session, membership)
    checks = HealthChecks(session, membership, options)
    metrics = RouterMetrics(membership)
    legs = Legs(session, max_reply_bytes=options.max_reply_bytes)
    aborts = Aborts(fanout, deadline_s=options.control_deadline_s)
    attempts = Attempts(
        Pairs(legs, options),
        Alone(legs, options),
        membership,
        gate,
        aborts,
        metrics,
        checks.ask_unwell,
        max_retries=options.max_retries,
    )
    prompts = Resumed(attempts, registry, metrics)
    intake = Intake(config.server.request_deadline_s, metrics, drain)
    admission = Admission(config.server.max_open_requests)
    mixes = options.allow_mixed_versions
    generate = GenerateApi(prompts, admission, allow_mixed_versions=mixes)
    openai = OpenAIApi(prompts, admission, allow_mixed_versions=mixes)

    async def run_beside(_: web.Application) -> AsyncIterator[None]:
        checking = asyncio.create_task(checks.run())
        yield
        checking.cancel()
        await asyncio.wait([checking])
        await aborts.close()
        await session.close()
        if not checking.cancelled():
            checking.result()

    app = make_application(config.server)
    app[DRAIN] = drain
    app[CHECKS] = checks
    app.cleanup_ctx.append(run_beside)
    app.router.add_post("/generate", intake.handler(generate.generate))
    app.router.add_post("/v1/completions", intake.handler(openai.completions))
    app.router.add_post("/v1/chat/completions", intake.handler(openai.chat))
    app.add_routes(WorkersApi(options, membership, drain).routes())
    app.add_routes(Control(config, fanout, registry, aborts, prompts, gate, metrics).routes())
    pauses = PauseApi(gate, registry, aborts, fanout, checks.ask_unwell, deadline_s=options.control_deadline_s)
    app.add_routes(pauses.routes())
    app.add_routes(OrdersApi(config, fanout, registry, aborts).routes())
    return app
