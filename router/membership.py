"""The workers that the router knows, and how many requests each has at the moment.

It knows no HTTP and picks nobody. Neighbours: `policy` (picks among these), `pair` (counts its legs here).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from common.errors import NoHealthyPair
from common.messages import Leg, WorkerKind, leg_of
from router.config import RouterOptions
from router.policy import make_policy


@dataclass(slots=True, eq=False)
class Worker:
    """One worker. `bootstrap_port` is where decode workers find a prefill worker; the others have none."""

    url: str
    role: WorkerKind
    bootstrap_port: int | None = None
    outstanding: int = 0

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

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Count one request more, as long as it lasts."""
        self.outstanding += 1
        try:
            yield
        finally:
            self.outstanding -= 1


class Membership:
    """All workers, prefill and decode or aggregated ones; each role has a policy of its own, so that their turns do not mix."""

    def __init__(self, options: RouterOptions) -> None:
        self.prefill = [Worker(url.rstrip("/"), "prefill", port) for url, port in options.prefill]
        self.decode = [Worker(url.rstrip("/"), "decode") for url in options.decode]
        self.aggregated = [Worker(url.rstrip("/"), "aggregated") for url in options.worker]
        self._prefill_policy = make_policy(options.policy)
        self._decode_policy = make_policy(options.policy)
        self._aggregated_policy = make_policy(options.policy)

    @property
    def workers(self) -> list[Worker]:
        """All of them, prefill first."""
        return [*self.prefill, *self.decode, *self.aggregated]

    @property
    def has_pairs(self) -> bool:
        """Whether a request takes two workers."""
        return not self.aggregated

    def pick_aggregated(self) -> Worker:
        """Pick an aggregated worker; there is one."""
        return self._aggregated_policy(self.aggregated)

    def pick_prefill(self) -> Worker:
        """Pick a prefill worker; NoHealthyPair if there is none."""
        if not self.prefill:
            raise NoHealthyPair("there is no prefill worker", leg="prefill", stage="pick")
        return self._prefill_policy(self.prefill)

    def pick_decode(self) -> Worker:
        """Pick a decode worker; NoHealthyPair if there is none."""
        if not self.decode:
            raise NoHealthyPair("there is no decode worker", leg="decode", stage="pick")
        return self._decode_policy(self.decode)
