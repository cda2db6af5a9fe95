"""An engine's statistics in Prometheus' text form. Each scrape asks the engine anew, so nothing is kept here."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from common.messages import Stats

_GAUGES = {
    "queued_requests": "requests that hold nothing yet",
    "running_requests": "requests that take part in steps",
    "rooms": "KV transfers that are open",
}
_COUNTERS = {
    "steps": "forward passes",
    "failed_steps": "forward passes that failed, and their requests with them",
    "tokens_computed": "tokens that went through a forward pass",
    "tokens_cached": "prompt tokens that came from the prefix cache",
    "rows_committed": "routed-expert rows written to the host cache",
    "rows_dropped": "routed-expert rows whose slot had changed hands",
    "rows_refused": "requests refused because of missing or bad routed-expert rows",
    "kv_bytes": "bytes of KV pages moved",
    "kv_writes": "KV writes",
    "swaps": "requests swapped to host memory",
    "dropped_messages": "late, duplicate or undecodable transfer messages",
}
_PAGES = ("total", "free", "cached", "running", "quarantined", "unaccounted")


class _StatsCollector:
    def __init__(self, stats: Stats, role: str) -> None:
        self._stats = stats
        self._role = role

    def collect(self) -> Iterator[Metric]:
        for name, text in _GAUGES.items():
            gauge = GaugeMetricFamily(f"tandem_{name}", text, labels=["role"])
            gauge.add_metric([self._role], getattr(self._stats, name))
            yield gauge
        for name, text in _COUNTERS.items():
            counter = CounterMetricFamily(f"tandem_{name}", text, labels=["role"])
            counter.add_metric([self._role], getattr(self._stats, name))
            yield counter
        pages = GaugeMetricFamily("tandem_kv_pages", "KV pages, recounted from their owners", labels=["role", "state"])
        for state in _PAGES:
            pages.add_metric([self._role, state], getattr(self._stats.pages, state))
        yield pages


def render_stats(stats: Stats, role: str) -> bytes:
    """Write one engine's statistics as a scrape's body."""
    registry = CollectorRegistry()
    registry.register(_StatsCollector(stats, role))
    return generate_latest(registry)
