"""The prompts that are open at the moment, by the names that their clients gave them.

It sends nothing. Neighbours: `resume` (enters every prompt here), `attempts` (says where it runs), `control`, `pause_api` and
`orders_api` (find here what is to end), `gate`.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from router.worker import Worker


@dataclass(slots=True, eq=False)
class OpenSample:
    """One prompt: the client's rid, and of each attempt that runs for it the legs' rid and their workers.

    There is no attempt between two of them, and there may be one for each sample when these go on by themselves.
    """

    rid: str
    legs: dict[str, tuple[Worker, ...]] = field(default_factory=dict)
    aborted: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when somebody has asked for its end; no further attempt begins."""

    @property
    def is_aborted(self) -> bool:
        """Whether somebody has asked for its end."""
        return self.aborted.is_set()

    @contextmanager
    def attempted(self, leg_rid: str, workers: tuple[Worker, ...]) -> Iterator[None]:
        """Say where an attempt runs, as long as that lasts."""
        self.legs[leg_rid] = workers
        try:
            yield
        finally:
            del self.legs[leg_rid]


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

    def matching(self, prefix: str) -> list[OpenSample]:
        """Find the prompts whose rid begins like this; the empty prefix finds them all."""
        return [sample for sample in self._open if sample.rid.startswith(prefix)]
