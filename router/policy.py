"""How one worker is picked among those of its role.

A policy sees only how many requests each candidate has outstanding. Neighbour: `membership` (asks, one policy a role).
"""

import random
from collections.abc import Callable, Sequence
from itertools import count
from typing import Protocol, TypeVar, assert_never

from router.config import PolicyName


class Loaded(Protocol):
    """What a policy may look at."""

    @property
    def outstanding(self) -> int:
        """How many legs it has at the moment."""


Candidate = TypeVar("Candidate", bound=Loaded)


class Policy(Protocol):
    """Picks one of the candidates, of which there is at least one."""

    def __call__(self, candidates: Sequence[Candidate], /) -> Candidate: ...


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self._turns = count()

    def __call__(self, candidates: Sequence[Candidate], /) -> Candidate:
        return candidates[next(self._turns) % len(candidates)]


class LeastLoaded:
    """The one with the fewest requests outstanding; equals take turns, or the first would get every short request."""

    def __init__(self) -> None:
        self._take_turns = RoundRobin()

    def __call__(self, candidates: Sequence[Candidate], /) -> Candidate:
        fewest = min(candidate.outstanding for candidate in candidates)
        return self._take_turns([candidate for candidate in candidates if candidate.outstanding == fewest])


class Random:
    """Any, with equal chance."""

    def __init__(self, choice: Callable[[int], int] = random.randrange) -> None:
        self._choice = choice

    def __call__(self, candidates: Sequence[Candidate], /) -> Candidate:
        return candidates[self._choice(len(candidates))]


def make_policy(name: PolicyName) -> Policy:
    """Make a fresh policy of this name."""
    match name:
        case "random":
            return Random()
        case "round_robin":
            return RoundRobin()
        case "least_loaded":
            return LeastLoaded()
        case _:
            assert_never(name)
