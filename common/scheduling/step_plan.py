"""One forward pass as plain data: which positions of which requests run. Decided on the host, before anything is launched.

A plan says nothing of how it is computed; `common.engine.batch` turns it into tensors, and `common.engine.step` answers it
with one outcome an entry, in the same order.
"""

from dataclasses import dataclass

from msgspec import Struct

from common.scheduling.request import Request


# `gc=False`: one is made for every request and step, and can be in no cycle, since nothing in it leads back to it.
class StepEntry(Struct, frozen=True, gc=False):
    """One request's part of a step: its positions `[start, stop)`.

    The logits of position `stop - 1` yield `samples` tokens for position `stop`, sample i with the request's seed + i.
    Positions below the request's `num_known_tokens` take their token from the host; the one that follows takes it from the
    device, where the step before left it.
    """

    request: Request
    start: int
    stop: int
    samples: int

    @property
    def num_tokens(self) -> int:
        """Tokens that this entry adds to the step."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The entries of one step; a request stands in it once at most. Without entries it is a step for other groups' sake."""

    entries: tuple[StepEntry, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole step."""
        return sum(entry.num_tokens for entry in self.entries)
