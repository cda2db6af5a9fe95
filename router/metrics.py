"""The router's Prometheus metrics, in a registry of their own, so that two routers can live in one process.

Neighbours: `intake` (requests), `resume` (failures), `attempts` (retries and rows), `membership` (what is known of each
worker, read at each scrape).
"""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from common.messages import RowBlock
from router.breaker import BreakerState
from router.membership import Membership
from router.worker import Worker

_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


class RouterMetrics:
    """Counters and histograms of one router."""

    def __init__(self, membership: Membership) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "tandem_router_requests", "Requests that generate, by final status", ["status"], registry=self.registry
        )
        self.request_seconds = Histogram(
            "tandem_router_request_seconds",
            "From the request to the reply's end",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.running = Gauge("tandem_router_running_requests", "Requests without a reply yet", registry=self.registry)
        self.failures = Counter(
            "tandem_router_sample_failures",
            "Samples that failed, by leg and code",
            ["leg", "code"],
            registry=self.registry,
        )
        self.retries = Counter(
            "tandem_router_retries",
            "Attempts after the first one, by the leg and the stage that failed",
            ["leg", "stage"],
            registry=self.registry,
        )
        self.resumed = Counter(
            "tandem_router_resumed",
            "What was retracted and went on: samples from their tokens, samples or whole prompts from the beginning",
            ["what"],
            registry=self.registry,
        )
        self._rows_returned = Counter(
            "tandem_router_routed_experts_rows", "Rows of routed experts that left", registry=self.registry
        )
        self.registry.register(_Workers(membership))

    def count_rows(self, rows: RowBlock | None) -> None:
        """Count an answer's rows."""
        if rows is not None:
            self._rows_returned.inc(rows.header.shape[0])

    def text(self) -> bytes:
        """Write all metrics in Prometheus's text format."""
        return generate_latest(self.registry)


class _Workers(Collector):
    """What is known of each worker, taken from where it is kept anyway."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield self._family(
            "tandem_router_outstanding_requests", "Legs without a reply yet", lambda worker: worker.outstanding
        )
        yield self._family(
            "tandem_router_worker_healthy",
            "1 unless the worker's health checks fail",
            lambda worker: worker.unhealthy_reason is None,
        )
        yield self._family(
            "tandem_router_breaker_open",
            "1 unless the worker's circuit breaker is closed",
            lambda worker: worker.breaker.state is not BreakerState.CLOSED,
        )

    def _family(self, name: str, what: str, value: Callable[[Worker], float]) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, what, labels=["role", "worker"])
        # While one drains another may have its URL; a series that came twice would spoil them all.
        for (role, url), worker in {(one.role, one.url): one for one in self._membership.workers}.items():
            family.add_metric([role, url], value(worker))
        return family
