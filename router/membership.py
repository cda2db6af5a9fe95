"""The workers that the router knows, what is known of each, and the picking of one that can take a leg.

A worker can take one if it is healthy and its circuit breaker lets it through. It knows no HTTP. Neighbours: `policy` (which
of several), `breaker`, `health` (says who is healthy), `leg_run` (the legs in flight), `attempts` (picks).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from common.errors import LegFailed, NoHealthyPair, TandemError
from common.messages import Leg, WorkerKind, leg_of
from router.breaker import Breaker
from router.config import RouterOptions
from router.policy import LeastLoaded, make_policy

_log = logging.getLogger(__name__)


class InFlight(Protocol):
    """A leg that a worker has not ended yet."""

    def fail(self, error: TandemError) -> None:
        """End it with this error."""


@dataclass(slots=True, eq=False)
class Group:
    """An attention group of a worker, and how many legs were placed there and last."""

    index: int
    outstanding: int = 0


class Worker:
    """One worker. `bootstrap_port` is where decode workers find a prefill worker; the others have none."""

    def __init__(self, url: str, role: WorkerKind, breaker: Breaker, bootstrap_port: int | None = None) -> None:
        self.url = url
        self.role: WorkerKind = role
        self.breaker = breaker
        self.bootstrap_port = bootstrap_port
        self.in_flight: set[InFlight] = set()
        self.unhealthy_reason: str | None = None
        """Why it is unhealthy; None while it is not, or nobody knows yet."""
        self._groups = [Group(0)]
        self._pick_group = LeastLoaded()

    @property
    def dp_size(self) -> int:
        """How many attention groups it has, as far as is known: 1 until it has said so."""
        return len(self._groups)

    def choose_group(self) -> Group:
        """Choose the group with the fewest legs."""
        return self._pick_group(self._groups)

    @property
    def outstanding(self) -> int:
        """How many legs it has at the moment."""
        return len(self.in_flight)

    @property
    def host(self) -> str:
        """The host of the URL, without brackets around an IPv6 address."""
        return urlsplit(self.url).hostname or ""

    @property
    def leg(self) -> Leg | None:
        """Which leg of a pair it serves; None if it serves whole requests."""
        return leg_of(self.role)

    @property
    def label(self) -> str:
        """Name it in an error."""
        return f"{self.role} {'worker' if self.leg is None else 'leg'} on {self.url}"

    @property
    def obstacle(self) -> str | None:
        """Why it can take no leg; None if it can."""
        if self.unhealthy_reason is not None:
            return self.unhealthy_reason
        return None if self.breaker.lets_through else f"its circuit breaker is {self.breaker.state.value}"

    def mark_healthy(self, dp_size: int) -> None:
        """Note that it is well, and how many attention groups it has."""
        if dp_size != self.dp_size:
            # What was placed in the groups before counts there to its end.
            self._groups = [Group(index) for index in range(dp_size)]
        if self.unhealthy_reason is not None:
            _log.info("the %s worker on %s is healthy again", self.role, self.url)
        self.unhealthy_reason = None

    def mark_unhealthy(self, reason: str, *, ends_legs: bool) -> None:
        """Note that it is not well; `ends_legs` if it will not end its legs in flight either."""
        if self.unhealthy_reason is None:
            _log.warning("the %s worker on %s is unhealthy: %s", self.role, self.url, reason)
        self.unhealthy_reason = reason
        if ends_legs:
            for leg in self.in_flight:
                leg.fail(LegFailed(f"{self.label} is unhealthy: {reason}", leg=self.leg, stage="health"))


class Membership:
    """All workers, prefill and decode or aggregated ones; each role has a policy of its own, so that their turns do not mix."""

    def __init__(self, options: RouterOptions) -> None:
        urls: dict[WorkerKind, Sequence[tuple[str, int | None]]] = {
            "prefill": options.prefill,
            "decode": [(url, None) for url in options.decode],
            "aggregated": [(url, None) for url in options.worker],
        }
        self._workers = {
            role: [
                Worker(
                    url.rstrip("/"),
                    role,
                    Breaker(max_failures=options.breaker_failures, pause_s=options.breaker_pause_s),
                    port,
                )
                for url, port in places
            ]
            for role, places in urls.items()
        }
        self._policies = {role: make_policy(options.policy) for role in urls}

    @property
    def workers(self) -> list[Worker]:
        """All of them, prefill first."""
        return [worker for workers in self._workers.values() for worker in workers]

    @property
    def has_pairs(self) -> bool:
        """Whether a request takes two workers."""
        return not self._workers["aggregated"]

    def pick(self, role: WorkerKind, failed: Sequence[Worker] = ()) -> Worker:
        """Pick a worker that can take a leg; of those that `failed`, in this order, only if there is no other.

        Raises NoHealthyPair, which says what is the matter with each.
        """
        workers = self._workers[role]
        candidates = [worker for worker in workers if worker.obstacle is None]
        if not candidates:
            obstacles = "; ".join(f"{worker.url}: {worker.obstacle}" for worker in workers)
            what = f"no {role} worker can take a request: {obstacles}" if workers else f"there is no {role} worker"
            raise NoHealthyPair(what, leg=leg_of(role), stage="pick")
        last_failure = {worker: index for index, worker in enumerate(failed)}
        longest_ago = min(last_failure.get(worker, -1) for worker in candidates)
        return self._policies[role]([w for w in candidates if last_failure.get(w, -1) == longest_ago])
