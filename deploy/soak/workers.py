"""The workers from outside: which of them the router counts on, and what each still holds when nothing is under way.

Neighbours: `faults` (strikes only where all serve), `command` (counts the pages at the end).
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import TypeVar

import aiohttp
import msgspec
from msgspec import Struct

from common.messages import PageCounts
from deploy.stack import Stack

Answer = TypeVar("Answer")

POLL_S = 0.2
ASKING_DEADLINE_S = 5.0


class WorkerView(Struct, frozen=True):
    """The part of the router's account of a worker that is read here."""

    url: str
    healthy: bool
    breaker: str
    outstanding_requests: int

    @property
    def is_serving(self) -> bool:
        """Whether it gets legs."""
        return self.healthy and self.breaker == "closed"


class Holdings(Struct, frozen=True, kw_only=True):
    """The part of an engine's statistics that says what it holds."""

    pages: PageCounts
    queued_requests: int
    running_requests: int
    rooms: int

    @property
    def is_quiet(self) -> bool:
        """Nothing is held for anybody, and the recount of the pages is exact."""
        pages = self.pages
        held = self.queued_requests + self.running_requests + self.rooms + pages.running + pages.quarantined
        return held == 0 and pages.unaccounted == 0 and pages.free + pages.cached == pages.total


class Leftover(Struct, frozen=True, kw_only=True):
    """What a worker still holds after the last request. None: it did not answer."""

    name: str
    holdings: Holdings | None
    flushed: Holdings | None
    """The same after its prefix cache was emptied."""
    outstanding_legs: int
    """Legs that the router has not ended."""

    @property
    def leaked_pages(self) -> int:
        """Pages that are not free although nobody needs them, or that are in two places."""
        if self.holdings is None or self.flushed is None:
            return 0
        pages = self.flushed.pages
        return max(pages.total - pages.free, abs(pages.unaccounted), abs(self.holdings.pages.unaccounted))

    @property
    def is_clean(self) -> bool:
        """It answers, and all is given back."""
        is_quiet = self.holdings is not None and self.holdings.is_quiet and self.flushed is not None
        return is_quiet and self.leaked_pages == 0 and self.outstanding_legs == 0


class _Views(Struct, frozen=True):
    workers: list[WorkerView]


class _Info(Struct, frozen=True):
    stats: Holdings


class Workers:
    """Asks a running stack; without an answer there is nobody, not an error."""

    def __init__(self, session: aiohttp.ClientSession, stack: Stack) -> None:
        self._session = session
        self._urls = {command.name: command.url for command in stack.plan.commands if command.role != "router"}
        self._router_url = stack.url

    async def views(self) -> dict[str, WorkerView]:
        """The router's account of each worker, by the worker's name."""
        answer = await self._get(f"{self._router_url}/workers", _Views)
        by_url = {} if answer is None else {view.url: view for view in answer.workers}
        return {name: by_url[url] for name, url in self._urls.items() if url in by_url}

    async def until_healthy(self, names: set[str], deadline_s: float) -> bool:
        """Wait until the router counts these workers among the healthy ones; False if it does not come to that in time."""

        async def are_healthy() -> bool:
            views = await self.views()
            return all(name in views and views[name].healthy for name in names)

        return await _poll(are_healthy, bool, deadline_s)

    async def leftovers(self, deadline_s: float) -> list[Leftover]:
        """Wait until no worker holds anything, or the deadline has passed; then empty the caches, and say what is left."""

        async def holdings() -> dict[str, Holdings | None]:
            return {name: await self._holdings(name) for name in self._urls}

        def are_quiet(held: dict[str, Holdings | None]) -> bool:
            return all(each is not None and each.is_quiet for each in held.values())

        held = await _poll(holdings, are_quiet, deadline_s)
        for url in self._urls.values():
            await self._get(f"{url}/flush_cache", dict)
        flushed, views = await holdings(), await self.views()
        return [
            Leftover(
                name=name,
                holdings=held[name],
                flushed=flushed[name],
                outstanding_legs=views[name].outstanding_requests if name in views else 0,
            )
            for name in self._urls
        ]

    async def _holdings(self, name: str) -> Holdings | None:
        info = await self._get(f"{self._urls[name]}/server_info", _Info)
        return None if info is None else info.stats

    async def _get(self, url: str, kind: type[Answer]) -> Answer | None:
        timeout = aiohttp.ClientTimeout(total=ASKING_DEADLINE_S)
        try:
            async with self._session.get(url, timeout=timeout) as response:
                content = await response.read()
            return msgspec.json.decode(content, type=kind) if response.status == 200 else None
        except (aiohttp.ClientError, OSError, msgspec.DecodeError):
            # A TimeoutError is an OSError.
            return None


async def _poll(
    ask: Callable[[], Coroutine[None, None, Answer]], is_good: Callable[[Answer], bool], deadline_s: float
) -> Answer:
    """Ask until the answer is good; returns the last one, good or not, when the deadline has passed."""
    deadline = time.monotonic() + deadline_s
    while True:
        answer = await ask()
        if is_good(answer) or time.monotonic() > deadline:
            return answer
        await asyncio.sleep(POLL_S)
