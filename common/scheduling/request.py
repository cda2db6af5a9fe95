"""One request inside an engine: its tokens, what it holds, and the table of states it may move through.

    prefill   QUEUED -> RUNNING -> (COLLECTING, SURPLUS) -> LEASED -> ENDED       pages wait for their transfer
    decode    QUEUED -> RECEIVING -> RUNNING -> (COLLECTING, SURPLUS) -> ENDED    pages wait for the KV, then grow
                            |        ^   |
                            |        |   v
                            |       SWAPPED -> ENDED                   pages given up for older requests
                            └-> QUARANTINED -> ENDED                   a peer may still write into the pages
    both      QUEUED -> RECEIVING -> RUNNING -> ... (COLLECTING, SURPLUS) -> ENDED    pages wait for the prompt's own steps

The module knows no scheduler, no engine and no transfer. A request is touched by the engine's thread alone.
"""

import time
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np
import numpy.typing as npt

from common.messages import Generate, PromptLogprobs, TopLogprobs
from common.versions import Spans, cut, spans_from


class RequestState(Enum):
    """Where a request is in its life."""

    QUEUED = auto()
    """Holds nothing yet."""
    RECEIVING = auto()
    """Holds pages that its prompt's KV is still to come into, from the prefill worker or from this engine's own steps."""
    RUNNING = auto()
    """Takes part in steps."""
    SWAPPED = auto()
    """Holds no pages: its KV and rows wait in host memory until there is room again."""
    COLLECTING = auto()
    """Has computed all it will; its rows are being gathered from its slots."""
    SURPLUS = auto()
    """Has ended while a step with it is still in flight: that step's token, row and slot are discarded."""
    LEASED = auto()
    """Prefill has ended; the pages stay until their transfer has, or the lease runs out."""
    QUARANTINED = auto()
    """Has ended, but its peer has not yet said that it will write no more."""
    ENDED = auto()
    """Holds nothing any more. Terminal."""


_LEGAL: dict[RequestState, frozenset[RequestState]] = {
    RequestState.QUEUED: frozenset({RequestState.RECEIVING, RequestState.RUNNING, RequestState.ENDED}),
    RequestState.RECEIVING: frozenset(
        {
            RequestState.RUNNING,
            RequestState.COLLECTING,
            RequestState.SURPLUS,
            RequestState.QUARANTINED,
            RequestState.ENDED,
        }
    ),
    RequestState.RUNNING: frozenset(
        {
            RequestState.SWAPPED,
            RequestState.COLLECTING,
            RequestState.SURPLUS,
            RequestState.LEASED,
            RequestState.ENDED,
        }
    ),
    RequestState.COLLECTING: frozenset({RequestState.SURPLUS, RequestState.LEASED, RequestState.ENDED}),
    RequestState.SWAPPED: frozenset({RequestState.RUNNING, RequestState.ENDED}),
    RequestState.SURPLUS: frozenset({RequestState.LEASED, RequestState.ENDED}),
    RequestState.LEASED: frozenset({RequestState.ENDED}),
    RequestState.QUARANTINED: frozenset({RequestState.ENDED}),
    RequestState.ENDED: frozenset(),
}


@dataclass(slots=True, eq=False)
class Request:
    """A sample on its way through one engine. Compared by identity."""

    message: Generate
    prompt: npt.NDArray[np.int32]
    """`[P]`."""
    index: int = 0
    """Which of the message's n samples this is; a prefill engine runs one request for all of them."""
    state: RequestState = RequestState.QUEUED
    row: int = -1
    """Row in the request table while RUNNING."""
    pages: list[int] = field(default_factory=list)
    """The pages of positions `[0, len(pages) * page_size)`, in order; shared prefix pages first."""
    cached_tokens: int = 0
    """Prompt tokens whose KV and rows came with shared pages."""
    planned_tokens: int = 0
    """Positions `[0, planned_tokens)` are computed, or will be by a step in flight."""
    computed_tokens: int = 0
    """Positions `[0, computed_tokens)` are computed and settled."""
    version_changes: list[tuple[int, str]] = field(default_factory=list)
    """From which positions on other weights than before have computed, and their version."""
    prompt_versions: tuple[str, ...] = ()
    """The weights that have computed the prompt in another engine."""
    steps_in_flight: int = 0
    started_at: float = 0.0
    """`time.perf_counter()` when it was first planned."""
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    prompt_scores: list[float] = field(default_factory=list)
    """Logprobs of the prompt's own tokens, from position max(1, logprob_start_len) on, as far as they have settled."""
    prompt_tops: list[TopLogprobs] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    num_prompt_tokens: int = field(init=False)
    """P."""
    max_total_tokens: int = field(init=False)
    """P plus the largest G."""

    def __post_init__(self) -> None:
        # Every step asks for these of every request, so they are no properties.
        self.num_prompt_tokens = len(self.prompt)
        self.max_total_tokens = self.num_prompt_tokens + self.message.options.sampling.max_new_tokens

    @classmethod
    def of(cls, message: Generate, index: int = 0) -> "Request":
        """Make a queued request from the frontend's message."""
        return cls(message=message, prompt=np.asarray(message.input_ids, dtype=np.int32), index=index)

    @property
    def rid(self) -> str:
        """The id that the frontend knows it by."""
        return self.message.rid

    @property
    def rooms(self) -> tuple[int, ...]:
        """The rooms of all n samples; empty if nothing is transferred."""
        return () if self.message.bootstrap is None else self.message.bootstrap.rooms

    @property
    def seed(self) -> int:
        """The seed of sample `index`."""
        return (self.message.options.sampling.seed + self.index) % 2**63

    @property
    def num_known_tokens(self) -> int:
        """Tokens that the host knows: the prompt and the settled output."""
        return self.num_prompt_tokens + len(self.output_ids)

    def begin(self, *, num_cached_tokens: int) -> None:
        """The prompt has been seated, and its first tokens have come from the cache: it is computed from there on."""
        self.cached_tokens = self.planned_tokens = self.computed_tokens = num_cached_tokens
        self.started_at = time.perf_counter()

    def settle(self, start: int, stop: int, weight_version: str) -> None:
        """A step under these weights has computed `[start, stop)`; a cached prefix before it is theirs too."""
        self.computed_tokens = stop
        if not self.version_changes or self.version_changes[-1][1] != weight_version:
            is_first = not self.version_changes and start == self.cached_tokens
            self.version_changes.append((0 if is_first else start, weight_version))

    def versions_of(self, start: int, stop: int) -> Spans:
        """Which weights have computed `[start, stop)`, as far as this engine has."""
        return cut(spans_from(self.version_changes, self.computed_tokens), start, stop)

    @property
    def versions(self) -> tuple[str, ...]:
        """The weights that have computed what there is of it here, in order."""
        return (*self.prompt_versions, *(version for _, version in self.version_changes))

    def is_all_of(self, weight_version: str) -> bool:
        """Whether no other weights have computed anything of it."""
        return all(version == weight_version for version in self.versions)

    @property
    def is_resumed(self) -> bool:
        """Whether its prompt ends with output of earlier legs."""
        return self.message.options.resumed_tokens > 0

    def may_go_on_under(self, weight_version: str) -> bool:
        """Whether these weights may compute the rest of it, of which earlier legs may have computed a part elsewhere."""
        options = self.message.options
        is_theirs = all(version == weight_version for version in options.resumed_versions)
        return options.allow_mixed_versions or (is_theirs and self.is_all_of(weight_version))

    @property
    def num_cacheable_tokens(self) -> int:
        """How much of the prompt may come from a cache: a token's logprob comes from the step that computes the one before it."""
        options = self.message.options
        if options.return_logprob and options.logprob_start_len >= 0:
            return min(self.num_prompt_tokens, max(1, options.logprob_start_len))
        return self.num_prompt_tokens

    def prompt_logprobs(self) -> PromptLogprobs | None:
        """Gather the logprobs of the prompt's own tokens; None if none were asked for, or not all of them are computed."""
        options = self.message.options
        start = options.logprob_start_len
        if not options.return_logprob or start < 0 or self.computed_tokens < self.num_prompt_tokens:
            return None
        nothing = start == 0  # nothing predicts the token at position 0
        return PromptLogprobs(
            logprobs=[None, *self.prompt_scores] if nothing else list(self.prompt_scores),
            token_ids=self.prompt[start:].tolist(),
            top_logprobs=[] if options.top_logprobs_num == 0 else ([None] if nothing else []) + list(self.prompt_tops),
        )

    def advance(self, state: RequestState) -> None:
        """Move to `state`; a move that is not in the table is a defect."""
        assert state in _LEGAL[self.state], f"{self.rid}: {self.state.name} -> {state.name} is not a legal move"
        self.state = state

    def token_at(self, position: int) -> int:
        """The token at a known position."""
        return (
            int(self.prompt[position]) if position < len(self.prompt) else self.output_ids[position - len(self.prompt)]
        )
