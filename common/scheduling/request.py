"""One request inside an engine: its tokens, what it holds, and the table of states it may move through.

    prefill   QUEUED -> RUNNING -> (SURPLUS) -> LEASED -> ENDED        pages wait for their transfer
    decode    QUEUED -> RECEIVING -> RUNNING -> (SURPLUS) -> ENDED     pages wait for the KV, then grow
                            └-> QUARANTINED -> ENDED                   a peer may still write into the pages

The module knows no scheduler, no engine and no transfer. A request is touched by the engine's thread alone.
"""

from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np
import numpy.typing as npt

from common.messages import Generate


class RequestState(Enum):
    """Where a request is in its life."""

    QUEUED = auto()
    """Holds nothing yet."""
    RECEIVING = auto()
    """Holds pages that the prefill worker writes into."""
    RUNNING = auto()
    """Takes part in steps."""
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
    RequestState.RECEIVING: frozenset({RequestState.RUNNING, RequestState.QUARANTINED, RequestState.ENDED}),
    RequestState.RUNNING: frozenset({RequestState.SURPLUS, RequestState.LEASED, RequestState.ENDED}),
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
    steps_in_flight: int = 0
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, message: Generate) -> "Request":
        """Make a queued request from the frontend's message."""
        return cls(message=message, prompt=np.asarray(message.input_ids, dtype=np.int32))

    @property
    def rid(self) -> str:
        """The id that the frontend knows it by."""
        return self.message.rid

    @property
    def num_prompt_tokens(self) -> int:
        """P."""
        return len(self.prompt)

    @property
    def num_known_tokens(self) -> int:
        """Tokens that the host knows: the prompt and the settled output."""
        return len(self.prompt) + len(self.output_ids)

    @property
    def max_total_tokens(self) -> int:
        """P plus the largest G."""
        return len(self.prompt) + self.message.options.sampling.max_new_tokens

    def advance(self, state: RequestState) -> None:
        """Move to `state`; a move that is not in the table is a defect."""
        assert state in _LEGAL[self.state], f"{self.rid}: {self.state.name} -> {state.name} is not a legal move"
        self.state = state

    def token_at(self, position: int) -> int:
        """The token at a known position."""
        return (
            int(self.prompt[position]) if position < len(self.prompt) else self.output_ids[position - len(self.prompt)]
        )
