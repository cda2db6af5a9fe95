"""Gathers an ended request's rows off the step path: on threads of their own where they are many, at once where they are few.

A request keeps its pages while its rows are gathered; `holds` says so. Results come back through `poll`, in the engine's thread,
so nobody else ever touches a request. Neighbours: `common.routed_experts.collect` (does the work), the roles' workers.
"""

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from common.engine.engine import Engine
from common.errors import RowsError
from common.memory.layout import slots_of
from common.messages import RowBlock
from common.routed_experts import host_cache
from common.routed_experts.collect import collect, make_block
from common.routed_experts.host_cache import Slots, WriteTicket
from common.routed_experts.spec import rows_of
from common.scheduling.request import Request
from common.versions import Spans

log = logging.getLogger(__name__)

Rows = RowBlock | RowsError | None
"""A block, why there is none, or None if none was asked for."""
Done = Callable[[Rows], None]

_SMALL_BYTES = 64 * 2**10
_NUM_THREADS = (
    4  # requests that end together are gathered together; numpy lets go of the interpreter's lock for most of it
)


class _Early(NamedTuple):
    """Rows of positions `[start, stop)` that were asked for while their request goes on; None if they could not be had."""

    start: int
    stop: int
    rows: "Future[host_cache.Rows | None]"


class RowCollector:
    """Collects for one engine. `wake` ends the engine's wait when a result is there; without one, all is done at once."""

    def __init__(self, engine: Engine, *, verified: bool, wake: Callable[[], None] | None = None) -> None:
        self._engine = engine
        self._verified = verified
        self._wake = wake
        self._executor = ThreadPoolExecutor(_NUM_THREADS, "rows") if wake is not None else None
        self._pending: deque[tuple[Request, Future[Rows], Done]] = deque()
        self._held: set[Request] = set()
        self._early: dict[Request, _Early] = {}
        self.num_refused = 0

    def begin(self, request: Request, start: int, stop: int) -> None:
        """Gather the settled rows of positions `[start, stop)` of a request that goes on, so that less is left for its end."""
        if request.message.options.return_routed_experts and self._executor is not None and self._are_many(start, stop):
            slots = self._slots_of(request, start, stop)
            ticket = self._engine.host_cache.reserve(slots)
            future = self._executor.submit(self._gather_early, ticket, start, request.rid)
            self._early[request] = _Early(start, stop, future)

    def forget(self, request: Request) -> None:
        """Drop what was gathered early: the request has left."""
        self._early.pop(request, None)

    def collect(self, request: Request, start: int, stop: int, done: Done) -> None:
        """Gather the settled rows of positions `[start, stop)`, if the request wants rows, and call `done` with them."""
        early = self._early.pop(request, None)
        if not request.message.options.return_routed_experts:
            done(None)
            return
        slots, rid, versions = self._slots_of(request, start, stop), request.rid, request.versions_of(start, stop)
        if self._executor is None or not self._are_many(start, stop):
            self._deliver(_attempt(rid, self._gather, slots, start, rid, versions), done)
            return
        if early is not None and early.start == start and early.stop <= stop:
            future = self._executor.submit(_attempt, rid, self._gather_rest, early, slots, rid, versions)
        else:
            future = self._executor.submit(_attempt, rid, self._gather, slots, start, rid, versions)
        self._pending.append((request, future, done))
        self._held.add(request)
        future.add_done_callback(lambda _: self._wake and self._wake())

    def collect_swapped(
        self, request: Request, swapped: npt.NDArray[np.unsignedinteger], start: int, done: Done
    ) -> None:
        """Do as `collect` does with rows `[n, L, K]` from position `start` on that have been copied out already."""
        self.forget(request)
        if not request.message.options.return_routed_experts:
            done(None)
            return
        versions = request.versions_of(start, start + len(swapped))
        self._deliver(_attempt(request.rid, self._make_block, swapped, start, versions, self._verified), done)

    def holds(self, request: Request) -> bool:
        """Whether the request's rows are being gathered, so that its pages may not be given back."""
        return request in self._held

    def poll(self) -> None:
        """Deliver what has been gathered, in the order in which it was asked for."""
        while self._pending and self._pending[0][1].done():
            request, future, done = self._pending.popleft()
            self._held.discard(request)
            self._deliver(future.result(), done)

    def _are_many(self, start: int, stop: int) -> bool:
        return (stop - start) * self._engine.host_cache.spec.row_bytes >= _SMALL_BYTES

    def _slots_of(self, request: Request, start: int, stop: int) -> Slots:
        return slots_of(request.pages, start, stop, self._engine.capacity.page_size)

    def _gather(self, slots: Slots, start: int, rid: str, versions: Spans) -> RowBlock:
        cache, verified = self._engine.host_cache, self._verified
        return collect(cache, slots, start=start, rid=rid, weight_versions=versions, verified=verified)

    def _gather_early(self, ticket: WriteTicket, start: int, rid: str) -> "host_cache.Rows | None":
        """Gather rows whose pages nobody holds for us: they may have changed hands before the copy was complete."""
        block = _attempt(rid, self._gather, ticket.slots, start, rid, ())
        if isinstance(block, RowBlock) and self._engine.host_cache.is_current(ticket):
            return rows_of(np.frombuffer(block.data, dtype=np.uint8), block.header)
        return None

    def _gather_rest(self, early: _Early, slots: Slots, rid: str, versions: Spans) -> RowBlock:
        """Gather what was not gathered early, or all if that came to nothing."""
        rows = early.rows.result()
        if rows is None:
            return self._gather(slots, early.start, rid, versions)
        rest = self._gather(slots[len(rows) :], early.stop, rid, ())
        rows = np.concatenate((rows, rows_of(np.frombuffer(rest.data, dtype=np.uint8), rest.header)))
        # Both parts have been verified.
        return self._make_block(rows, early.start, versions, False)

    def _make_block(
        self, rows: npt.NDArray[np.unsignedinteger], start: int, versions: Spans, verified: bool
    ) -> RowBlock:
        spec = self._engine.host_cache.spec
        return make_block(spec, rows, start=start, weight_versions=versions, verified=verified)

    def _deliver(self, rows: Rows, done: Done) -> None:
        self.num_refused += isinstance(rows, RowsError)
        done(rows)


def _attempt(rid: str, gather: Callable[..., RowBlock], *arguments: object) -> Rows:
    """Gather a request's rows; whatever goes wrong fails this request and no other."""
    try:
        return gather(*arguments)
    except RowsError as error:
        return error
    except Exception as error:
        log.exception("the rows of %s could not be gathered", rid)
        return RowsError(f"the rows of {rid!r} could not be gathered: {type(error).__name__}: {error}")
