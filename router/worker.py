"""One worker as the router knows it: what it has to do, how it is, and whether it may get more.

It knows no HTTP and no other worker. Neighbours: `membership` (has them all), `breaker`, `health` (says how it is),
`leg_run` (its legs in flight).
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit
from uuid import uuid4

from common.errors import LegFailed, TandemError
from common.messages import Leg, WorkerKind, leg_of
from router.breaker import Breaker
from router.policy import LeastLoaded

_log = logging.getLogger(__name__)


class InFlight(Protocol):
    """A leg that a worker has not ended yet."""

    @property
    def tokens(self) -> int:
        """An estimate of the tokens that it computes, of prompt and output."""

    def fail(self, error: TandemError) -> None:
        """End it with this error."""

    def postpone(self, seconds: float) -> None:
        """Give it so much longer for whatever is due."""


@dataclass(slots=True, eq=False)
class Group:
    """An attention group of a worker, and how many legs were placed there and last."""

    index: int
    outstanding: int = 0


class Worker:
    """One worker. `bootstrap_port` is where decode workers find a prefill worker; the others have none.

    `when_idle` is called whenever the last of its legs in flight has ended.
    """

    def __init__(
        self,
        url: str,
        role: WorkerKind,
        breaker: Breaker,
        bootstrap_port: int | None = None,
        when_idle: Callable[["Worker"], None] = lambda _: None,
    ) -> None:
        self.id = uuid4().hex
        self.url = url
        self.role: WorkerKind = role
        self.breaker = breaker
        self.bootstrap_port = bootstrap_port
        self.in_flight: set[InFlight] = set()
        self.outstanding_tokens = 0
        """What its legs in flight are estimated to compute."""
        self.unhealthy_reason: str | None = None
        """Why it is unhealthy; None while it is not, or nobody knows yet."""
        self.is_paused = False
        """It holds its requests for the moment, those that come too."""
        self.weight_version: str | None = None
        """As far as it has said."""
        self.model: str | None = None
        """As far as it has said."""
        self.lease_s: float | None = None
        """For how long it joined; None: for good."""
        self.lease_left_s = 0.0
        self.instance: str | None = None
        """Which process it is, if it joined by itself."""
        self.is_draining = False
        """It gets no more legs, and leaves when those that it has have ended."""
        self.gone = asyncio.Event()
        """It has left."""
        self._when_idle = when_idle
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

    def begin(self, leg: InFlight) -> None:
        """Note that it has a leg more."""
        self.in_flight.add(leg)
        self.outstanding_tokens += leg.tokens

    def end(self, leg: InFlight) -> None:
        """Note that a leg is over."""
        self.in_flight.remove(leg)
        self.outstanding_tokens -= leg.tokens
        if not self.in_flight:
            self._when_idle(self)

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
    def is_unwell(self) -> bool:
        """Whether its health is all that it lacks, as far as is known."""
        return self.unhealthy_reason is not None and not self.is_draining

    @property
    def obstacle(self) -> str | None:
        """Why it can take no leg; None if it can."""
        if self.is_draining:
            return "it is being removed"
        if self.unhealthy_reason is not None:
            return self.unhealthy_reason
        return None if self.breaker.lets_through else f"its circuit breaker is {self.breaker.state.value}"

    def mark_healthy(
        self, dp_size: int, *, is_paused: bool = False, weight_version: str | None = None, model: str | None = None
    ) -> None:
        """Note that it is well, and what it says of itself; `dp_size` is how many attention groups it has."""
        if dp_size != self.dp_size:
            # What was placed in the groups before counts there to its end.
            self._groups = [Group(index) for index in range(dp_size)]
        self.is_paused, self.weight_version, self.model = is_paused, weight_version, model
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

    def postpone_legs(self, seconds: float) -> None:
        """Give its legs in flight so much longer."""
        for leg in self.in_flight:
            leg.postpone(seconds)
