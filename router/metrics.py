"""The router's Prometheus metrics, in a registry of their own, so that two routers can live in one process.

Neighbours: `app` (requests), `pair` (failures and rows), `membership` (outstanding requests, read at each scrape).
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from router.membership import Membership

_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


class RouterMetrics:
    """Counters and histograms of one router."""

    def __init__(self, membership: Membership) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "tandem_router_requests", "Requests to /generate by final status", ["status"], registry=self.registry
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
        self.rows_returned = Counter(
            "tandem_router_routed_experts_rows", "Rows of routed experts that left", registry=self.registry
        )
        self.registry.register(_Outstanding(membership))

    def text(self) -> bytes:
        """Write all metrics in Prometheus's text format."""
        return generate_latest(self.registry)


class _Outstanding(Collector):
    """Each worker's outstanding requests, taken from where they are counted anyway."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily(
            "tandem_router_outstanding_requests", "Legs without a reply yet", labels=["role", "worker"]
        )
        for worker in self._membership.workers:
            family.add_metric([worker.role, worker.url], worker.outstanding)
        yield family
