"""The worker's engine as its HTTP side sees it: all attention groups as one, each request in the group that is to have it.

A prefill worker's request goes where its room says, since the decode side computes the same; any other one goes to the group
with the fewest open samples, or to that which the client has named. Nobody speaks to a group that has no part in a request.
Groups compute in step: while one is silent the others hang too, so the worker takes requests only if none is. Neighbours:
`engine_client` (one group), `app` and `control` (the users), `common.ranks` (who is in which group).
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

from msgspec import Struct
from msgspec.structs import asdict, replace

from common.errors import RequestError
from common.messages import EndCause, EngineReady, ErrorReport, Generate, Leg, ReportedError, Stats
from common.orders import Done, Order
from common.ranks import Ranks
from common.server.engine_client import EngineClient, Update
from common.server.http import together

Counts = TypeVar("Counts", bound=Struct)


class EngineGroups:
    """All groups of one worker, in their order. All methods belong to one event loop."""

    def __init__(self, engines: Sequence[EngineClient], ranks: Ranks, *, leg: Leg | None) -> None:
        assert len(engines) == ranks.dp
        self.ranks = ranks
        self._engines = list(engines)
        self._leg = leg
        self._by_turn = list(engines)
        """The one that was chosen longest ago comes first."""
        self.broken: ErrorReport | None = None
        """Why nothing is served, though the groups may be well."""
        self._shut: ErrorReport | None = None

    @property
    def refusal(self) -> ErrorReport | None:
        """Why no request can be served now; None if all groups are well, and one of them is not crowded."""
        if self.broken is not None or self._shut is not None:
            return self.broken or self._shut
        unwell = [engine for engine in self._engines if engine.refusal is not None]
        for engine in unwell:
            if not engine.is_crowded:
                return engine.refusal
        return unwell[0].refusal if len(unwell) == len(self._engines) else None

    @property
    def is_crowded(self) -> bool:
        """Whether all groups are well but for pages in quarantine: the requests that they have go on."""
        is_shut = self.broken is not None or self._shut is not None
        return not is_shut and all(engine.is_crowded for engine in self._engines)

    @property
    def num_open_samples(self) -> int:
        """Those that have not ended, of all requests."""
        return sum(engine.num_open_samples for engine in self._engines)

    async def ready(self) -> EngineReady:
        """Wait until every group can serve; the limits are the least of all, so that any request fits any group."""
        # Not by awaiting them one by one: that would cancel them with whoever waits here.
        await asyncio.wait([engine.ready for engine in self._engines])
        first, *others = [engine.ready.result() for engine in self._engines]
        for other in others:
            first = replace(
                first,
                context_tokens=min(first.context_tokens, other.context_tokens),
                kv_pool_tokens=min(first.kv_pool_tokens, other.kv_pool_tokens),
                max_running_requests=min(first.max_running_requests, other.max_running_requests),
            )
        return first

    async def run(self) -> None:
        """Take in what the groups send; runs until cancelled."""
        await together([engine.run() for engine in self._engines])

    async def watch(self, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        """See that no group is silent for longer than its deadline; runs until cancelled."""
        await together([engine.watch(sleep=sleep) for engine in self._engines])

    def fail(self, message: str) -> None:
        """The engine is gone, in part or whole: end everything that is open, and refuse what comes."""
        for engine in self._engines:
            engine.fail(message)

    def break_down(self, error: ErrorReport) -> None:
        """Serve nothing until `mend`: what is open fails, what comes is refused. The groups themselves may be well."""
        self.broken = error
        for engine in self._engines:
            engine.abandon(error)

    def mend(self) -> None:
        """Serve again."""
        self.broken = None

    def shut(self, error: ErrorReport) -> None:
        """Take no request until `open`; what is open goes on."""
        self._shut = error

    def open(self) -> None:
        """Take requests again."""
        self._shut = None

    def check_group(self, message: Generate) -> None:
        """Raise RequestError if the client has named a group that cannot have this request."""
        named, num_groups = message.options.data_parallel_rank, self.ranks.dp
        if named is None:
            return
        if named >= num_groups:
            raise RequestError("data_parallel_rank", f"{named} is outside [0, {num_groups}), this worker's groups")
        if (fixed := self._group_of_room(message)) not in (None, named):
            raise RequestError("data_parallel_rank", f"is {named}, but the room belongs to group {fixed}")

    def generate(self, message: Generate, *, num_ends: int = 1) -> AbstractAsyncContextManager[AsyncIterator[Update]]:
        """Run one prompt in its group, as `EngineClient.generate` does; `check_group` has let it pass.

        Raises ReportedError with status 503 if the worker, or the only group that could have it, is not well.
        """
        if (refusal := self.refusal) is not None:
            raise ReportedError(replace(refusal, rid=message.rid))
        return self._choose(message).generate(message, num_ends=num_ends)

    def stop_at(self, rid: str, index: int, *, num_tokens: int, matched: str) -> None:
        """End sample `index` of an open request after its first `num_tokens` tokens, where a stop string was found."""
        owner = self._owner_of(rid)
        assert owner is not None, f"{rid!r} is not open"
        owner.stop_at(rid, index, num_tokens=num_tokens, matched=matched)

    def finish_now(self, prefix: str, cause: EndCause = "requested") -> list[str]:
        """End the open requests whose rids begin with `prefix`: each answers with what it has. Returns their rids."""
        return [rid for engine in self._engines for rid in engine.finish_now(prefix, cause)]

    async def carry_out(self, order: Order, *, patience_s: float = 0.0) -> list[Done]:
        """Have all groups carry out an order at once; raises as `EngineClient.carry_out` does."""
        return await together([engine.carry_out(order, patience_s=patience_s) for engine in self._engines])

    def post(self, order: Order) -> None:
        """Have all groups carry out an order whenever they get to it."""
        for engine in self._engines:
            engine.post(order)

    async def stats(self) -> Stats:
        """Ask all groups for their statistics, and add them up; raises as `EngineClient.stats` does."""
        return summed(await self.group_stats())

    async def group_stats(self) -> list[Stats]:
        """Ask all groups for their statistics, in the groups' order; raises as `EngineClient.stats` does."""
        return await together([engine.stats() for engine in self._engines])

    async def flush_cache(self) -> str | None:
        """Have all groups forget their cached prefixes; returns why the first that did not has not. Raises as `stats`."""
        refusals = await together([engine.flush_cache() for engine in self._engines])
        return next((refusal for refusal in refusals if refusal is not None), None)

    def shut_down(self) -> None:
        """Ask the leader of every group to exit, and to see that its followers do."""
        for engine in self._engines:
            engine.shut_down()

    def _choose(self, message: Generate) -> EngineClient:
        # Whoever has a request of this name refuses another one.
        if (owner := self._owner_of(message.rid)) is not None:
            return owner
        group = self._group_of_room(message)
        if group is None:
            group = message.options.data_parallel_rank
        if group is not None:
            return self._engines[group]
        takers = [engine for engine in self._by_turn if engine.refusal is None]
        engine = min(takers, key=lambda taker: taker.num_open_samples)  # of equals the first
        self._by_turn.remove(engine)
        self._by_turn.append(engine)
        return engine

    def _group_of_room(self, message: Generate) -> int | None:
        if self._leg != "prefill" or message.bootstrap is None:
            return None
        return self.ranks.group_of_room(message.bootstrap.room)

    def _owner_of(self, rid: str) -> EngineClient | None:
        return next((engine for engine in self._engines if engine.has(rid)), None)


def summed(parts: Sequence[Counts]) -> Counts:
    """Add counts up, field by field, and those in structs inside of them."""
    first, names = parts[0], [asdict(part) for part in parts]
    totals = {
        name: summed([part[name] for part in names]) if isinstance(value, Struct) else sum(part[name] for part in names)
        for name, value in asdict(first).items()
    }
    return type(first)(**totals)
