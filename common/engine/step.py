"""Settle is the only door (R1): a launched step shows nothing of its results until `settle` has committed all of them.

`Launched` and `StepResult` are different types on purpose: whoever handles results takes a `StepResult`, and a type checker
refuses a `Launched` in its place.
"""

from dataclasses import dataclass

import numpy as np

from common.engine.device import HostCopies
from common.routed_experts.host_cache import HostCache, WriteTicket
from common.scheduling.step_plan import StepPlan


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one entry of a plan came to: its sampled token with its logprob, or None for a chunk that sampled nothing."""

    token_id: int | None = None
    logprob: float = 0.0


@dataclass(frozen=True, slots=True)
class StepResult:
    """A settled step: its rows are in the host cache, its KV is complete, and `outcomes` stand in the order of the entries."""

    plan: StepPlan
    outcomes: tuple[Outcome, ...]


class Launched:
    """A step whose work is queued. It owns copies of all that the next launch may overwrite."""

    def __init__(self, plan: StepPlan, copies: HostCopies, ticket: WriteTicket, host_cache: HostCache) -> None:
        self._plan = plan
        self._copies = copies
        self._ticket = ticket
        self._host_cache = host_cache

    def settle(self) -> StepResult:
        """Wait for the step, commit its routed-expert rows and return its tokens. Call it once."""
        rows, *sampled = self._copies.wait()
        self._host_cache.commit(self._ticket, rows)
        tokens, logprobs = sampled if sampled else (np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32))
        drawn = iter(zip(tokens.tolist(), logprobs.tolist(), strict=True))
        outcomes = tuple(Outcome(*next(drawn)) if entry.samples else Outcome() for entry in self._plan.entries)
        assert next(drawn, None) is None, "more tokens were drawn than entries sample"
        return StepResult(self._plan, outcomes)
