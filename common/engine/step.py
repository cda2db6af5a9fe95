"""Settle is the only door (R1): a launched step shows nothing of its results until `settle` has committed all of them.

`Launched` and `StepResult` are different types on purpose: whoever handles results takes a `StepResult`, and a type checker
refuses a `Launched` in its place.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, repeat
from typing import NamedTuple

from common.engine.device import Array, HostCopies
from common.messages import TopLogprobs
from common.routed_experts.host_cache import HostCache, WriteTicket
from common.scheduling.step_plan import StepPlan


class Sampled(NamedTuple):
    """A drawn token, its logprob, and the likeliest tokens beside it if they were asked for."""

    token_id: int
    logprob: float
    top_logprobs: TopLogprobs


class Scored(NamedTuple):
    """Logprobs of prompt tokens, and the likeliest tokens in their places if they were asked for."""

    logprobs: list[float]
    top_logprobs: list[TopLogprobs]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one entry of a plan came to: its drawn tokens, one a sample, and the prompt tokens that it scored."""

    sampled: tuple[Sampled, ...]
    scored: Scored


@dataclass(frozen=True, slots=True)
class StepResult:
    """A settled step: its rows are in the host cache, its KV is complete, and `outcomes` stand in the order of the entries."""

    plan: StepPlan
    outcomes: tuple[Outcome, ...]


class Launched:
    """A step whose work is queued. It owns copies of all that the next launch may overwrite."""

    def __init__(
        self,
        plan: StepPlan,
        copies: HostCopies,
        num_scored: tuple[int, ...],
        ticket: WriteTicket,
        host_cache: HostCache,
    ) -> None:
        self._plan = plan
        self._copies = copies
        self._num_scored = num_scored
        self._ticket = ticket
        self._host_cache = host_cache

    def settle(self) -> StepResult:
        """Wait for the step, commit its routed-expert rows and return its tokens. Call it once."""
        landed = self._copies.wait()
        self._host_cache.commit(self._ticket, landed["rows"])
        drawn = _positions(landed, "logprobs", "top_logprobs", "top_ids")
        tokens = iter(landed["tokens"].tolist() if "tokens" in landed else ())
        scored = _positions(landed, "prompt_logprobs", "prompt_top_logprobs", "prompt_top_ids")
        outcomes: list[Outcome] = []
        for entry, num_scored in zip(self._plan.entries, self._num_scored, strict=True):
            top_count = entry.request.message.options.top_logprobs_num
            samples = list(zip(islice(tokens, entry.samples), islice(drawn, entry.samples), strict=True))
            scores = list(islice(scored, num_scored))
            assert len(samples) == entry.samples, "fewer tokens were drawn than entries sample"
            assert len(scores) == num_scored, "fewer tokens were scored than entries ask for"
            outcomes.append(
                Outcome(
                    tuple(Sampled(token, logprob, top[:top_count]) for token, (logprob, top) in samples),
                    Scored([logprob for logprob, _ in scores], [top[:top_count] for _, top in scores]),
                )
            )
        assert next(tokens, None) is None, "more tokens were drawn than entries sample"
        assert next(drawn, None) is None, "more logprobs have landed than tokens were drawn"
        assert next(scored, None) is None, "more tokens were scored than entries ask for"
        return StepResult(self._plan, tuple(outcomes))


def _positions(
    landed: dict[str, Array], logprobs: str, top_logprobs: str, top_ids: str
) -> Iterator[tuple[float, TopLogprobs]]:
    """Walk through landed logprobs position by position, each with its likeliest tokens; empty if none have landed."""
    if logprobs not in landed:
        return iter(())
    tops: Iterable[TopLogprobs] = repeat([], len(landed[logprobs]))
    if top_ids in landed:
        pairs = zip(landed[top_logprobs].tolist(), landed[top_ids].tolist(), strict=True)
        tops = (list(zip(values, ids, strict=True)) for values, ids in pairs)
    return zip(landed[logprobs].tolist(), tops, strict=True)
