"""Gathers an ended request's rows off the step path: on threads of their own where they are many, at once where they are few.

A request keeps its pages while its rows are gathered; `holds` says so. Results come back through `poll`, in the engine's thread,
so nobody else ever touches a request. Neighbours: `common.routed_experts.collect` (does the work), the roles' workers.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from common.engine.engine import Engine
from common.errors import RowsError
from common.messages import RowBlock
from common.routed_experts.collect import make_block
from common.scheduling.request import Request

Rows = RowBlock | RowsError | None
"""A block, why there is none, or None if none was asked for."""
Done = Callable[[Rows], None]

_SMALL_BYTES = 64 * 2**10
_NUM_THREADS = (
    4  # requests that end together are gathered together; numpy lets go of the interpreter's lock for most of it
)


class RowCollector:
    """Collects for one engine. `wake` ends the engine's wait when a result is there; without one, all is done at once."""

    def __init__(self, engine: Engine, *, verified: bool, wake: Callable[[], None] | None = None) -> None:
        self._engine = engine
        self._verified = verified
        self._wake = wake
        self._executor = ThreadPoolExecutor(_NUM_THREADS, "rows") if wake is not None else None
        self._pending: deque[tuple[Request, Future[Rows], Done]] = deque()
        self.num_refused = 0

    def collect(self, request: Request, start: int, stop: int, done: Done) -> None:
        """Gather the settled rows of positions `[start, stop)`, if the request wants rows, and call `done` with them."""
        if not request.message.options.return_routed_experts:
            done(None)
        elif self._executor is None or (stop - start) * self._engine.host_cache.spec.row_bytes < _SMALL_BYTES:
            self._deliver(self._gather(request, start, stop), done)
        else:
            future = self._executor.submit(self._gather, request, start, stop)
            self._pending.append((request, future, done))
            future.add_done_callback(lambda _: self._wake and self._wake())

    def collect_swapped(
        self, request: Request, swapped: npt.NDArray[np.unsignedinteger], start: int, done: Done
    ) -> None:
        """Do as `collect` does with rows `[n, L, K]` from position `start` on that have been copied out already."""
        if not request.message.options.return_routed_experts:
            done(None)
            return
        engine = self._engine
        try:
            rows: Rows = make_block(
                engine.host_cache.spec,
                swapped,
                start=start,
                weight_version=engine.weight_version,
                verified=self._verified,
            )
        except RowsError as error:
            rows = error
        self._deliver(rows, done)

    def holds(self, request: Request) -> bool:
        """Whether the request's rows are being gathered, so that its pages may not be given back."""
        return any(request is pending for pending, _, _ in self._pending)

    def poll(self) -> None:
        """Deliver what has been gathered, in the order in which it was asked for."""
        while self._pending and self._pending[0][1].done():
            _, future, done = self._pending.popleft()
            self._deliver(future.result(), done)

    def _gather(self, request: Request, start: int, stop: int) -> Rows:
        try:
            return self._engine.collect_rows(request, start, stop, verified=self._verified)
        except RowsError as error:
            return error

    def _deliver(self, rows: Rows, done: Done) -> None:
        self.num_refused += isinstance(rows, RowsError)
        done(rows)
