"""The samples that are open at the moment, by the names that their clients gave them.

It sends nothing. Neighbours: `pair` (enters every sample here), `control` (finds here what /abort_request is to end).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from router.membership import Worker


@dataclass(slots=True, eq=False)
class OpenSample:
    """One prompt's legs: the client's rid, the rid of both legs, and where they run."""

    rid: str
    leg_rid: str
    workers: tuple[Worker, ...]
    is_aborted: bool = False
    """Somebody has asked for its end."""


class Registry:
    """All open samples of one router. Two requests may have the same rid."""

    def __init__(self) -> None:
        self._open: dict[str, OpenSample] = {}

    @contextmanager
    def entered(self, sample: OpenSample) -> Iterator[OpenSample]:
        """Keep a sample here as long as it lasts."""
        self._open[sample.leg_rid] = sample
        try:
            yield sample
        finally:
            del self._open[sample.leg_rid]

    def is_open(self, sample: OpenSample) -> bool:
        """Whether the sample has not ended yet."""
        return sample.leg_rid in self._open

    def matching(self, prefix: str) -> list[OpenSample]:
        """Find the samples whose rid begins like this; the empty prefix finds them all."""
        return [sample for sample in self._open.values() if sample.rid.startswith(prefix)]
