"""The routes by which a trainer pauses a worker and changes its weights, by SGLang's names and fields.

Neighbours: `updates` (does it), `weights_bodies` (what comes in), `app` (adds these).
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Final

from aiohttp import web

from common.errors import RequestError, TandemError
from common.messages import ErrorReport, Leg
from common.orders import JoinWeightGroup, WeightBroadcast, WeightFiles, WeightSource
from common.protocol.fields import Fields, decode_object
from common.protocol.replies import Reply, encode_json, error_fields
from common.server.updates import Updates
from common.server.weights_bodies import (
    DestroyGroup,
    FromDisk,
    FromDistributed,
    InitGroup,
    MemoryFile,
    PauseBody,
    RenameBody,
    UpdateBody,
    decode,
    folder_of,
    options_of,
    receiving,
    stored_pickles,
)

Update = Callable[[web.Request], Awaitable[str]]

_BINARY: Final = "application/octet-stream"
_UNNUMBERED: Final = 0


class WeightsApi:
    """Handlers of a trainer's routes."""

    def __init__(
        self,
        updates: Updates,
        *,
        num_ranks: int,
        leg: Leg | None,
        deadline_s: float,
        max_bytes: int,
        allow_pickled: bool,
    ) -> None:
        self._updates = updates
        self._num_ranks = num_ranks
        self._leg: Leg | None = leg
        self._deadline_s = deadline_s
        self._max_bytes = max_bytes
        self._allow_pickled = allow_pickled

    def routes(self) -> list[web.RouteDef]:
        """All routes of this class."""
        updates: dict[str, Update] = {
            "/update_weights_from_disk": self._from_disk,
            "/update_weights_from_tensor": self._from_tensor,
            "/update_weights_from_distributed": self._from_distributed,
            "/init_weights_update_group": self._init_group,
            "/destroy_weights_update_group": self._destroy_group,
            "/update_weight_version": self._rename,
            "/begin_weight_update": self._begin,
            "/end_weight_update": self._end,
        }
        return [
            web.post("/pause_generation", self._pause),
            web.post("/continue_generation", self._continue),
            web.get("/get_weight_version", self._weight_version),
            web.get("/weight_version", self._weight_version),
            *(web.post(path, answering(update, self._updates, self._leg)) for path, update in updates.items()),
        ]

    # -------------------------------------------------------------------------------------------- pauses and names

    async def _pause(self, request: web.Request) -> web.Response:
        mode = decode(await request.read() or b"{}", PauseBody).mode
        num_ended = await self._updates.pause(mode)
        return _json({"status": "ok", "mode": mode, "ended": num_ended})

    async def _continue(self, _: web.Request) -> web.Response:
        await self._updates.resume()
        return _json({"status": "ok"})

    async def _weight_version(self, _: web.Request) -> web.Response:
        return _json({"weight_version": self._updates.weight_version})

    async def _rename(self, request: web.Request) -> str:
        asked = decode(await request.read(), RenameBody)
        version = asked.weight_version if asked.new_version is None else asked.new_version
        if version is None:
            raise RequestError("new_version", "is missing")
        return await self._updates.to_the_end(
            self._updates.rename(version, abort_all=asked.abort_all_requests is not False)
        )

    # -------------------------------------------------------------------------------------------- around parts

    async def _begin(self, request: web.Request) -> str:
        selector = Fields(decode_object(await request.read() or b"{}")).string("selector", "all")
        if selector != "all":
            raise RequestError("selector", f'must be "all", but is "{selector[:40]}"')
        self._updates.check_begin()
        return "updates may come in parts"

    async def _end(self, _: web.Request) -> str:
        self._updates.check_end()
        return "the weights are whole"

    # -------------------------------------------------------------------------------------------- groups

    async def _init_group(self, request: web.Request) -> str:
        asked = decode(await request.read(), InitGroup)
        if asked.rank_offset + self._num_ranks > asked.world_size:
            message = (
                f"{asked.world_size} does not hold the ranks from {asked.rank_offset} on, which are {self._num_ranks}"
            )
            raise RequestError("world_size", message)
        order = JoinWeightGroup(
            serial=_UNNUMBERED,
            group=asked.group_name,
            address=asked.master_address,
            port=asked.master_port,
            rank_offset=asked.rank_offset,
            world_size=asked.world_size,
            backend=asked.backend,
            deadline_s=self._deadline_s,
        )
        return await self._updates.to_the_end(self._updates.join(order))

    async def _destroy_group(self, request: web.Request) -> str:
        asked = decode(await request.read() or b"{}", DestroyGroup)
        return await self._updates.to_the_end(self._updates.leave(asked.group_name))

    # -------------------------------------------------------------------------------------------- weights

    async def _from_disk(self, request: web.Request) -> str:
        asked = decode(await request.read(), FromDisk)
        folder = await asyncio.to_thread(folder_of, asked.model_path)
        if asked.weight_version is None:
            asked.weight_version = folder.name

        async def load() -> str:
            message = await self._load(WeightFiles(str(folder)), asked, needs_all=True)
            self._updates.model_path = asked.model_path
            return message

        return await self._updates.to_the_end(load())

    async def _from_distributed(self, request: web.Request) -> str:
        async with receiving(request, max_bytes=self._max_bytes, deadline_s=self._deadline_s) as chunks:
            pieces = [chunk async for chunk in chunks]
        asked = await asyncio.to_thread(lambda: decode(b"".join(pieces), FromDistributed))
        source = WeightBroadcast(
            group=asked.group_name,
            names=tuple(asked.names),
            dtypes=tuple(asked.dtypes),
            shapes=tuple(map(tuple, asked.shapes)),
            is_bucket=asked.is_bucket,
        )
        return await self._updates.to_the_end(self._load(source, asked))

    async def _from_tensor(self, request: web.Request) -> str:
        with ExitStack() as stack:
            async with receiving(request, max_bytes=self._max_bytes, deadline_s=self._deadline_s) as chunks:
                if request.content_type == _BINARY:
                    options: UpdateBody = options_of(request)
                    file = stack.enter_context(MemoryFile())
                    async for chunk in chunks:
                        file.write(chunk)
                    source: WeightSource = WeightFiles(file.path)
                elif not self._allow_pickled:
                    message = f"send safetensors as {_BINARY}; pickles are taken with --allow-pickled-weights alone"
                    raise RequestError("Content-Type", message)
                else:
                    pieces = [chunk async for chunk in chunks]
                    options, source = await asyncio.to_thread(stored_pickles, pieces, stack)
            kept = stack.pop_all()

        async def load() -> str:
            with kept:  # whoever sent it may leave, but not its bytes
                return await self._load(source, options)

        return await self._updates.to_the_end(load())

    async def _load(self, source: WeightSource, asked: UpdateBody, *, needs_all: bool = False) -> str:
        return await self._updates.load(
            source,
            weight_version=asked.weight_version,
            needs_all=needs_all,
            abort_all=bool(asked.abort_all_requests),
        )


def answering(update: Update, updates: Updates, leg: Leg | None) -> Callable[[web.Request], Awaitable[web.Response]]:
    """Make a handler that answers as trainers expect it, with `success` beside everything else, and runs beside no other one."""

    async def handler(request: web.Request) -> web.Response:
        try:
            with updates.reserved():
                message = await update(request)
        except TandemError as error:
            report = ErrorReport.of(error, leg=leg)
            return _json({"success": False, "message": report.message, **error_fields(report)}, report.status)
        return _json({"success": True, "message": message, "weight_version": updates.weight_version})

    return handler


def _json(body: Reply, status: int = 200) -> web.Response:
    return web.Response(status=status, body=encode_json(body), content_type="application/json")
