"""What a decode engine and a prefill engine say to each other, as frozen tagged structs: one union a direction.

    decode engine                                              prefill engine
    Hello       who I am, and where my pages are     -->  <--  HelloReply      who I am, or why we cannot be a pair
    Heartbeat   I am here, and want these rooms      -->  <--  HeartbeatReply  I am here, and whether I know you
    KvRequest   write this room's KV into my pages   -->  <==  the pages, by NIXL
                                                          <--  KvDone          all is written; the first token
    KvAbort     write no more for this room          -->  <--  KvClosed        no write is left, and why
    Goodbye     nobody is behind my id any more      -->

The decode engine dials, so it speaks first; the messages go over ZMQ. `KvClosed` also answers a `KvRequest` that came to
nothing. Receivers `match` on the struct and end in `assert_never`.

The module knows no socket and no state. Neighbours: `common.wire` (sends these), `receiver` and `sources` (the decode side),
`sender` and `peers` (the prefill side), `handshake` (judges a `Hello`).
"""

from typing import Literal

from msgspec import Struct

from common.messages import Leg, TopLogprobs
from common.process import ProcessMark

PROTOCOL = 5
"""Version of these messages; raised whenever one of them changes."""


# ------------------------------------------------------------------------------------------------ decode -> prefill


class PoolPart(Struct, frozen=True, kw_only=True):
    """What one rank holds of its group's KV pool: some heads of every page, page after page from `base_address` on."""

    agent: str
    """What the rank's agent is called; the leader's name is that of the peer."""
    agent_metadata: bytes
    process: ProcessMark
    base_address: int
    device_id: int
    first_head: int
    num_heads: int


class PoolInfo(Struct, frozen=True, kw_only=True):
    """The KV pool of one side's attention group as the other side must see it. A page is spread over the group's ranks."""

    num_pages: int
    page_size: int
    memory: Literal["DRAM", "VRAM"]
    layout: str
    """Says how a whole page is laid out, however many ranks share it."""
    num_kv_heads: int
    """Of the model."""
    head_bytes: int
    """One head's share of a page."""
    parts: tuple[PoolPart, ...]
    """By the ranks' places in the group."""

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all ranks together; a head that several of them hold counts as often."""
        return sum(part.num_heads for part in self.parts) * self.head_bytes


class Hello(Struct, frozen=True, tag=True, kw_only=True):
    """First message of a decode worker to a prefill worker: who it is, and where its pages are."""

    peer: str
    protocol: int
    pool: PoolInfo


class Heartbeat(Struct, frozen=True, tag=True):
    """The decode worker is alive, and still wants these rooms: it has asked for their KV, or will when there is a seat.

    Renews their leases; answered by `HeartbeatReply`.
    """

    rooms: list[int]


class KvRequest(Struct, frozen=True, tag=True, kw_only=True):
    """Write the prompt's KV of `room`, from its page number `first_page` on, into these pages, in order.

    Sent before or after the prefill leg itself arrives. The pages before `first_page` come with another sample's room.
    """

    to: str
    """The peer that may write: another one at its address, after a restart, does nothing."""
    room: int
    generation: int
    first_page: int = 0
    pages: list[int]
    prompt_tokens: int
    prompt_digest: bytes


RoomCode = Literal["leg_failed", "retracted"]
"""What the other leg's error is called if a leg's end has closed its room."""


class KvAbort(Struct, frozen=True, tag=True):
    """Stop writing for this room; answered by `KvClosed` once no posted write is left. Sent until it is.

    Generation 0 comes from a worker that never asked for the room: it wants no answer.
    """

    to: str
    """The peer that was asked: the word of another one at its address would prove nothing."""
    room: int
    generation: int
    code: RoomCode = "leg_failed"


class Goodbye(Struct, frozen=True, tag=True):
    """Nobody is behind this peer's id any more: its memory is given back, and it may be forgotten."""


DecodeToPrefill = Hello | Heartbeat | KvRequest | KvAbort | Goodbye


# ------------------------------------------------------------------------------------------------ prefill -> decode


class HelloReply(Struct, frozen=True, tag=True, kw_only=True):
    """The prefill worker's answer to `Hello`; `refusal` says why the two cannot be a pair."""

    peer: str
    processes: tuple[ProcessMark, ...]
    """Those of all ranks that may write: of the one that answers first."""
    dp: int = 1
    """Attention groups of the worker; each listens at a port of its own, one after the other."""
    refusal: str | None = None


class HeartbeatReply(Struct, frozen=True, tag=True):
    """The prefill worker is alive; also what it says to a message that was meant for somebody else."""

    peer: str
    is_paired: bool
    """Whether it has a handshake with the worker that it answers."""


class FirstToken(Struct, frozen=True, kw_only=True):
    """The hand-over: the token that the prefill sampled at position P, with what the decode side needs to go on."""

    token_id: int
    logprob: float
    top_logprobs: TopLogprobs = []


class KvDone(Struct, frozen=True, tag=True, kw_only=True):
    """All `num_writes` writes of the room have completed; the receiver counts their notifications too."""

    room: int
    generation: int
    num_writes: int
    write_seconds: float
    """How long at least one of the writes was in progress."""
    exposed_seconds: float
    """How long the request waited for its KV: since the prefill's end, or since the peer's asking if that came later."""
    first_token: FirstToken
    prompt_versions: tuple[str, ...]
    """Weights that have computed the prompt, in order; more than one if they were changed meanwhile."""


class KvClosed(Struct, frozen=True, tag=True, kw_only=True):
    """No write of this room is left or will come; the pages are the receiver's again.

    `error` says why the room was closed, and `leg` on whose side; None answers an abort of a room that was not open to this peer.
    """

    room: int
    generation: int
    error: str | None = None
    stage: str | None = None
    code: str = "leg_failed"
    leg: Leg = "prefill"


PrefillToDecode = HelloReply | HeartbeatReply | KvDone | KvClosed
