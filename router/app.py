"""The router's application: its parts put together, and a route for each thing that it can be asked.

Neighbours: `generate_api` and `openai_api` (the routes that generate), `intake` (what those share), `control` (the other
routes), `process` (runs this).
"""

from aiohttp import web

from common.server.admission import Admission
from common.server.http import answer_errors, require_key
from router.config import RouterConfig
from router.control import Control
from router.generate_api import GenerateApi
from router.intake import Intake
from router.legs import make_session
from router.membership import Membership
from router.metrics import RouterMetrics
from router.openai_api import OpenAIApi
from router.pair import Pairs
from router.registry import Registry


async def create_app(config: RouterConfig) -> web.Application:
    """Make the router's application, for the running event loop. It closes its connections when it is cleaned up."""
    session = make_session(
        connect_deadline_s=config.router.connect_deadline_s, worker_api_key=config.router.worker_api_key
    )
    membership, registry = Membership(config.router), Registry()
    metrics = RouterMetrics(membership)
    pairs = Pairs(session, membership, registry, metrics, verify_rows=config.router.verify_rows)
    intake = Intake(config.server.request_deadline_s, metrics)
    admission = Admission(config.server.max_open_requests)
    generate, openai = GenerateApi(pairs, admission), OpenAIApi(pairs, admission)

    async def close_session(_: web.Application) -> None:
        await session.close()

    app = web.Application(
        client_max_size=config.server.max_body_bytes,
        middlewares=[answer_errors(), require_key(config.server.api_key)],
    )
    app.on_cleanup.append(close_session)
    app.router.add_post("/generate", intake.handler(generate.generate))
    app.router.add_post("/v1/completions", intake.handler(openai.completions))
    app.router.add_post("/v1/chat/completions", intake.handler(openai.chat))
    app.add_routes(Control(config, session, membership, registry, pairs, metrics).routes())
    return app
