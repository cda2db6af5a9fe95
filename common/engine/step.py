"""Settle is the only door (R1): a launched step shows nothing of its results until `settle` has committed all of them.

`Launched` and `StepResult` are different types on purpose: whoever handles results takes a `StepResult`, and a type checker
refuses a `Launched` in its place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, starmap
from typing import Any, NamedTuple, TypeVar

from msgspec import Struct

from common.engine.device import Array, HostCopies
from common.messages import TopLogprobs
from common.routed_experts.host_cache import HostCache, WriteTicket
from common.scheduling.step_plan import StepPlan

Items = TypeVar("Items", list[Any], tuple[Any, ...])


class Sampled(NamedTuple):
    """A drawn token, its logprob, and the likeliest tokens beside it if they were asked for."""

    token_id: int
    logprob: float
    top_logprobs: TopLogprobs


class Scored(NamedTuple):
    """Logprobs of prompt tokens, and the likeliest tokens in their places if they were asked for."""

    logprobs: list[float]
    top_logprobs: list[TopLogprobs]


# `gc=False` as for `StepEntry`, of which each answers one.
class Outcome(Struct, frozen=True, gc=False):
    """What one entry of a plan came to: its drawn tokens, one a sample, and the prompt tokens that it scored."""

    sampled: tuple[Sampled, ...]
    scored: Scored = Scored([], [])
    """To be read alone: all that scored nothing have the same one."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """A settled step: its rows are in the host cache, its KV is complete, and `outcomes` stand in the order of the entries."""

    plan: StepPlan
    outcomes: tuple[Outcome, ...]
    weight_version: str
    """The weights that have computed it."""


class Launched:
    """A step whose work is queued. It owns copies of all that the next launch may overwrite."""

    def __init__(
        self,
        plan: StepPlan,
        copies: HostCopies,
        num_scored: tuple[int, ...],
        ticket: WriteTicket,
        host_cache: HostCache,
        weight_version: str,
    ) -> None:
        self._plan = plan
        self._copies = copies
        self._num_scored = num_scored
        self._ticket = ticket
        self._host_cache = host_cache
        self._weight_version = weight_version

    def settle(self) -> StepResult:
        """Wait for the step, commit its routed-expert rows and return its tokens. Call it once.

        The landed arrays are good until the next launch alone: all that is kept of them is copied here.
        """
        landed = self._copies.wait()
        outcomes = self._outcomes(landed)
        # Last: a step whose results cannot be read has no rows either.
        self._host_cache.commit(self._ticket, landed["rows"])
        return StepResult(self._plan, outcomes, self._weight_version)

    def _outcomes(self, landed: dict[str, Array]) -> tuple[Outcome, ...]:
        """Read the tokens and the scores of each entry."""
        num_samples = [entry.samples for entry in self._plan.entries]
        num_draws, num_scores = sum(num_samples), sum(self._num_scored)
        drawn = zip(
            _values(landed, "tokens", num_draws),
            _values(landed, "logprobs", num_draws),
            self._likeliest(landed, "top_logprobs", "top_ids", num_samples),
            strict=True,
        )
        sampled = _deal(tuple(starmap(Sampled, drawn)), num_samples)
        if num_scores == 0:  # in decode, always
            return tuple(map(Outcome, sampled))
        scored = zip(
            _deal(_values(landed, "prompt_logprobs", num_scores), self._num_scored),
            _deal(self._likeliest(landed, "prompt_top_logprobs", "prompt_top_ids", self._num_scored), self._num_scored),
            strict=True,
        )
        return tuple(starmap(Outcome, zip(sampled, starmap(Scored, scored), strict=True)))

    def _likeliest(
        self, landed: dict[str, Array], logprobs: str, ids: str, num_positions: Sequence[int]
    ) -> list[TopLogprobs]:
        """The likeliest tokens of each position, as many as its entry asks for; `num_positions` is how many each entry has."""
        if ids not in landed:
            return [[]] * sum(num_positions)  # the same one, which nobody writes into
        top_counts = [
            entry.request.message.options.top_logprobs_num
            for entry, num in zip(self._plan.entries, num_positions, strict=True)
            for _ in range(num)
        ]
        rows = zip(landed[logprobs].tolist(), landed[ids].tolist(), top_counts, strict=True)
        return [list(zip(values[:count], tokens[:count], strict=True)) for values, tokens, count in rows]


def _values(landed: dict[str, Array], name: str, count: int) -> list[Any]:
    """Copy landed numbers, of which there must be so many; none need have landed if that is 0."""
    values: list[Any] = landed[name].tolist() if name in landed else []
    assert len(values) == count, f"{name}: {len(values)} have landed, {count} were to come"
    return values


def _deal(items: Items, counts: Sequence[int]) -> list[Items]:
    """Cut `items` into runs of `counts` items."""
    return [items[start:stop] for start, stop in pairwise(accumulate(counts, initial=0))]
