"""The routes about the devices under a worker, by SGLang's names and fields: their memory, and what runs on them.

Neighbours: `occupation` (the memory), `engine_groups` (profiles are orders to it), `app` (adds these).
"""

import asyncio
import tempfile
from pathlib import Path
from typing import Annotated, Final

from aiohttp import web
from msgspec import Meta, Struct

from common.errors import RequestError
from common.messages import ErrorReport, ReportedError, WorkerKind, leg_of
from common.orders import MemoryKind, Order, ProfileActivity, StartProfile, StopProfile
from common.server.engine_groups import EngineGroups
from common.server.occupation import ALL_KINDS, Occupation
from common.server.updates import Updates
from common.server.weights_api import answering
from common.server.weights_bodies import decode

_TAGS: Final[dict[str, tuple[MemoryKind, ...]]] = {
    "weights": ("weights",),
    "kv_cache": ("kv_cache",),
    "cuda_graph": (),  # they go and come with either
}
_UNNUMBERED: Final = 0


class _Tags(Struct):
    tags: list[str] | None = None


class _Profile(Struct):
    output_dir: str | None = None
    num_steps: Annotated[int, Meta(ge=1)] | None = None
    activities: Annotated[list[ProfileActivity], Meta(min_length=1)] | None = None


class DeviceApi:
    """Handlers of these routes."""

    def __init__(
        self,
        kind: WorkerKind,
        engine: EngineGroups,
        updates: Updates,
        occupation: Occupation,
        *,
        profile_folder: str,
        deadline_s: float,
    ) -> None:
        """`profile_folder`: where traces go if nobody says; empty: into one of the system's temporary folder."""
        self._kind: WorkerKind = kind
        self._engine = engine
        self._updates = updates
        self._occupation = occupation
        self._profile_folder = profile_folder or str(Path(tempfile.gettempdir()) / "tandem-profiles")
        self._deadline_s = deadline_s

    def routes(self) -> list[web.RouteDef]:
        """All routes of this class."""
        leg = leg_of(self._kind)
        return [
            web.post("/release_memory_occupation", answering(self._release, self._updates, leg)),
            web.post("/resume_memory_occupation", answering(self._resume, self._updates, leg)),
            web.post("/start_profile", self._start_profile),
            web.post("/stop_profile", self._stop_profile),
        ]

    async def _release(self, request: web.Request) -> str:
        kinds = _kinds_of(await request.read())
        return await self._updates.to_the_end(self._occupation.release(kinds))

    async def _resume(self, request: web.Request) -> str:
        kinds = _kinds_of(await request.read())
        return await self._updates.to_the_end(self._occupation.resume(kinds))

    async def _start_profile(self, request: web.Request) -> web.Response:
        asked = decode(await request.read() or b"{}", _Profile)
        folder = await asyncio.to_thread(_writable, asked.output_dir or self._profile_folder)
        order = StartProfile(
            serial=_UNNUMBERED,
            folder=str(folder),
            kind=self._kind,
            activities=("CPU", "GPU") if asked.activities is None else tuple(asked.activities),
            num_steps=asked.num_steps,
        )
        await self._order(order)
        return web.json_response({"success": True, "message": f"recording into {folder}"})

    async def _stop_profile(self, _: web.Request) -> web.Response:
        await self._order(StopProfile(_UNNUMBERED))
        return web.json_response({"success": True, "message": "the profile is written"})

    async def _order(self, order: Order) -> None:
        """Raises ReportedError with status 400 if a rank refuses."""
        for done in await self._engine.carry_out(order, patience_s=self._deadline_s):
            if done.error is not None:
                raise ReportedError(
                    ErrorReport(status=400, message=done.error, code="profile_refused", leg=leg_of(self._kind))
                )


def _kinds_of(body: bytes) -> set[MemoryKind]:
    """The kinds of memory that a body names; all if it names none. Raises RequestError."""
    tags = decode(body or b"{}", _Tags).tags
    if tags is None:
        return set(ALL_KINDS)
    for tag in tags:
        if tag not in _TAGS:
            raise RequestError("tags", f"{tag!r} is none of {', '.join(_TAGS)}")
    return {kind for tag in tags for kind in _TAGS[tag]}


def _writable(path: str) -> Path:
    """Make a folder, if it is not there. Raises RequestError if files cannot be made in it."""
    try:
        folder = Path(path).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, ValueError) as error:
        raise RequestError("output_dir", f"{path!r}: {error}") from error
