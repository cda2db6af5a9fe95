"""A worker's routes beside /generate: what it is, how it is doing, and aborts and flushes.

Neighbours: `app` (adds these), `engine_groups` (the engine), `common.observability` (the metrics' form).
"""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from aiohttp import web

from common.config import ModelOptions
from common.errors import MEMORY_RELEASED, RequestError
from common.ids import new_rid
from common.messages import (
    EngineReady,
    ErrorReport,
    Failed,
    Generate,
    ReportedError,
    RequestOptions,
    SamplingParams,
    WorkerKind,
    leg_of,
)
from common.observability.metrics import render_stats
from common.protocol.fields import Fields, decode_object
from common.protocol.replies import Reply, encode_json
from common.server.admission import Admission
from common.server.engine_groups import EngineGroups, summed
from common.server.updates import Updates


class WorkerControl:
    """Handlers of the control routes.

    `deadline` bounds a wait for the engine by so many seconds, None: by those of a request; it raises DeadlineExceeded.
    """

    def __init__(
        self,
        kind: WorkerKind,
        engine: EngineGroups,
        ready: EngineReady,
        model: ModelOptions,
        updates: Updates,
        admission: Admission,
        deadline: Callable[[float | None], AbstractAsyncContextManager[None]],
        *,
        health_deadline_s: float,
        bootstrap_port: int | None,
        enable_memory_saver: bool,
    ) -> None:
        self._kind: WorkerKind = kind
        self._engine = engine
        self._ready = ready
        self._model = model
        self._updates = updates
        self._admission = admission
        self._deadline = deadline
        self._health_deadline_s = health_deadline_s
        self._bootstrap_port = bootstrap_port
        self._enable_memory_saver = enable_memory_saver

    def routes(self) -> list[web.RouteDef]:
        """All routes of this class."""
        return [
            web.get("/health", self.health),
            web.get("/health_generate", self.health_generate),
            web.get("/server_info", self.server_info),
            web.get("/get_server_info", self.server_info),
            web.get("/model_info", self.model_info),
            web.get("/get_model_info", self.model_info),
            web.get("/v1/loads", self.loads),
            web.get("/metrics", self.metrics),
            web.get("/flush_cache", self.flush_cache),
            web.post("/flush_cache", self.flush_cache),
            web.post("/abort_request", self.abort_request),
        ]

    async def health(self, _: web.Request) -> web.Response:
        """Say whether this worker takes requests, and why not: 200, with the number of its attention groups, or 503."""
        if self._admission.is_closed:
            return _json({"status": "draining", "reason": "this server is shutting down"}, status=503)
        if (refusal := self._engine.refusal) is not None:
            status = "crowded" if self._engine.is_crowded else "unhealthy"
            if refusal.code == MEMORY_RELEASED:
                status = "released"
            return _json({"status": status, "reason": refusal.message}, status=503)
        return _json(
            {
                "status": "ok",
                "dp_size": self._engine.ranks.dp,
                "paused": self._updates.is_paused,
                "weight_version": self._updates.weight_version,
                "model_path": self._updates.model_path,
            }
        )

    async def health_generate(self, _: web.Request) -> web.Response:
        """Send one token through this worker's own engine, without another worker; 503 while generation is paused."""
        if self._updates.is_paused:
            paused = ErrorReport(status=503, message="generation is paused", code="paused", leg=leg_of(self._kind))
            raise ReportedError(paused)
        options = RequestOptions(sampling=SamplingParams(max_new_tokens=1, temperature=0.0))
        message = Generate(rid=f"health-{new_rid()}", input_ids=[0], options=options)
        async with self._deadline(self._health_deadline_s), self._engine.generate(message) as updates:
            async for update in updates:
                if isinstance(update, Failed):
                    raise ReportedError(update.error)
        return web.Response()

    async def server_info(self, _: web.Request) -> web.Response:
        """Give this worker's limits and its engine's statistics.

        The limits are those of one attention group, into which a request must fit; the statistics are sums over all groups.
        """
        ready, ranks = self._ready, self._engine.ranks
        async with self._deadline(None):
            stats = await self._engine.stats()
        return _json(
            {
                **self._model_fields(),
                "disaggregation_mode": leg_of(self._kind) or "null",
                "disaggregation_bootstrap_port": self._bootstrap_port,
                "dtype": ready.dtype,
                "device": ready.device,
                "tp_size": ranks.tp,
                "dp_size": ranks.dp,
                "ep": ranks.ep,
                "ep_size": ranks.tp if ranks.ep else 1,
                "pp_size": 1,
                "num_gpus": ranks.tp if ready.device.startswith("cuda") else 0,
                "load_balance_method": "follow_bootstrap_room" if self._kind == "prefill" else "shortest_queue",
                # A decode worker computes a prompt's attention group from its room, as the prefill worker does.
                "prefill_round_robin_balance": self._kind == "decode",
                "enable_memory_saver": self._enable_memory_saver,
                "memory_released": self._updates.released,
                "enable_return_routed_experts": True,
                "paused": self._updates.is_paused,
                "max_total_num_tokens": ready.kv_pool_tokens,
                "max_running_requests": ready.max_running_requests,
                "page_size": ready.page_size,
                "stats": stats,
            }
        )

    async def model_info(self, _: web.Request) -> web.Response:
        """Say which model this is, without asking the engine."""
        return _json({**self._model_fields(), "tokenizer_path": self._model.model, "is_generation": True})

    async def loads(self, _: web.Request) -> web.Response:
        """Say how much there is to do: open answers here, requests and pages in the engine, in all and by attention group."""
        async with self._deadline(None):
            groups = await self._engine.group_stats()
        stats, page_size = summed(groups), self._ready.page_size
        return _json(
            {
                "paused": self._updates.is_paused,
                "loads": [
                    {
                        "dp_rank": group,
                        "num_running_reqs": each.running_requests,
                        "num_waiting_reqs": each.queued_requests,
                        "num_used_tokens": (each.pages.total - each.pages.free) * page_size,
                        "max_total_num_tokens": each.pages.total * page_size,
                    }
                    for group, each in enumerate(groups)
                ],
                "open_requests": self._admission.num_open,
                "queued_requests": stats.queued_requests,
                "running_requests": stats.running_requests,
                "free_pages": stats.pages.free,
                "cached_pages": stats.pages.cached,
                "total_pages": stats.pages.total,
            }
        )

    async def metrics(self, _: web.Request) -> web.Response:
        """Give the metrics in Prometheus's text format."""
        async with self._deadline(None):
            stats = await self._engine.stats()
        return web.Response(body=render_stats(stats, self._kind), content_type="text/plain")

    async def flush_cache(self, _: web.Request) -> web.Response:
        """Forget all cached prefixes; 400 if the engine refuses."""
        async with self._deadline(None):
            refusal = await self._engine.flush_cache()
        if refusal is not None:
            raise ReportedError(ErrorReport(status=400, message=refusal, code="busy", leg=leg_of(self._kind)))
        return _json({"status": "ok"})

    async def abort_request(self, request: web.Request) -> web.Response:
        """End open requests, by the beginning of their rids or all of them: each answers with what it has."""
        fields = Fields(decode_object(await request.read()))
        if fields.boolean("abort_all", False):
            prefix = ""
        elif not (prefix := fields.string("rid", "")):
            raise RequestError("rid", "give the beginning of the rids to abort, or abort_all")
        return _json({"aborted": self._engine.finish_now(prefix)})

    def _model_fields(self) -> Reply:
        ready = self._ready
        return {
            "model_path": self._updates.model_path,
            "model_type": ready.model_type,
            "weight_version": self._updates.weight_version,
            "vocab_size": ready.vocab_size,
            "context_tokens": ready.context_tokens,
            "num_hidden_layers": ready.num_hidden_layers,
            "moe_layer_ids": ready.moe_layer_ids,
            "num_experts": ready.num_experts,
            "num_experts_per_tok": ready.top_k,
        }


def _json(body: Reply, status: int = 200) -> web.Response:
    return web.Response(status=status, body=encode_json(body), content_type="application/json")
