"""One agent for a group of ranks: the leader's own, and the hands of its followers.

A write is one of each rank's that has heads which the peer wants, and is over when all of them are: only then may its pages have
another owner (R11), and only then the leader tells the peer's leader. Neighbours: `transfer.sender` and `transfer.receiver`,
which take it for any other agent, and `transfer.hand`, the followers' end.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from common.errors import TransferError
from common.memory.layout import PoolMemory
from common.ranks import Rank
from common.wire import RankLink
from transfer.agent import NixlAgent, RankAgent, TransferAgent, Write, WriteState, describe
from transfer.endpoint import IDLE_WAIT_S
from transfer.hand import (
    LINK_NAME,
    Connect,
    Forget,
    GroupLink,
    HandReady,
    HandToLeader,
    KeepLooking,
    LeaderToHand,
    WriteEnded,
    WritePages,
)
from transfer.heads import pieces_of
from transfer.messages import PoolInfo, PoolPart

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""For how long followers look for what lands in them after their leader has; they are told again in half of that time."""
_HANDS_DEADLINE_S = 300.0
"""Longest wait for the followers, which load the model as their leader does."""


@dataclass(slots=True)
class _GroupWrite:
    peer: str
    tag: bytes
    num_bytes: int
    own: Write | None
    """The leader's share, while it is in progress."""
    waits_for: set[int]
    """Followers whose share is in progress, by their ranks."""
    has_failed: bool = False
    state: WriteState = WriteState.IN_PROGRESS


@dataclass(slots=True, frozen=True)
class _Peer:
    pool: PoolInfo
    writers: list[int]
    """Followers that write to it, by their ranks; the leader always does."""


class GroupAgent:
    """A `TransferAgent` of several ranks, in the leader's process."""

    def __init__(
        self,
        own: RankAgent,
        link: GroupLink[HandToLeader, LeaderToHand],
        rank: Rank,
        pool: PoolInfo,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert len(pool.parts) == rank.of.group_size
        self._own = own
        self._link = link
        self._rank = rank
        self._pool = pool
        self._clock = clock
        self._peers: dict[str, _Peer] = {}
        self._writes: dict[int, _GroupWrite] = {}
        """Those that hands have a share in and have not all ended, by serial."""
        self._serial = 0
        self._next_word = 0.0

    def pool(self) -> PoolInfo:
        """The parts of all ranks."""
        return self._pool

    def connect(self, peer: str, pool: PoolInfo) -> None:
        """Connect the leader, and have those followers connect that will write; they do so before they write."""
        self._own.connect(peer, pool)
        pieces = pieces_of(len(self._pool.parts), len(pool.parts), pool.num_kv_heads)
        places = {piece.sender for piece in pieces}
        writers = [rank for rank in self._rank.followers if rank - self._rank.index in places]
        for rank in writers:
            self._link.send(rank, Connect(peer, pool))
        self._peers[peer] = _Peer(pool, writers)

    def forget(self, peer: str) -> None:
        """Have all ranks forget it."""
        known = self._peers.pop(peer, None)
        if known is None:
            return
        self._own.forget(peer)
        for rank in known.writers:
            self._link.send(rank, Forget(peer))

    def write(self, peer: str, local_pages: list[int], remote_pages: list[int], tag: bytes) -> Write:
        """Have each rank write its heads of the pages; a leader that writes all of them has NIXL send the tag."""
        known = self._peers.get(peer)
        if known is None:
            raise TransferError(f"peer {peer} is not connected")
        is_alone = not known.writers
        num_bytes = len(local_pages) * known.pool.page_bytes
        write = _GroupWrite(peer, b"" if is_alone else tag, num_bytes, None, set(known.writers))
        if not is_alone:
            self._serial += 1
            self._writes[self._serial] = write
        for rank in known.writers:
            self._link.send(rank, WritePages(self._serial, peer, local_pages, remote_pages))
        try:
            write.own = self._own.write(peer, local_pages, remote_pages, tag if is_alone else b"")
        except TransferError as error:
            if is_alone:
                raise
            log.warning("the leader's share of a write has failed: %s", error)
            write.has_failed = True
        self._look_at_own(write)
        self._settle(write)
        return write

    def poll(self, write: Write) -> WriteState:
        """Hear from the hands, and look at the leader's share."""
        assert isinstance(write, _GroupWrite)
        for message in self._link.receive():
            if isinstance(message, WriteEnded):
                self._on_ended(message)
        self._look_at_own(write)
        self._settle(write)
        return write.state

    def arrivals(self) -> list[tuple[str, bytes]]:
        """What the leader has been notified of; meanwhile the followers look too."""
        now = self._clock()
        if now >= self._next_word:
            self._next_word = now + LOOK_S / 2
            for rank in self._rank.followers:
                self._link.send(rank, KeepLooking(LOOK_S))
        return self._own.arrivals()

    def close(self) -> None:
        """Close the leader's agent, and the talk with the hands, which close by themselves."""
        self._own.close()
        self._link.close()

    def _on_ended(self, message: WriteEnded) -> None:
        write = self._writes.get(message.serial)
        if write is None:
            return
        write.waits_for.discard(message.rank)
        write.has_failed |= message.has_failed
        if not write.waits_for:
            del self._writes[message.serial]

    def _look_at_own(self, write: _GroupWrite) -> None:
        if write.own is None:
            return
        state = self._own.poll(write.own)
        if state is not WriteState.IN_PROGRESS:
            write.own = None
            write.has_failed |= state is WriteState.FAILED

    def _settle(self, write: _GroupWrite) -> None:
        """End a write of which no rank has anything in progress any more."""
        if write.own is not None or write.waits_for or write.state is not WriteState.IN_PROGRESS:
            return
        if write.tag and not write.has_failed:
            try:
                self._own.notify(write.peer, write.tag)
            except TransferError as error:
                log.warning("a write has failed: %s", error)
                write.has_failed = True
        write.state = WriteState.FAILED if write.has_failed else WriteState.DONE


def open_agent(peer_id: str, memory: PoolMemory, rank: Rank, folder: str) -> TransferAgent:
    """Make the agent of the group that `rank` leads. Waits for the followers' hands, which are opened in the same folder.

    Raises TransferError if they do not come, or have pools of another size.
    """
    size = rank.of.group_size
    own = NixlAgent(peer_id, memory, place=rank.place, group_size=size)
    if size == 1:
        return own
    link: RankLink[HandToLeader, LeaderToHand] = RankLink(folder, LINK_NAME, rank.index, HandToLeader)
    return GroupAgent(own, link, rank, describe(memory, [own.part, *_hands_parts(link, size - 1, memory.num_pages)]))


def _hands_parts(link: GroupLink[HandToLeader, LeaderToHand], count: int, num_pages: int) -> list[PoolPart]:
    """What the followers have, by their places."""
    deadline = time.monotonic() + _HANDS_DEADLINE_S
    hands: dict[int, HandReady] = {}
    while len(hands) < count:
        if time.monotonic() >= deadline:
            raise TransferError(f"{len(hands)} of {count} followers are there after {_HANDS_DEADLINE_S:g} s")
        link.wait(IDLE_WAIT_S)
        hands |= {message.place: message for message in link.receive() if isinstance(message, HandReady)}
    for place, hand in hands.items():
        if hand.num_pages != num_pages:
            raise TransferError(f"{num_pages} pages in the leader, {hand.num_pages} in the follower at place {place}")
    return [hands[place].part for place in sorted(hands)]
