"""Rooms that have closed are remembered for a while: a late message, or a late start, must not open them again.

Pure; its caller has the clock. Neighbour: `transfer.sender`.
"""

from itertools import takewhile
from typing import Final, NamedTuple

_MAX_TOMBSTONES: Final = 2**20
"""Above it the oldest are forgotten."""


class _Tombstone(NamedTuple):
    until: float
    code: str


class Tombstones:
    """Closed rooms, each remembered for `lasting_s`; times are in the caller's clock, and never go back."""

    def __init__(self, lasting_s: float) -> None:
        self._lasting_s = lasting_s
        self._tombstones: dict[int, _Tombstone] = {}

    def __len__(self) -> int:
        return len(self._tombstones)

    def __contains__(self, room: int) -> bool:
        return room in self._tombstones

    def bury(self, room: int, code: str, now: float) -> None:
        """Remember a room; `code` is what whoever comes late is told of it."""
        self._tombstones.pop(room, None)  # those that last longest are last
        if len(self._tombstones) >= _MAX_TOMBSTONES:
            del self._tombstones[next(iter(self._tombstones))]
        self._tombstones[room] = _Tombstone(now + self._lasting_s, code)

    def code_of(self, room: int) -> str | None:
        """What to tell of a room; None if it is not remembered."""
        tombstone = self._tombstones.get(room)
        return None if tombstone is None else tombstone.code

    def expire(self, now: float) -> None:
        """Forget those whose time is over."""
        for room in list(takewhile(lambda room: self._tombstones[room].until <= now, self._tombstones)):
            del self._tombstones[room]
