"""How one worker is picked among those of its role.

A policy sees what each candidate has to do, and the prompt. Neighbours: `membership` (asks, one policy a role), `prefixes`
(who has had which prompts).
"""

import random
from collections.abc import Callable, Sequence
from hashlib import blake2b
from itertools import count
from typing import Final, Protocol, TypeVar, assert_never

from common.messages import WorkerKind
from common.protocol.generate import Sample
from router.config import RouterOptions
from router.prefixes import Prefixes, prefixes_of

_MAX_PREFIXES: Final = 2**17
"""How many prefixes a cache-aware policy remembers."""


class Loaded(Protocol):
    """What has legs."""

    @property
    def outstanding(self) -> int:
        """How many legs it has at the moment."""


class Place(Loaded, Protocol):
    """What a policy may look at of a worker."""

    @property
    def url(self) -> str:
        """Where it is, by which it is told from the others."""

    @property
    def outstanding_tokens(self) -> int:
        """How many tokens its legs are estimated to compute."""


AnyLoaded = TypeVar("AnyLoaded", bound=Loaded)
Candidate = TypeVar("Candidate", bound=Place)


class Policy(Protocol):
    """Picks one of the candidates, of which there is at least one, for a prompt."""

    def __call__(self, candidates: Sequence[Candidate], sample: Sample, /) -> Candidate: ...


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self._turns = count()

    def __call__(self, candidates: Sequence[AnyLoaded], _: object = None, /) -> AnyLoaded:
        return candidates[next(self._turns) % len(candidates)]


class LeastLoaded:
    """The one with the fewest legs; equals take turns, or the first would get every short request."""

    def __init__(self) -> None:
        self._take_turns = RoundRobin()

    def __call__(self, candidates: Sequence[AnyLoaded], _: object = None, /) -> AnyLoaded:
        fewest = min(candidate.outstanding for candidate in candidates)
        return self._take_turns([candidate for candidate in candidates if candidate.outstanding == fewest])


class Random:
    """Any, with equal chance."""

    def __init__(self, choice: Callable[[int], int] = random.randrange) -> None:
        self._choice = choice

    def __call__(self, candidates: Sequence[AnyLoaded], _: object = None, /) -> AnyLoaded:
        return candidates[self._choice(len(candidates))]


class PowerOfTwo:
    """Of two drawn at random the one with fewer tokens to compute: near the best, and two routers do not run in step."""

    def __init__(self, draw: Callable[[int], Sequence[int]] = lambda among: random.sample(range(among), 2)) -> None:
        self._draw = draw

    def __call__(self, candidates: Sequence[Candidate], _: object = None, /) -> Candidate:
        if len(candidates) == 1:
            return candidates[0]
        drawn = [candidates[index] for index in self._draw(len(candidates))]
        return min(drawn, key=lambda candidate: candidate.outstanding_tokens)


class CacheAware:
    """The one that last got the longest prefix of the prompt, unless it has many more legs than the least loaded one.

    Many more are more than `abs_threshold` legs and than `rel_threshold` times as many; both must hold.
    """

    def __init__(self, *, abs_threshold: int, rel_threshold: float, max_prefixes: int = _MAX_PREFIXES) -> None:
        self._abs_threshold = abs_threshold
        self._rel_threshold = rel_threshold
        self._prefixes = Prefixes(max_prefixes)
        self._pick_least_loaded = LeastLoaded()

    def __call__(self, candidates: Sequence[Candidate], sample: Sample, /) -> Candidate:
        prefixes = prefixes_of(sample)
        by_url = {candidate.url: candidate for candidate in candidates}
        url = self._prefixes.find(prefixes, by_url.keys())
        if url is not None and not self._is_overloaded(by_url[url], candidates):
            picked = by_url[url]
        else:
            picked = self._pick_least_loaded(candidates)
        self._prefixes.note(prefixes, picked.url)
        return picked

    def _is_overloaded(self, candidate: Candidate, candidates: Sequence[Candidate]) -> bool:
        legs, fewest = candidate.outstanding, min(other.outstanding for other in candidates)
        return legs - fewest > self._abs_threshold and legs > fewest * self._rel_threshold


class ByKey:
    """For a prompt with a routing key always the same one, by rendezvous hashing; for the others what another policy picks.

    Each candidate's rank for a key follows from its URL alone: when one goes only its keys move, and only what one that
    comes is to have moves to it. All routers agree.
    """

    def __init__(self, otherwise: Policy) -> None:
        self._otherwise = otherwise

    def __call__(self, candidates: Sequence[Candidate], sample: Sample, /) -> Candidate:
        if sample.routing_key is None:
            return self._otherwise(candidates, sample)
        # Of a fixed length, so that no key and URL together read like others.
        key = blake2b(sample.routing_key.encode(errors="surrogateescape"), digest_size=16).digest()
        return max(candidates, key=lambda candidate: blake2b(key + candidate.url.encode(), digest_size=16).digest())


def make_policy(options: RouterOptions, role: WorkerKind) -> Policy:
    """Make a fresh policy for workers of this role; with any, a prompt's routing key comes first."""
    return ByKey(_by_name(options, role))


def _by_name(options: RouterOptions, role: WorkerKind) -> Policy:
    match options.policy:
        case "random":
            return Random()
        case "round_robin":
            return RoundRobin()
        case "power_of_two":
            return PowerOfTwo()
        case "cache_aware" if role != "decode":
            return CacheAware(abs_threshold=options.balance_abs_threshold, rel_threshold=options.balance_rel_threshold)
        # A decode worker has no cache to be aware of.
        case "least_loaded" | "consistent_hashing" | "cache_aware":
            return LeastLoaded()
        case _:
            assert_never(options.policy)
