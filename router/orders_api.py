"""A trainer's orders about weights, memory and profiles: each goes to all workers at the same time, as it came.

All at the same time, because what workers do together blocks until the last one has begun. 200 if all have done it, 400 if one
refused, else 502; each worker's own words are in the answer. Neighbours: `fanout`, `spool` (bodies that are large), `aborts`.
"""

import json
from collections.abc import Sequence
from typing import Final

from aiohttp import web

from common.errors import RequestError
from common.protocol.fields import Fields, decode_object
from router.aborts import Aborts
from router.config import RouterConfig
from router.fanout import Fanout, WorkerAnswer, status_of
from router.registry import Registry
from router.spool import spooled
from router.worker import Worker

_AS_THEY_COME: Final = (
    "/update_weights_from_disk",
    "/update_weights_from_distributed",
    "/destroy_weights_update_group",
    "/update_weight_version",
    "/begin_weight_update",
    "/end_weight_update",
    "/release_memory_occupation",
    "/resume_memory_occupation",
    "/start_profile",
    "/stop_profile",
)


class OrdersApi:
    """Handlers of the routes that are orders to all workers."""

    def __init__(self, config: RouterConfig, fanout: Fanout, registry: Registry, aborts: Aborts) -> None:
        self._options = config.router
        self._max_weights_bytes = config.server.max_weights_bytes
        self._fanout = fanout
        self._registry = registry
        self._aborts = aborts

    def routes(self) -> list[web.RouteDef]:
        """All routes of this class."""
        return [
            *(web.post(path, self.pass_on) for path in _AS_THEY_COME),
            web.post("/update_weights_from_tensor", self.update_weights_from_tensor),
            web.post("/init_weights_update_group", self.init_weights_update_group),
            web.get("/get_weight_version", self.get_weight_version),
            web.get("/weight_version", self.get_weight_version),
        ]

    async def pass_on(self, request: web.Request) -> web.Response:
        """Send an order to all workers. With `abort_all_requests` every open prompt ends first, with what it has."""
        body = await request.read() or b"{}"
        if Fields(decode_object(body)).boolean("abort_all_requests", False):
            await self._aborts.end(self._registry.matching(""))
        answers = await self._fanout.send_all(
            request.path_qs, lambda _: body, deadline_s=self._options.weights_deadline_s
        )
        return _told(answers)

    async def update_weights_from_tensor(self, request: web.Request) -> web.Response:
        """Take a body with weights, whatever its form, and give it to all workers."""
        async with spooled(request.content, self._max_weights_bytes) as body:
            headers = {"Content-Type": request.content_type, "Content-Length": str(body.num_bytes)}
            answers = await self._fanout.send_all(
                request.path_qs,
                lambda _: body.parts(),
                deadline_s=self._options.weights_deadline_s,
                headers=headers,
            )
        return _told(answers)

    async def init_weights_update_group(self, request: web.Request) -> web.Response:
        """Have all workers join a process group: each one's ranks come after those of the workers before it."""
        fields = decode_object(await request.read())
        offset = Fields(fields).integer("rank_offset", 1, ge=0)
        infos = await self._fanout.ask_all("/server_info", self._options.connect_deadline_s)
        offsets: dict[Worker, int] = {}
        for info in infos:
            offsets[info.worker] = offset
            num_ranks = info.fields.get("tp_size")
            if not info.is_good or not isinstance(num_ranks, int):
                return _told(infos, "nobody was told: a worker does not say how many ranks it has")
            offset += num_ranks
        world_size = Fields(fields).integer("world_size", offset, ge=1)
        if offset > world_size:
            raise RequestError("world_size", f"is {world_size}, but the workers' last rank is {offset - 1}")
        answers = await self._fanout.send_all(
            request.path_qs,
            lambda worker: json.dumps({**fields, "rank_offset": offsets[worker]}).encode(),
            deadline_s=self._options.weights_deadline_s,
        )
        return _told(answers)

    async def get_weight_version(self, _: web.Request) -> web.Response:
        """Say which weights the workers have: null if not all have the same."""
        answers = await self._fanout.ask_all("/get_weight_version", self._options.connect_deadline_s)
        return _told(answers)


def _told(answers: Sequence[WorkerAnswer], message: str = "") -> web.Response:
    """Answer with what all workers have answered, and the first one's words who has not done it."""
    status = 502 if message else status_of(answers)
    wrong = next((answer for answer in answers if not answer.is_good), None)
    if not message and wrong is not None:
        message = f"{wrong.worker.label}: {wrong.message or wrong.report()['status']}"
    versions = {answer.fields.get("weight_version") for answer in answers if answer.is_good}
    body = {
        "success": status == 200,
        "message": message,
        "weight_version": versions.pop() if len(versions) == 1 and status == 200 else None,
        "workers": [_report(answer) for answer in answers],
    }
    return web.json_response(body, status=status)


def _report(answer: WorkerAnswer) -> dict[str, object]:
    return {
        **answer.report(),
        "success": answer.is_good,
        "message": answer.message,
        "weight_version": answer.fields.get("weight_version"),
    }
