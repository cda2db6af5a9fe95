"""The faults: one random blow after the other, each to a random worker, and how long it took to get over it.

    engine killed, frontend killed   SIGKILL; an engine's blow is for one of its ranks
    engine paused                    SIGSTOP, and SIGCONT before any deadline has passed
    engine outlasted                 SIGSTOP, and SIGCONT after its peers have given it up: its writes come late
    engine fenced, frontend fenced   SIGSTOP, until the launcher kills the worker
    router paused                    SIGSTOP, and SIGCONT before any deadline has passed

Two workers of one role are never struck together: a role's next victim is chosen once all of its workers serve again. While
both roles have one that does not, the blow is the router's.
Neighbours: `setting` (the deadlines), `workers` (who serves).
"""

import asyncio
import contextlib
import logging
import os
import random
import time
from signal import SIGCONT, SIGKILL, SIGSTOP, Signals
from typing import Literal

from msgspec import Struct

from common.messages import Leg
from deploy.launch_options import RoleName
from deploy.soak.setting import OUTLASTED_S, PAUSED_S
from deploy.soak.workers import Workers
from deploy.stack import Stack, StackError, StackEvent

log = logging.getLogger(__name__)

RECOVERY_DEADLINE_S = 120.0
ROLES: tuple[Leg, ...] = ("prefill", "decode")


class Kind(Struct, frozen=True, kw_only=True):
    """One kind of fault."""

    name: str
    target: Literal["engine", "frontend", "router"]
    signal: Signals
    stopped_s: tuple[float, float] | None = None
    """The shortest and the longest time from SIGSTOP to SIGCONT; None: the worker ends, and is started again."""


KINDS = (
    Kind(name="engine killed", target="engine", signal=SIGKILL),
    Kind(name="frontend killed", target="frontend", signal=SIGKILL),
    Kind(name="engine paused", target="engine", signal=SIGSTOP, stopped_s=PAUSED_S),
    Kind(name="engine outlasted", target="engine", signal=SIGSTOP, stopped_s=OUTLASTED_S),
    Kind(name="engine fenced", target="engine", signal=SIGSTOP),
    Kind(name="frontend fenced", target="frontend", signal=SIGSTOP),
)
ROUTER_PAUSED = Kind(name="router paused", target="router", signal=SIGSTOP, stopped_s=PAUSED_S)


class Fault(Struct, frozen=True, kw_only=True):
    """A blow that was dealt `at` a time of `time.monotonic()`, in seconds. None: it did not come to that in time."""

    at: float
    kind: str
    victim: str
    ends_worker: bool
    ready_s: float | None = None
    """From the blow to the `ready` event of the worker's next start, if it had to be started again."""
    serving_s: float | None = None
    """From the blow until the router counts the worker among the healthy ones again."""

    def explains(self, end: StackEvent) -> bool:
        """Whether this is why a child has ended."""
        is_within = self.ready_s is None or end.at < self.at + self.ready_s
        return self.ends_worker and end.name == self.victim and self.at <= end.at and is_within


class Faults:
    """Deals blows for as long as it runs; `dealt` are those that have been got over, or were given up."""

    def __init__(
        self,
        stack: Stack,
        workers: Workers,
        *,
        seed: int,
        every_s: float,
        kinds: tuple[Kind, ...] = KINDS,
        otherwise: Kind | None = ROUTER_PAUSED,
    ) -> None:
        self.dealt: list[Fault] = []
        self.num_skipped = 0
        """Times at which there was nobody to strike, or the victim had just died by itself."""
        self._otherwise = otherwise
        self._stack = stack
        self._workers = workers
        self._kinds = kinds
        self._left_kinds: list[Kind] = []
        self._rng = random.Random(f"{seed} faults")
        self._every_s = every_s
        self._struck: set[RoleName] = set()

    async def run(self, duration_s: float) -> None:
        """Strike for so long; returns once the last blow has been got over. Raises ChildError if a worker is given up."""
        self._began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in range(1, int(duration_s / self._every_s) + 1):
                await asyncio.sleep(self._began + number * self._every_s - time.monotonic())
                roles = await self._whole_roles()
                role: RoleName = self._rng.choice(roles) if roles else "router"
                kind = self._next_kind() if roles else self._otherwise
                if kind is None or role in self._struck:
                    self.num_skipped += 1
                    continue
                self._struck.add(role)
                group.create_task(self._strike(kind, role, self._rng.choice(self._stack.names(role))))

    def _next_kind(self) -> Kind:
        """Draw a kind; each has its turn before any comes again."""
        if not self._left_kinds:
            self._left_kinds = self._rng.sample(self._kinds, len(self._kinds))
        return self._left_kinds.pop()

    async def _whole_roles(self) -> list[Leg]:
        views = await self._workers.views()
        serving = {name for name, view in views.items() if view.is_serving}
        return [role for role in ROLES if role not in self._struck and serving >= set(self._stack.names(role))]

    async def _strike(self, kind: Kind, role: RoleName, victim: str) -> None:
        stack, at, ready_at = self._stack, time.monotonic(), None
        num_starts = stack.num_starts(victim)
        try:
            pid = self._rng.choice(stack.engine_pids(victim)) if kind.target == "engine" else stack.pid(victim)
            os.kill(pid, kind.signal)
        except (StackError, ProcessLookupError):
            self.num_skipped += 1
            self._struck.remove(role)
            return
        log.info("%.1f s: %s, %s", at - self._began, victim, kind.name)
        if kind.stopped_s is not None:
            await _continue_after(self._rng.uniform(*kind.stopped_s), pid)
        else:
            with contextlib.suppress(StackError):
                await stack.wait_started(victim, num_starts + 1, RECOVERY_DEADLINE_S)
                ready_at = max(event.at for event in stack.events if (event.name, event.kind) == (victim, "ready"))
        # The router that answers is well.
        is_healthy = await self._workers.until_healthy({victim} - {"router"}, RECOVERY_DEADLINE_S)
        fault = Fault(
            at=at,
            kind=kind.name,
            victim=victim,
            ends_worker=kind.stopped_s is None,
            ready_s=None if ready_at is None else ready_at - at,
            serving_s=time.monotonic() - at if is_healthy else None,
        )
        self.dealt.append(fault)
        self._struck.remove(role)


async def _continue_after(duration_s: float, pid: int) -> None:
    """Let a stopped process go on after so long, even if this is cancelled meanwhile."""
    try:
        await asyncio.sleep(duration_s)
    finally:
        # The launcher may have killed it: a machine can be too busy for the times that were meant.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, SIGCONT)
