"""The prompts that are open at the moment, by the names that their clients gave them.

It sends nothing. Neighbours: `attempts` (enters every prompt here), `control` (finds here what /abort_request is to end).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from router.membership import Worker


@dataclass(slots=True, eq=False)
class OpenSample:
    """One prompt: the client's rid, and of its present attempt the legs' rid and where they run."""

    rid: str
    leg_rid: str = ""
    workers: tuple[Worker, ...] = ()
    """Empty between two attempts."""
    is_aborted: bool = False
    """Somebody has asked for its end."""

    @contextmanager
    def attempted(self, leg_rid: str, workers: tuple[Worker, ...]) -> Iterator[None]:
        """Say where it runs, as long as that lasts."""
        self.leg_rid, self.workers = leg_rid, workers
        try:
            yield
        finally:
            self.workers = ()


class Registry:
    """All open prompts of one router. Two requests may have the same rid."""

    def __init__(self) -> None:
        # A dict for its order.
        self._open: dict[OpenSample, None] = {}

    @contextmanager
    def entered(self, rid: str) -> Iterator[OpenSample]:
        """Keep a prompt here as long as it lasts."""
        sample = OpenSample(rid)
        self._open[sample] = None
        try:
            yield sample
        finally:
            del self._open[sample]

    def is_open(self, sample: OpenSample) -> bool:
        """Whether the prompt has not ended yet."""
        return sample in self._open

    def matching(self, prefix: str) -> list[OpenSample]:
        """Find the prompts whose rid begins like this; the empty prefix finds them all."""
        return [sample for sample in self._open if sample.rid.startswith(prefix)]
