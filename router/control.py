"""The routes beside /generate: health, what the router and its workers say of themselves, and metrics.

Neighbours: `app` (adds these), `pair` (one real request for /health_generate), `membership`.
"""

import asyncio
import json

import aiohttp
import msgspec
from aiohttp import web

from common.ids import new_rid
from common.messages import RequestOptions, SamplingParams
from common.protocol.generate import Sample
from router.config import RouterConfig
from router.membership import Membership, Worker
from router.metrics import RouterMetrics
from router.pair import Pairs

# What `generate_latest` of prometheus_client writes.
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Control:
    """Handlers of the control routes."""

    def __init__(
        self,
        config: RouterConfig,
        session: aiohttp.ClientSession,
        membership: Membership,
        pairs: Pairs,
        metrics: RouterMetrics,
    ) -> None:
        self._config = config
        self._session = session
        self._membership = membership
        self._pairs = pairs
        self._metrics = metrics

    def routes(self) -> list[web.RouteDef]:
        """All routes of this class."""
        return [
            web.get("/health", self.health),
            web.get("/health_generate", self.health_generate),
            web.get("/server_info", self.server_info),
            web.get("/get_server_info", self.server_info),
            web.get("/workers", self.workers),
            web.get("/metrics", self.metrics),
        ]

    async def health(self, _: web.Request) -> web.Response:
        """Say that this process is up, and which workers are."""
        answers = await self._ask_all("/health")
        workers = [
            {"url": worker.url, "worker_type": worker.role, "status": status or "unreachable"}
            for worker, (status, _) in zip(self._membership.workers, answers, strict=True)
        ]
        return web.json_response({"status": "ok", "workers": workers})

    async def health_generate(self, _: web.Request) -> web.Response:
        """Send one token through a pair, hand-over included; 200 if it came back."""
        sampling = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
        sample = Sample(rid=new_rid(), options=RequestOptions(sampling=sampling), input_ids=(0,))
        deadline = asyncio.get_running_loop().time() + self._config.router.health_deadline_s
        await self._pairs.answer(sample, deadline=deadline)
        return web.json_response({"status": "ok"})

    async def server_info(self, _: web.Request) -> web.Response:
        """Give the router's options and every worker's own account."""
        answers = await self._ask_all("/server_info")
        workers = [
            {"url": worker.url, "worker_type": worker.role, "status": status or "unreachable", "info": info}
            for worker, (status, info) in zip(self._membership.workers, answers, strict=True)
        ]
        return web.json_response({"role": "router", "config": msgspec.to_builtins(self._config), "workers": workers})

    async def workers(self, _: web.Request) -> web.Response:
        """List the workers and their outstanding requests."""
        return web.json_response(
            {
                "workers": [
                    {
                        "url": worker.url,
                        "worker_type": worker.role,
                        "bootstrap_port": worker.bootstrap_port,
                        "outstanding_requests": worker.outstanding,
                    }
                    for worker in self._membership.workers
                ]
            }
        )

    async def metrics(self, _: web.Request) -> web.Response:
        """Give the metrics in Prometheus's text format."""
        return web.Response(body=self._metrics.text(), headers={"Content-Type": _METRICS_TYPE})

    async def _ask_all(self, path: str) -> list[tuple[int | None, object]]:
        return await asyncio.gather(*(self._ask(worker, path) for worker in self._membership.workers))

    async def _ask(self, worker: Worker, path: str) -> tuple[int | None, object]:
        """GET a worker's route: its status (None: no answer in time) and its body, if that is JSON."""
        timeout = aiohttp.ClientTimeout(total=self._config.router.connect_deadline_s)
        try:
            async with self._session.get(worker.url + path, timeout=timeout) as response:
                body = await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None, None
        try:
            return response.status, json.loads(body)
        except ValueError:
            return response.status, None
