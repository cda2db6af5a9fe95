"""One room on the prefill side: what both sides have told of it, and how far the writing of its pages is.

    ready pages, as the engine reports them   0 ........ posted ........ ready ........ all of the prompt
    pages of the peer                             first ........................................ all

Pages before the peer's `first_page` it has already. Several writes may be in progress, and are looked at, not waited for.
Neighbours: `transfer.sender` (what opens and ends a room), `transfer.agent` (a write).
"""

import math
from dataclasses import dataclass, field

from common.messages import Leg
from transfer.agent import TransferAgent, Write, WriteState
from transfer.commands import FinishRoom, OpenRoom
from transfer.messages import KvDone, KvRequest
from transfer.plan import WriteTag
from transfer.state import SenderState


@dataclass(slots=True)
class OutgoingRoom:
    """A room. `deadline` is in the time of the sender's turns, all else in its clock."""

    number: int
    state: SenderState
    deadline: float = math.inf
    # What the own engine has told.
    opened: OpenRoom | None = None
    ready_pages: list[int] = field(default_factory=list)
    finished: FinishRoom | None = None
    # What the peer has told.
    peer: str | None = None
    """Who has asked for the KV, or has shown that it will."""
    request: KvRequest | None = None
    asked_at: float = 0.0
    # How far it is.
    num_posted_pages: int = 0
    num_writes: int = 0
    in_progress: list[Write] = field(default_factory=list)
    writing_since: float = 0.0
    """When the first of the writes in progress was posted to a room that had none."""
    write_seconds: float = 0.0
    """How long at least one write was in progress, up to when there last was none."""
    # Why it drains, and on whose side the reason lies.
    error: str | None = None
    code: str = "leg_failed"
    leg: Leg = "decode"

    @property
    def generation(self) -> int | None:
        """The generation that the peer has asked with."""
        return None if self.request is None else self.request.generation

    @property
    def mismatch(self) -> str | None:
        """Why the two sides do not mean the same prompt; both have told theirs."""
        assert self.opened is not None
        assert self.request is not None
        offered = (self.opened.prompt_tokens, self.opened.prompt_digest)
        asked = (self.request.prompt_tokens, self.request.prompt_digest)
        if offered == asked:
            return None
        return f"the workers tokenised the prompt differently: {offered[0]} tokens on prefill, {asked[0]} on decode"

    def post(self, agent: TransferAgent, now: float) -> Write | None:
        """Begin to write the pages that have become ready; None if there are none. Raises TransferError."""
        assert self.request is not None
        assert self.peer is not None
        first = self.request.first_page
        begin, end = max(first, self.num_posted_pages), len(self.ready_pages)
        if begin >= end:
            return None
        tag = WriteTag(self.number, self.request.generation, self.num_writes).encode()
        targets = self.request.pages[begin - first : end - first]
        write = agent.write(self.peer, self.ready_pages[begin:end], targets, tag)
        self.num_posted_pages = end
        self.num_writes += 1
        if not self.in_progress:
            self.writing_since = now
        self.in_progress.append(write)
        return write

    def look(self, agent: TransferAgent, now: float) -> bool:
        """Look once at each write in progress; whether one has failed."""
        if not self.in_progress:
            return False
        states = [(write, agent.poll(write)) for write in self.in_progress]
        self.in_progress = [write for write, state in states if state is WriteState.IN_PROGRESS]
        if not self.in_progress:
            self.write_seconds += now - self.writing_since
        return any(state is WriteState.FAILED for _, state in states)

    def done(self, now: float) -> KvDone:
        """What the peer is told when all is written."""
        assert self.request is not None
        assert self.finished is not None
        total = self.request.first_page + len(self.request.pages)
        assert max(self.num_posted_pages, self.request.first_page) == total, "a page was not reported"
        return KvDone(
            room=self.number,
            generation=self.request.generation,
            num_writes=self.num_writes,
            write_seconds=self.write_seconds,
            exposed_seconds=now - max(self.finished.computed_at, self.asked_at),
            first_token=self.finished.first_token,
            prompt_versions=self.finished.prompt_versions,
        )
