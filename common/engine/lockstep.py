"""Steps that all attention groups of a worker take together: who brings how many tokens, and when nobody needs to step at all.

A group that has something to run announces it to the leaders of the others; those find it when their loops turn, and join, with
an empty batch if they have nothing themselves. A step begins when all have announced what they bring. So all groups step equally
often, and none steps while all are idle.

Neighbours: `common.engine.engine` (meets before each launch), `common.engine.loop` (joins when called).
"""

from collections import defaultdict
from typing import NamedTuple, Protocol

from msgspec import Struct

from common.ranks import Rank

_WAIT_S = 1.0


class Share(Struct, frozen=True):
    """What one group brings to one step; a group that `has_left` will take no more steps."""

    step: int
    group: int
    num_tokens: int = 0
    fits_graph: bool = False
    has_left: bool = False


class StepShape(NamedTuple):
    """What the ranks of all groups must know alike of a step."""

    group_tokens: tuple[int, ...]
    """Tokens of each attention group."""
    all_fit_graph: bool
    """Whether every group's part fits a padded graph; if one does not, none uses it."""


class Link(Protocol):
    """The way to the leaders of the other groups; `common.wire.RankLink` is the real one."""

    def send(self, rank: int, message: Share) -> None:
        """Queue a message."""

    def receive(self) -> list[Share]:
        """All messages that are here."""

    def wait(self, timeout_s: float) -> None:
        """Sleep until a message is here."""


class GroupLeft(Exception):
    """Another group of the worker has ended, so that no step can be taken any more."""


class Lockstep:
    """One group's leader among the others. With one group, every step is its own."""

    def __init__(self, rank: Rank, link: Link | None = None) -> None:
        assert (link is None) == (rank.of.dp == 1)
        self._group = rank.group
        self._num_groups = rank.of.dp
        self._others = [rank.of.leader_of(group) for group in range(rank.of.dp) if group != rank.group]
        self._link = link
        self._step = 0
        self._shares: defaultdict[int, dict[int, Share]] = defaultdict(dict)
        self._has_left = False

    @property
    def is_called(self) -> bool:
        """Whether another group waits for this one to take the next step."""
        if self._link is None:
            return False
        self._take_in()
        return bool(self._shares[self._step])

    def meet(self, num_tokens: int, *, fits_graph: bool) -> StepShape:
        """Announce what this group brings to the next step, and wait until all others have. Raises GroupLeft."""
        if self._link is None:
            return StepShape((num_tokens,), fits_graph)
        own = Share(self._step, self._group, num_tokens, fits_graph)
        shares = self._shares[self._step]
        shares[self._group] = own
        self._tell(own)
        while len(shares) < self._num_groups:
            if self._has_left:
                raise GroupLeft("another attention group of this worker has ended")
            self._link.wait(_WAIT_S)
            self._take_in()
        del self._shares[self._step]
        self._step += 1
        return StepShape(
            tuple(shares[group].num_tokens for group in range(self._num_groups)),
            all(share.fits_graph for share in shares.values()),
        )

    def leave(self) -> None:
        """Take no more steps, and let the others know."""
        if self._link is not None:
            self._tell(Share(self._step, self._group, has_left=True))

    def _tell(self, share: Share) -> None:
        assert self._link is not None
        for rank in self._others:
            self._link.send(rank, share)

    def _take_in(self) -> None:
        assert self._link is not None
        for share in self._link.receive():
            if share.has_left:
                self._has_left = True
            else:
                self._shares[share.step][share.group] = share
