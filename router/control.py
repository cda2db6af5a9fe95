"""The routes that generate nothing: what the router and its workers say of themselves, orders to all, and metrics.

Neighbours: `app` (adds these), `resume` (one real request for /health_generate), `fanout` and `aborts` (tell the workers),
`registry` (whose legs), `workers_api` (who the workers are), `pause_api` and `orders_api` (a trainer's orders).
"""

import asyncio
import time
from collections.abc import Sequence

import msgspec
from aiohttp import web

from common.errors import NoHealthyPair, RequestError
from common.ids import new_rid
from common.messages import ErrorReport, ReportedError, RequestOptions, SamplingParams
from common.protocol.fields import Fields, decode_object
from common.protocol.generate import Sample
from router.aborts import Aborts
from router.config import RouterConfig
from router.fanout import Fanout, WorkerAnswer, outcome
from router.gate import Gate
from router.metrics import RouterMetrics
from router.registry import Registry
from router.resume import Resumed
from router.workers_api import load_of

# What `generate_latest` of prometheus_client writes.
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Control:
    """Handlers of the control routes."""

    def __init__(
        self,
        config: RouterConfig,
        fanout: Fanout,
        registry: Registry,
        aborts: Aborts,
        prompts: Resumed,
        gate: Gate,
        metrics: RouterMetrics,
    ) -> None:
        self._config = config
        self._fanout = fanout
        self._registry = registry
        self._aborts = aborts
        self._prompts = prompts
        self._gate = gate
        self._metrics = metrics

    def routes(self) -> list[web.RouteDef]:
        """All routes of this class."""
        return [
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
            web.get("/metrics", self.metrics),
        ]

    async def health_generate(self, _: web.Request) -> web.Response:
        """Send one token through a pair, hand-over included; 200 if it came back. A failure is not tried again.

        503 at once while generation is paused.
        """
        if self._gate.is_closed:
            raise ReportedError(ErrorReport(status=503, message="generation is paused", code="paused", stage="paused"))
        sampling = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
        sample = Sample(rid=new_rid(), options=RequestOptions(sampling=sampling), input_ids=(0,))
        deadline = asyncio.get_running_loop().time() + self._config.router.health_deadline_s
        await self._prompts.answer(sample, deadline=deadline, max_retries=0)
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
        """Give every worker's load: what it says itself, and what it has of this router."""
        answers = await self._ask_all("/v1/loads")
        return web.json_response(
            {
                "workers": [
                    {**info, **load_of(answer.worker)} for info, answer in zip(_infos(answers), answers, strict=True)
                ]
            }
        )

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
        answers = await self._fanout.tell_all("/flush_cache", {}, self._config.router.control_deadline_s)
        return outcome(answers, {"workers": [answer.report() for answer in answers]})

    async def abort_request(self, request: web.Request) -> web.Response:
        """End the open requests whose rid begins with `rid`, or all of them: they answer with what they have.

        Their legs are ended on their workers, by the legs' own names: 200 if all workers have taken that.
        """
        fields = Fields(decode_object(await request.read()))
        prefix = fields.string("rid", "")
        if not fields.boolean("abort_all", False) and not prefix:
            raise RequestError("rid", "give the beginning of the rids to abort, or abort_all")
        samples = self._registry.matching("" if fields.boolean("abort_all", False) else prefix)
        ended = await self._aborts.end(samples)
        reports = [{**answer.report(), "rid": sample.rid} for sample, answer in ended]
        return outcome([answer for _, answer in ended], {"aborted": len(samples), "workers": reports})

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
        return await self._fanout.ask_all(path, self._config.router.connect_deadline_s)


def _infos(answers: Sequence[WorkerAnswer]) -> list[dict[str, object]]:
    return [{**answer.report(), "info": answer.body} for answer in answers]


def _first_good(answers: Sequence[WorkerAnswer]) -> dict[str, object]:
    return next((answer.body for answer in answers if answer.is_good and isinstance(answer.body, dict)), {})


def _without_keys(config: RouterConfig) -> dict[str, dict[str, object]]:
    """Write the options, but for the keys that guard this router and its workers."""
    groups: dict[str, dict[str, object]] = msgspec.to_builtins(config)
    return {
        group: {name: value for name, value in options.items() if not name.endswith("api_key")}
        for group, options in groups.items()
    }
