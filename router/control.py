"""The routes that generate nothing: health, what the router and its workers say of themselves, orders to all, and metrics.

Neighbours: `app` (adds these), `attempts` (one real request for /health_generate), `membership` and `registry` (whom to tell).
"""

import asyncio
import json
import time
from collections.abc import Sequence

import aiohttp
import msgspec
from aiohttp import web
from msgspec import Struct

from common.errors import NoHealthyPair, RequestError
from common.ids import new_rid
from common.messages import RequestOptions, SamplingParams
from common.protocol.fields import Fields, decode_object
from common.protocol.generate import Sample
from router.attempts import Attempts
from router.config import RouterConfig
from router.drain import Drain
from router.legs import read_at_most
from router.membership import Membership, Worker
from router.metrics import RouterMetrics
from router.registry import OpenSample, Registry

# What `generate_latest` of prometheus_client writes.
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_MAX_ANSWER_BYTES = 2**24


class WorkerAnswer(Struct, frozen=True):
    """What one worker answered: its status, None if it did not in time, and its body if that is JSON."""

    worker: Worker
    status: int | None
    body: object = None

    @property
    def is_good(self) -> bool:
        """Say whether the worker did what it was asked for."""
        return self.status == 200

    def report(self) -> dict[str, object]:
        """Make the worker's entry in an answer."""
        return {
            "url": self.worker.url,
            "worker_type": self.worker.role,
            "status": "unreachable" if self.status is None else self.status,
        }


class Control:
    """Handlers of the control routes."""

    def __init__(
        self,
        config: RouterConfig,
        session: aiohttp.ClientSession,
        membership: Membership,
        registry: Registry,
        attempts: Attempts,
        metrics: RouterMetrics,
        drain: Drain,
    ) -> None:
        self._config = config
        self._session = session
        self._membership = membership
        self._registry = registry
        self._attempts = attempts
        self._metrics = metrics
        self._drain = drain

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
            web.get("/v1/models", self.models),
            web.get("/v1/models/{model:.+}", self.model),
            web.get("/flush_cache", self.flush_cache),
            web.post("/flush_cache", self.flush_cache),
            web.post("/abort_request", self.abort_request),
            web.get("/workers", self.workers),
            web.get("/metrics", self.metrics),
        ]

    async def health(self, _: web.Request) -> web.Response:
        """Say that this process is up, and which workers can take a request; 503 once it is about to stop.

        Asks nobody: whoever watches this process must not take a slow worker's silence for its own.
        """
        if self._drain.is_draining:
            return web.json_response({"status": "draining"}, status=503)
        return web.json_response(
            {"status": "ok", "workers": [_health_of(worker) for worker in self._membership.workers]}
        )

    async def health_generate(self, _: web.Request) -> web.Response:
        """Send one token through a pair, hand-over included; 200 if it came back. A failure is not tried again."""
        sampling = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
        sample = Sample(rid=new_rid(), options=RequestOptions(sampling=sampling), input_ids=(0,))
        deadline = asyncio.get_running_loop().time() + self._config.router.health_deadline_s
        await self._attempts.answer(sample, deadline=deadline, max_retries=0)
        return web.json_response({"status": "ok"})

    async def server_info(self, _: web.Request) -> web.Response:
        """Give the router's options and every worker's own account."""
        answers = await self._ask_all("/server_info")
        return web.json_response({"role": "router", "config": _without_keys(self._config), "workers": _infos(answers)})

    async def model_info(self, _: web.Request) -> web.Response:
        """Give the model's description, which all workers share, and every worker's own."""
        answers = await self._ask_all("/model_info")
        return web.json_response({**_first_good(answers), "workers": _infos(answers)})

    async def loads(self, _: web.Request) -> web.Response:
        """Give every worker's load."""
        return web.json_response({"workers": _infos(await self._ask_all("/v1/loads"))})

    async def models(self, _: web.Request) -> web.Response:
        """List the one model, in OpenAI's form."""
        return web.json_response({"object": "list", "data": [await self._model()]})

    async def model(self, request: web.Request) -> web.Response:
        """Describe the model, in OpenAI's form, if that is its name."""
        model = await self._model()
        if model["id"] != request.match_info["model"]:
            raise web.HTTPNotFound(text=f"the model that is served here is {model['id']}")
        return web.json_response(model)

    async def flush_cache(self, _: web.Request) -> web.Response:
        """Have every worker forget its cached prefixes: 200 if all have, 400 if one would not, 502 if one could not."""
        answers = await self._tell_all([(worker, "/flush_cache", {}) for worker in self._membership.workers])
        return _outcome(answers, {"workers": [answer.report() for answer in answers]})

    async def abort_request(self, request: web.Request) -> web.Response:
        """End the open requests whose rid begins with `rid`, or all of them: they answer with what they have.

        Their legs are ended on their workers, by the legs' own names: 200 if all workers have taken that.
        """
        fields = Fields(decode_object(await request.read()))
        prefix = fields.string("rid", "")
        if not fields.boolean("abort_all", False) and not prefix:
            raise RequestError("rid", "give the beginning of the rids to abort, or abort_all")
        samples = self._registry.matching("" if fields.boolean("abort_all", False) else prefix)
        for sample in samples:
            sample.is_aborted = True
        legs = [(sample, worker) for sample in samples for worker in sample.workers]
        answers = await asyncio.gather(*(self._abort_leg(sample, worker) for sample, worker in legs))
        reports = [{**answer.report(), "rid": sample.rid} for answer, (sample, _) in zip(answers, legs, strict=True)]
        return _outcome(answers, {"aborted": len(samples), "workers": reports})

    async def _abort_leg(self, sample: OpenSample, worker: Worker) -> WorkerAnswer:
        """End a sample's leg; if the worker does not know it, it may just be on its way there, so ask again a few times."""
        deadline_s = self._config.router.control_deadline_s
        for pause_s in (0.01, 0.05, 0.25, 1.0, None):
            answer = await self._call("POST", worker, "/abort_request", {"rid": sample.leg_rid}, deadline_s)
            unknown = isinstance(answer.body, dict) and answer.body.get("aborted") == []
            if pause_s is None or not unknown or not self._registry.is_open(sample):
                break
            await asyncio.sleep(pause_s)
        return answer

    async def workers(self, _: web.Request) -> web.Response:
        """List the workers: what each has to do, and whether it gets more."""
        return web.json_response(
            {
                "workers": [
                    {
                        "url": worker.url,
                        "worker_type": worker.role,
                        "bootstrap_port": worker.bootstrap_port,
                        "dp_size": worker.dp_size,
                        "outstanding_requests": worker.outstanding,
                        "healthy": worker.unhealthy_reason is None,
                        "reason": worker.unhealthy_reason,
                        "breaker": worker.breaker.state.value,
                    }
                    for worker in self._membership.workers
                ]
            }
        )

    async def metrics(self, _: web.Request) -> web.Response:
        """Give the metrics in Prometheus's text format."""
        return web.Response(body=self._metrics.text(), headers={"Content-Type": _METRICS_TYPE})

    async def _model(self) -> dict[str, object]:
        """Describe the model as OpenAI's API does, after the first worker that answers. Raises NoHealthyPair."""
        info = _first_good(await self._ask_all("/server_info"))
        if "model_path" not in info:
            raise NoHealthyPair("no worker says which model it has", stage="model")
        return {
            "id": info["model_path"],
            "object": "model",
            "created": int(time.time()),
            "owned_by": "tandem",
            "max_model_len": info.get("context_tokens"),
        }

    async def _ask_all(self, path: str) -> list[WorkerAnswer]:
        """GET every worker's route."""
        deadline_s = self._config.router.connect_deadline_s
        return await asyncio.gather(
            *(self._call("GET", worker, path, None, deadline_s) for worker in self._membership.workers)
        )

    async def _tell_all(self, orders: Sequence[tuple[Worker, str, dict[str, object]]]) -> list[WorkerAnswer]:
        """POST to the workers' routes."""
        deadline_s = self._config.router.control_deadline_s
        return await asyncio.gather(
            *(self._call("POST", worker, path, body, deadline_s) for worker, path, body in orders)
        )

    async def _call(
        self, method: str, worker: Worker, path: str, body: dict[str, object] | None, deadline_s: float
    ) -> WorkerAnswer:
        timeout = aiohttp.ClientTimeout(total=deadline_s)
        try:
            async with self._session.request(method, worker.url + path, json=body, timeout=timeout) as response:
                answer = await read_at_most(response.content, _MAX_ANSWER_BYTES)
        except (aiohttp.ClientError, OSError, TimeoutError):
            return WorkerAnswer(worker, None)
        try:
            return WorkerAnswer(worker, response.status, json.loads(answer))
        except (ValueError, RecursionError):
            return WorkerAnswer(worker, response.status)


def _health_of(worker: Worker) -> dict[str, object]:
    return {"url": worker.url, "worker_type": worker.role, "status": worker.obstacle or "ok"}


def _infos(answers: Sequence[WorkerAnswer]) -> list[dict[str, object]]:
    return [{**answer.report(), "info": answer.body} for answer in answers]


def _first_good(answers: Sequence[WorkerAnswer]) -> dict[str, object]:
    return next((answer.body for answer in answers if answer.is_good and isinstance(answer.body, dict)), {})


def _outcome(answers: Sequence[WorkerAnswer], body: dict[str, object]) -> web.Response:
    """Answer 200 if all workers did as they were told, 400 if one refused, else 502."""
    statuses = {answer.status for answer in answers}
    status = 200 if statuses <= {200} else 400 if 400 in statuses else 502
    return web.json_response({"status": "ok" if status == 200 else "failed", **body}, status=status)


def _without_keys(config: RouterConfig) -> dict[str, dict[str, object]]:
    """Write the options, but for the keys that guard this router and its workers."""
    groups: dict[str, dict[str, object]] = msgspec.to_builtins(config)
    return {
        group: {name: value for name, value in options.items() if not name.endswith("api_key")}
        for group, options in groups.items()
    }
