"""The workers that the router knows at the moment: who joins, who leaves, and the picking of one that can take a leg.

    join ----> member ----leave, or its lease passes----> draining --its last leg ends--> gone
                 ^                                           |
                 '----------------- join --------------------'

A worker can take a leg if it is healthy, not draining, and its circuit breaker lets it through. Flags name the workers of
the start, which stay for good; those that join later may have a lease. It knows no HTTP. Neighbours: `worker` (one of them),
`policy` (which of several), `workers_api` (joins and leaves), `health` (follows who there is, and lets the leases' time
pass), `attempts` (picks).
"""

import asyncio
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final

from common.errors import NoHealthyPair, RequestError
from common.messages import ErrorReport, ReportedError, WorkerKind, leg_of
from common.protocol.generate import Sample
from router.breaker import Breaker
from router.config import RouterOptions
from router.policy import make_policy
from router.worker import Worker

_log = logging.getLogger(__name__)

_ROLES: Final[tuple[WorkerKind, ...]] = ("prefill", "decode", "aggregated")
_MAX_REMOVED: Final = 1024
"""How many removed instances are remembered; a worker that hears of it asks no more."""


class Membership:
    """All workers, prefill and decode or aggregated ones; each role has a policy of its own, so that their turns do not mix."""

    def __init__(self, options: RouterOptions) -> None:
        self.changed = asyncio.Event()
        """Set when a worker has come or gone; whoever follows clears it."""
        self._options = options
        self._removed: deque[str] = deque(maxlen=_MAX_REMOVED)
        self._workers: dict[WorkerKind, list[Worker]] = {role: [] for role in _ROLES}
        self._policies = {role: make_policy(options, role) for role in _ROLES}
        places: dict[WorkerKind, Sequence[tuple[str, int | None]]] = {
            "prefill": options.prefill,
            "decode": [(url, None) for url in options.decode],
            "aggregated": [(url, None) for url in options.worker],
        }
        for role, mine in places.items():
            for url, port in mine:
                self._add(url.rstrip("/"), role, port)

    @property
    def workers(self) -> list[Worker]:
        """All of them, prefill first, those that drain too."""
        return [worker for workers in self._workers.values() for worker in workers]

    @property
    def has_pairs(self) -> bool:
        """Whether a request takes two workers."""
        return not any(self._staying("aggregated"))

    def is_short(self, roles: Sequence[WorkerKind]) -> bool:
        """Whether in one of these roles nobody can take a leg, and somebody might if it was well."""
        members = [self._workers[role] for role in roles]
        return any(
            all(worker.obstacle is not None for worker in workers) and any(worker.is_unwell for worker in workers)
            for workers in members
        )

    def find(self, name: str) -> Worker | None:
        """Find a worker by its id or its URL; of two with one URL the one that stays."""
        named = [worker for worker in self.workers if name == worker.id or name.rstrip("/") == worker.url]
        return min(named, key=lambda worker: worker.is_draining, default=None)

    def join(
        self,
        url: str,
        role: WorkerKind,
        *,
        bootstrap_port: int | None = None,
        lease_s: float | None = None,
        instance: str | None = None,
    ) -> tuple[Worker, bool]:
        """Take a worker in for good or for a lease, and say whether it is new: one that is known keeps all that is known of it.

        One whose role or bootstrap port has changed is another worker: the one before drains. `instance` tells a process that
        joins by itself from the others that were at its URL. Raises RequestError if it does not go with those that there are,
        and ReportedError (410) if this instance was removed.
        """
        url = url.rstrip("/")
        if instance is not None and instance in self._removed:
            message = f"the worker on {url} was removed: a process that is started anew may join"
            raise ReportedError(ErrorReport(status=410, message=message, code="worker_removed"))
        others: Sequence[WorkerKind] = ("prefill", "decode") if role == "aggregated" else ("aggregated",)
        for other in others:
            if any(worker.url != url for worker in self._staying(other)):
                raise RequestError("worker_type", f"is {role}, but there are {other} workers: the two do not mix")
        worker = self.find(url)
        is_new = worker is None or (worker.role, worker.bootstrap_port) != (role, bootstrap_port)
        if worker is None or is_new:
            if worker is not None:
                self.leave(worker, "another worker has its URL now")
            worker = self._add(url, role, bootstrap_port)
            _log.info("the %s worker on %s has joined", role, url)
        worker.is_draining = False
        worker.lease_s, worker.lease_left_s, worker.instance = lease_s, lease_s or 0.0, instance
        return worker, is_new

    def remove(self, worker: Worker) -> None:
        """Have a worker leave because somebody asked for it: if it joins by itself, its next renewal is refused."""
        if worker.instance is not None:
            self._removed.append(worker.instance)
        self.leave(worker, "somebody asked for it")

    def leave(self, worker: Worker, reason: str) -> None:
        """Give a worker no more legs; it is `gone` when those that it has have ended."""
        if not worker.is_draining:
            _log.info("the %s worker on %s is being removed: %s", worker.role, worker.url, reason)
        worker.is_draining = True
        if not worker.in_flight:
            self._drop_if_draining(worker)

    def pass_time(self, seconds: float) -> None:
        """Let so much of the leases' time pass; workers whose lease was over before leave."""
        for worker in self.workers:
            if worker.lease_s is None or worker.is_draining:
                continue
            # Not what is over by now: it may have joined only a moment ago, when most of this time had passed.
            if worker.lease_left_s <= 0:
                self.leave(worker, f"it has not renewed its lease of {worker.lease_s:g} s")
            worker.lease_left_s -= seconds

    def pick(
        self, role: WorkerKind, sample: Sample, *, failed: Sequence[Worker] = (), version: str | None = None
    ) -> Worker:
        """Pick a worker that can take a leg of a prompt.

        Those of the weight version `version` come first; of those that `failed`, in this order, one is picked only if there
        is no other. Raises NoHealthyPair, which says what is the matter with each.
        """
        workers = self._workers[role]
        candidates = [worker for worker in workers if worker.obstacle is None]
        if not candidates:
            obstacles = "; ".join(f"{worker.url}: {worker.obstacle}" for worker in workers)
            what = f"no {role} worker can take a request: {obstacles}" if workers else f"there is no {role} worker"
            raise NoHealthyPair(what, leg=leg_of(role), stage="pick")
        if version is not None:
            candidates = [worker for worker in candidates if worker.weight_version == version] or candidates
        last_failure = {worker: index for index, worker in enumerate(failed)}
        longest_ago = min(last_failure.get(worker, -1) for worker in candidates)
        return self._policies[role]([w for w in candidates if last_failure.get(w, -1) == longest_ago], sample)

    def _staying(self, role: WorkerKind) -> Iterator[Worker]:
        return (worker for worker in self._workers[role] if not worker.is_draining)

    def _add(self, url: str, role: WorkerKind, bootstrap_port: int | None) -> Worker:
        breaker = Breaker(max_failures=self._options.breaker_failures, pause_s=self._options.breaker_pause_s)
        worker = Worker(url, role, breaker, bootstrap_port, self._drop_if_draining)
        self._workers[role].append(worker)
        self.changed.set()
        return worker

    def _drop_if_draining(self, worker: Worker) -> None:
        # A leg that was picked before the worker was gone may begin and end after.
        if worker.is_draining and not worker.gone.is_set():
            self._workers[worker.role].remove(worker)
            worker.gone.set()
            self.changed.set()
            _log.info("the %s worker on %s is gone", worker.role, worker.url)
