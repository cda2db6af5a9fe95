"""The routes about the workers themselves: which there are, how each is, who joins and who leaves.

    POST /workers          201 joined, 200 renewed: under its URL it keeps its id; 410 if this instance of it was removed
    DELETE /workers/{id}   it gets no more legs; 200 once those that it has have ended, 202 if that takes long

Neighbours: `membership` (does it), `app` (adds these), `common.server.registration` (the workers' side of it).
"""

import asyncio
from typing import Final, get_args

from aiohttp import web

from common.config import check_url
from common.errors import RequestError, UsageError
from common.messages import WorkerKind
from common.protocol.fields import Fields, as_integer, as_string, check_count, decode_object
from router.config import RouterOptions
from router.drain import Drain
from router.membership import Membership
from router.worker import Worker

_OTHER_NAMES: Final[dict[str, WorkerKind]] = {"regular": "aggregated"}
"""What trainers call kinds of workers."""
_MAX_LEASE_S: Final = 10.0**9
_MAX_URL_CHARS: Final = 2048
_MAX_INSTANCE_CHARS: Final = 128


class WorkersApi:
    """Handlers of the workers' routes, and of GET /health."""

    def __init__(self, options: RouterOptions, membership: Membership, drain: Drain) -> None:
        self._options = options
        self._membership = membership
        self._drain = drain

    def routes(self) -> list[web.RouteDef]:
        """All routes of this class."""
        return [
            web.get("/health", self.health),
            web.get("/workers", self.workers),
            web.get("/list_workers", self.workers),
            web.post("/workers", self.join),
            web.delete("/workers/{worker:.+}", self.leave),
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

    async def workers(self, _: web.Request) -> web.Response:
        """List the workers: what each has to do, and whether it gets more."""
        workers = self._membership.workers
        return web.json_response(
            {"workers": [_entry(worker) for worker in workers], "urls": [worker.url for worker in workers]}
        )

    async def join(self, request: web.Request) -> web.Response:
        """Take a worker in, for good or for `lease_s` seconds: 201, or 200 if it was there already."""
        fields = Fields(decode_object(await request.read()))
        role = _role(fields)
        port = None
        if role == "prefill":
            port = as_integer("bootstrap_port", fields.values.get("bootstrap_port"), ge=1, le=65535)
        elif fields.values.get("bootstrap_port") is not None:
            raise RequestError("bootstrap_port", f"belongs to a prefill worker; this one is {role}")
        lease_s = fields.number("lease_s", 0.0, gt=0, le=_MAX_LEASE_S) or None
        url, instance = _short(fields, "url", _MAX_URL_CHARS), None
        _check_url(url)
        if fields.values.get("instance") is not None:
            instance = _short(fields, "instance", _MAX_INSTANCE_CHARS)
        worker, is_new = self._membership.join(url, role, bootstrap_port=port, lease_s=lease_s, instance=instance)
        return web.json_response(_entry(worker), status=201 if is_new else 200)

    async def leave(self, request: web.Request) -> web.Response:
        """Give a worker no more legs: 200 once it is gone, 202 if its legs take longer than the control deadline."""
        worker = self._membership.find(request.match_info["worker"])
        if worker is None:
            raise web.HTTPNotFound(text="there is no worker with this id or URL")
        self._membership.remove(worker)
        try:
            async with asyncio.timeout(self._options.control_deadline_s):
                await worker.gone.wait()
        except TimeoutError:
            return web.json_response({"status": "draining", "worker": _entry(worker)}, status=202)
        return web.json_response({"status": "gone", "worker": _entry(worker)})


def load_of(worker: Worker) -> dict[str, object]:
    """Say what a worker has to do for this router."""
    return {"outstanding_requests": worker.outstanding, "outstanding_tokens": worker.outstanding_tokens}


def _health_of(worker: Worker) -> dict[str, object]:
    return {"url": worker.url, "worker_type": worker.role, "status": worker.obstacle or "ok"}


def _entry(worker: Worker) -> dict[str, object]:
    return {
        "id": worker.id,
        "url": worker.url,
        "worker_type": worker.role,
        "bootstrap_port": worker.bootstrap_port,
        "dp_size": worker.dp_size,
        "model": worker.model,
        "weight_version": worker.weight_version,
        "lease_s": worker.lease_s,
        **load_of(worker),
        "healthy": worker.unhealthy_reason is None,
        "reason": worker.unhealthy_reason,
        "is_draining": worker.is_draining,
        "is_paused": worker.is_paused,
        "breaker": worker.breaker.state.value,
    }


def _role(fields: Fields) -> WorkerKind:
    named = as_string("worker_type", fields.values.get("worker_type"))
    role = _OTHER_NAMES.get(named, named)
    for kind in get_args(WorkerKind):
        if role == kind:
            return kind  # type: ignore[no-any-return]
    raise RequestError("worker_type", f"must be one of {', '.join(get_args(WorkerKind))}")


def _short(fields: Fields, name: str, most: int) -> str:
    """Read a string of so many characters at most, which must be there."""
    value = as_string(name, fields.values.get(name))
    check_count(name, len(value), most, "characters")
    return value


def _check_url(url: str) -> None:
    try:
        check_url("url", url)
    except UsageError as error:
        raise RequestError("url", "is none like http://host:port") from error
