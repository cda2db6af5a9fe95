"""What a follower does of its group's transfers: its leader says which pages, it writes its own heads of them.

    leader -> hand   Connect, Forget, WritePages, KeepLooking
    hand -> leader   HandReady once, then WriteEnded for every WritePages

A hand knows no room and decides nothing. It runs on the transfer's thread of a follower's process, as senders and receivers do
in a leader's, and is opened and closed with them. Neighbour: `transfer.group`, the other end.
"""

import logging
from typing import Protocol, TypeVar, assert_never

from msgspec import Struct

from common.errors import TransferError
from common.memory.layout import PoolMemory
from common.ranks import Rank
from common.wire import RankLink
from transfer.agent import NixlAgent, RankAgent, Write, WriteState
from transfer.endpoint import IDLE_WAIT_S, LANDING_WAIT_S, NAP_S
from transfer.messages import PoolInfo, PoolPart

log = logging.getLogger(__name__)

LINK_NAME = "pages"

Inbound = TypeVar("Inbound")
Outbound = TypeVar("Outbound", contravariant=True)


class GroupLink(Protocol[Inbound, Outbound]):
    """A talk among the ranks of a group; `common.wire.RankLink` is the real one."""

    def send(self, rank: int, message: Outbound) -> None:
        """Queue a message to another rank."""

    def receive(self) -> list[Inbound]:
        """All messages that are here, in order."""

    def wait(self, timeout_s: float) -> None:
        """Sleep until a message is here or the time is up."""

    def close(self) -> None:
        """Close the sockets."""


# ------------------------------------------------------------------------------------------------ leader -> hand


class Connect(Struct, frozen=True, tag=True):
    """Get ready to write to a peer. If that fails, so will the writes."""

    peer: str
    pool: PoolInfo


class Forget(Struct, frozen=True, tag=True):
    """No more will be written to this peer."""

    peer: str


class WritePages(Struct, frozen=True, tag=True):
    """Write own heads of these pages; answered by `WriteEnded` with the same serial."""

    serial: int
    peer: str
    local_pages: list[int]
    remote_pages: list[int]


class KeepLooking(Struct, frozen=True, tag=True):
    """For so long somebody may be writing here: NIXL may need a look now and then to let it in."""

    seconds: float


LeaderToHand = Connect | Forget | WritePages | KeepLooking

# ------------------------------------------------------------------------------------------------ hand -> leader


class HandReady(Struct, frozen=True, tag=True):
    """The rank at `place` has its memory, and this is its part."""

    place: int
    num_pages: int
    part: PoolPart


class WriteEnded(Struct, frozen=True, tag=True):
    """Nothing of this rank's share of a write is in progress, nor will be."""

    rank: int
    serial: int
    has_failed: bool


HandToLeader = HandReady | WriteEnded


class Hand:
    """A follower's end. Call it from one thread."""

    def __init__(self, agent: RankAgent, link: GroupLink[LeaderToHand, HandToLeader], rank: Rank) -> None:
        self._agent = agent
        self._link = link
        self._rank = rank.index
        self._leader = rank.of.leader_of(rank.group)
        self._writes: dict[int, Write] = {}
        """Those in progress, by their serials."""
        self._now = 0.0
        self._looks_until = 0.0
        link.send(self._leader, HandReady(rank.place, agent.pool().num_pages, agent.part))

    def turn(self, now: float) -> None:
        """Do what the leader says, and look at what is in progress."""
        self._now = now
        for message in self._link.receive():
            match message:
                case Connect():
                    self._connect(message)
                case Forget():
                    self._agent.forget(message.peer)
                case WritePages():
                    self._write(message)
                case KeepLooking():
                    self._looks_until = now + message.seconds
                case _:
                    assert_never(message)
        for serial, write in list(self._writes.items()):
            state = self._agent.poll(write)
            if state is not WriteState.IN_PROGRESS:
                del self._writes[serial]
                self._say_ended(serial, has_failed=state is WriteState.FAILED)
        if now < self._looks_until:
            self._agent.arrivals()  # what counts is the look; only leaders are notified

    def wait(self) -> None:
        """Sleep until there may be something to do."""
        if self._writes:
            self._link.wait(NAP_S)
        else:
            self._link.wait(LANDING_WAIT_S if self._now < self._looks_until else IDLE_WAIT_S)

    def close(self) -> bool:
        """Close agent and link; what is in progress ends with the process."""
        if self._writes:
            return False
        self._agent.close()
        self._link.close()
        return True

    def _connect(self, message: Connect) -> None:
        try:
            self._agent.connect(message.peer, message.pool)
        except TransferError as error:
            log.error("peer %s: %s", message.peer, error)

    def _write(self, message: WritePages) -> None:
        try:
            write = self._agent.write(message.peer, message.local_pages, message.remote_pages, b"")
        except TransferError as error:
            log.error("%s", error)
            self._say_ended(message.serial, has_failed=True)
        else:
            self._writes[message.serial] = write

    def _say_ended(self, serial: int, *, has_failed: bool) -> None:
        self._link.send(self._leader, WriteEnded(self._rank, serial, has_failed))


def open_hand(name: str, memory: PoolMemory, rank: Rank, folder: str) -> Hand:
    """Make a follower's hand; `name` is this rank's alone. The leader of its group waits for it in `open_agent`."""
    link: RankLink[LeaderToHand, HandToLeader] = RankLink(folder, LINK_NAME, rank.index, LeaderToHand)
    return Hand(NixlAgent(name, memory, place=rank.place, group_size=rank.of.group_size), link, rank)
