"""The agent of several ranks, with agents that the test holds: a write is over when each rank's share of it is (R11)."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from common.errors import TransferError
from common.process import own_mark
from common.ranks import Ranks, kv_heads_at
from tests.support.transfer_bench import LAYOUT, MEMORY
from transfer.agent import Write, WriteState, describe
from transfer.endpoint import IDLE_WAIT_S, LANDING_WAIT_S, NAP_S
from transfer.group import LOOK_S, GroupAgent, _hands_parts
from transfer.hand import Hand, HandReady, WriteEnded
from transfer.messages import PoolInfo, PoolPart

NUM_HEADS = 2
PEER = "decode-0"
TAG = b"tag"


@dataclass(eq=False)
class FakeWrite:
    peer: str
    pages: list[tuple[int, int]]
    tag: bytes
    num_bytes: int = 0
    state: WriteState = WriteState.IN_PROGRESS


@dataclass
class FakeAgent:
    """One rank's agent; the test says when its writes end, and how."""

    part: PoolPart
    writes: list[FakeWrite] = field(default_factory=list)
    peers: list[str] = field(default_factory=list)
    notified: list[tuple[str, bytes]] = field(default_factory=list)
    looks: int = 0
    is_closed: bool = False
    refuses: set[str] = field(default_factory=set)
    """Names of methods that raise."""

    def _check(self, method: str) -> None:
        if method in self.refuses:
            raise TransferError(f"no {method}")

    def pool(self) -> PoolInfo:
        return describe(MEMORY, [self.part])

    def connect(self, peer: str, pool: PoolInfo) -> None:
        self._check("connect")
        self.peers.append(peer)

    def forget(self, peer: str) -> None:
        self.peers.remove(peer)

    def write(self, peer: str, local_pages: list[int], remote_pages: list[int], tag: bytes) -> Write:
        self._check("write")
        if peer not in self.peers:
            raise TransferError(f"peer {peer} is not connected")
        write = FakeWrite(peer, list(zip(local_pages, remote_pages, strict=True)), tag)
        self.writes.append(write)
        return write

    def poll(self, write: Write) -> WriteState:
        assert isinstance(write, FakeWrite)
        return write.state

    def notify(self, peer: str, tag: bytes) -> None:
        self._check("notify")
        self.notified.append((peer, tag))

    def arrivals(self) -> list[tuple[str, bytes]]:
        self.looks += 1
        return []

    def close(self) -> None:
        self.is_closed = True


class FakeLink:
    """A rank's end; what is sent stays under way until the test, or the crew, lets it arrive."""

    def __init__(self, rank: int, links: dict[int, "FakeLink"]) -> None:
        self.inbox: deque[Any] = deque()
        self.waited = 0.0
        self.is_closed = False
        self._links = links
        links[rank] = self

    def send(self, rank: int, message: Any) -> None:
        self._links[rank].inbox.append(message)

    def receive(self) -> list[Any]:
        received = list(self.inbox)
        self.inbox.clear()
        return received

    def wait(self, timeout_s: float) -> None:
        self.waited = timeout_s

    def close(self) -> None:
        self.is_closed = True


def parts_of(name: str, num_ranks: int) -> list[PoolPart]:
    parts: list[PoolPart] = []
    for place in range(num_ranks):
        heads = kv_heads_at(place, num_ranks, NUM_HEADS)
        part = PoolPart(
            agent=f"{name}-{place}",
            agent_metadata=b"",
            process=own_mark(),
            base_address=0,
            device_id=0,
            first_head=heads.start,
            num_heads=len(heads),
        )
        parts.append(part)
    return parts


def pool_of(name: str, num_ranks: int) -> PoolInfo:
    return describe(replace(MEMORY, layout=replace(LAYOUT, num_kv_heads=NUM_HEADS)), parts_of(name, num_ranks))


class Crew:
    """The second of two groups of one worker: its leader's agent, and its followers' hands."""

    def __init__(self, size: int, peer_ranks: int = 2) -> None:
        ranks = Ranks(tp=2 * size, dp=2)
        self.leader = ranks.rank(size)
        links: dict[int, FakeLink] = {}
        self.agents = [FakeAgent(part) for part in parts_of("prefill", size)]
        self.links = [FakeLink(self.leader.index + place, links) for place in range(size)]
        self.now = 0.0
        self.hands = [
            Hand(agent, link, ranks.rank(self.leader.index + place))
            for place, (agent, link) in enumerate(zip(self.agents, self.links, strict=True))
            if place > 0
        ]
        parts = [self.agents[0].part, *_hands_parts(self.links[0], size - 1, MEMORY.num_pages)]
        pool = describe(replace(MEMORY, layout=replace(LAYOUT, num_kv_heads=NUM_HEADS)), parts)
        self.agent = GroupAgent(self.agents[0], self.links[0], self.leader, pool, clock=lambda: self.now)
        self.agent.connect(PEER, pool_of("decode", peer_ranks))

    def turn(self) -> None:
        for hand in self.hands:
            hand.turn(self.now)

    def write(self) -> Write:
        write = self.agent.write(PEER, [1, 2], [5, 6], TAG)
        self.turn()
        return write

    def end(self, place: int, state: WriteState) -> None:
        """A rank's share ends."""
        self.agents[place].writes[-1].state = state
        self.turn()


def test_a_pool_has_the_parts_of_all_ranks_by_their_places():
    crew = Crew(4)
    assert [part.agent for part in crew.agent.pool().parts] == [f"prefill-{place}" for place in range(4)]
    assert crew.agent.pool().page_bytes == 4 * LAYOUT.head_bytes


def test_all_ranks_write_and_the_last_one_ends_it():
    """The peer's leader hears of it once, and not before."""
    crew = Crew(2)
    write = crew.write()
    assert [agent.writes[0].pages for agent in crew.agents] == [[(1, 5), (2, 6)]] * 2
    assert [agent.writes[0].tag for agent in crew.agents] == [b"", b""]
    assert write.num_bytes == 2 * NUM_HEADS * LAYOUT.head_bytes
    crew.end(0, WriteState.DONE)
    assert crew.agent.poll(write) is WriteState.IN_PROGRESS
    assert crew.agents[0].notified == []
    crew.end(1, WriteState.DONE)
    assert crew.agent.poll(write) is WriteState.DONE
    assert crew.agent.poll(write) is WriteState.DONE
    assert crew.agents[0].notified == [(PEER, TAG)]
    assert crew.agents[1].notified == []


def test_ranks_without_heads_for_the_peer_are_left_alone():
    """Four ranks with two heads: two of them have what the other two have."""
    crew = Crew(4, peer_ranks=1)
    write = crew.write()
    assert [len(agent.writes) for agent in crew.agents] == [1, 0, 1, 0]
    assert [agent.peers for agent in crew.agents] == [[PEER], [], [PEER], []]
    crew.end(0, WriteState.DONE)
    crew.end(2, WriteState.DONE)
    assert crew.agent.poll(write) is WriteState.DONE


def test_a_leader_that_writes_alone_has_the_tag_sent_with_the_data():
    crew = Crew(1)
    write = crew.write()
    assert crew.agents[0].writes[0].tag == TAG
    crew.end(0, WriteState.DONE)
    assert crew.agent.poll(write) is WriteState.DONE
    assert crew.agents[0].notified == []


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failed_share_fails_the_write_when_the_other_one_has_ended(failing: int):
    crew = Crew(2)
    write = crew.write()
    crew.end(failing, WriteState.FAILED)
    assert crew.agent.poll(write) is WriteState.IN_PROGRESS, "the other rank may still write"
    crew.end(1 - failing, WriteState.DONE)
    assert crew.agent.poll(write) is WriteState.FAILED
    assert crew.agents[0].notified == []


def test_a_leader_that_cannot_write_does_not_end_its_followers_shares():
    crew = Crew(2)
    crew.agents[0].refuses.add("write")
    write = crew.write()
    assert crew.agent.poll(write) is WriteState.IN_PROGRESS
    crew.end(1, WriteState.DONE)
    assert crew.agent.poll(write) is WriteState.FAILED


def test_a_leader_that_writes_alone_and_cannot_raises():
    crew = Crew(1)
    crew.agents[0].refuses.add("write")
    with pytest.raises(TransferError, match="no write"):
        crew.write()


@pytest.mark.parametrize("refused", ["write", "connect"])
def test_a_follower_that_cannot_write_fails_the_write(refused: str):
    """Nor one that could not connect, of which the leader has not heard."""
    crew = Crew(2)
    crew.turn()
    crew.agents[1].refuses.add(refused)
    crew.agent.forget(PEER)
    crew.agent.connect(PEER, pool_of("decode", 2))
    write = crew.write()
    crew.end(0, WriteState.DONE)
    assert crew.agent.poll(write) is WriteState.FAILED
    assert crew.agents[0].notified == []


def test_a_notification_that_cannot_be_sent_fails_the_write():
    crew = Crew(2)
    crew.agents[0].refuses.add("notify")
    write = crew.write()
    crew.end(0, WriteState.DONE)
    crew.end(1, WriteState.DONE)
    assert crew.agent.poll(write) is WriteState.FAILED


def test_a_leader_that_cannot_connect_says_so():
    crew = Crew(2)
    crew.agents[0].refuses.add("connect")
    with pytest.raises(TransferError, match="no connect"):
        crew.agent.connect("other", pool_of("other", 2))
    with pytest.raises(TransferError, match="not connected"):
        crew.agent.write("other", [0], [0], TAG)


def test_a_peer_is_forgotten_by_all_that_wrote_to_it():
    crew = Crew(4, peer_ranks=1)
    crew.turn()
    crew.agent.forget(PEER)
    crew.turn()
    assert [agent.peers for agent in crew.agents] == [[], [], [], []]
    with pytest.raises(TransferError, match="not connected"):
        crew.agent.write(PEER, [0], [0], TAG)
    crew.agent.forget(PEER)


def test_words_about_no_write_change_nothing():
    crew = Crew(2)
    write = crew.write()
    for word in (WriteEnded(crew.leader.index + 1, 99, False), WriteEnded(77, 1, False)):
        crew.links[0].inbox.append(word)
    assert crew.agent.poll(write) is WriteState.IN_PROGRESS


def test_followers_look_while_their_leader_does_and_for_a_moment_longer():
    """They need not be told again with every look."""
    crew = Crew(3)
    crew.turn()
    assert [agent.looks for agent in crew.agents] == [0, 0, 0]
    crew.agent.arrivals()
    crew.agent.arrivals()
    crew.turn()
    crew.turn()
    assert [agent.looks for agent in crew.agents] == [2, 2, 2]
    for hand, link in zip(crew.hands, crew.links[1:], strict=True):
        hand.wait()
        assert link.waited == LANDING_WAIT_S
    crew.now += LOOK_S / 2
    crew.agent.arrivals()
    crew.now += LOOK_S / 2
    crew.turn()
    assert [agent.looks for agent in crew.agents] == [3, 3, 3]
    crew.now += LOOK_S
    crew.turn()
    assert [agent.looks for agent in crew.agents] == [3, 3, 3]
    for hand, link in zip(crew.hands, crew.links[1:], strict=True):
        hand.wait()
        assert link.waited == IDLE_WAIT_S


def test_a_hand_naps_while_it_writes():
    crew = Crew(2)
    crew.write()
    crew.hands[0].wait()
    assert crew.links[1].waited == NAP_S
    crew.end(1, WriteState.DONE)
    crew.hands[0].wait()
    assert crew.links[1].waited == IDLE_WAIT_S


def test_a_follower_with_another_number_of_pages_is_refused():
    """Peers are told one number for all ranks; in the smaller pool it would be an address of something else."""
    link = FakeLink(0, {})
    link.inbox.append(HandReady(1, MEMORY.num_pages - 1, parts_of("prefill", 2)[1]))
    with pytest.raises(TransferError, match="8 pages in the leader, 7"):
        _hands_parts(link, 1, MEMORY.num_pages)


def test_followers_that_do_not_come_are_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("transfer.group._HANDS_DEADLINE_S", 0.0)
    with pytest.raises(TransferError, match="0 of 1 followers"):
        _hands_parts(FakeLink(0, {}), 1, MEMORY.num_pages)


@settings(deadline=None, max_examples=200)
@given(
    size=st.sampled_from([2, 4]),
    steps=st.lists(
        st.tuples(st.sampled_from(["write", "done", "failed", "hand", "poll"]), st.integers(0, 3), st.integers(0, 3)),
        max_size=40,
    ),
)
def test_no_history_ends_a_write_before_all_its_shares(size: int, steps: list[tuple[str, int, int]]):
    """Writes, ends of shares and hands that are late, in any order; in the end each write ends, and rightly."""
    crew = Crew(size, peer_ranks=size)
    writes: list[Write] = []
    ends = {"done": WriteState.DONE, "failed": WriteState.FAILED}

    def shares(number: int) -> list[FakeWrite | None]:
        return [agent.writes[number] if number < len(agent.writes) else None for agent in crew.agents]

    def check(number: int) -> WriteState:
        state = crew.agent.poll(writes[number])
        known = [share.state if share is not None else WriteState.IN_PROGRESS for share in shares(number)]
        if state is not WriteState.IN_PROGRESS:
            assert WriteState.IN_PROGRESS not in known
            assert (state is WriteState.FAILED) == (WriteState.FAILED in known)
        return state

    for action, place, number in steps:
        place %= size
        if action == "write":
            writes.append(crew.agent.write(PEER, [0], [0], bytes([len(writes)])))
        elif action == "hand" and place > 0:
            crew.hands[place - 1].turn(crew.now)
        elif action in ends:
            for share in shares(number)[place : place + 1]:
                if share is not None and share.state is WriteState.IN_PROGRESS:
                    share.state = ends[action]
        elif action == "poll" and number < len(writes):
            check(number)
    crew.turn()
    for number in range(len(writes)):
        for share in shares(number):
            assert share is not None
            if share.state is WriteState.IN_PROGRESS:
                share.state = WriteState.DONE
    crew.turn()
    states = [check(number) for number in range(len(writes))]
    assert WriteState.IN_PROGRESS not in states
    good = {(PEER, bytes([number])) for number, state in enumerate(states) if state is WriteState.DONE}
    assert set(crew.agents[0].notified) == good
    assert len(crew.agents[0].notified) == len(good)


def test_all_ends_of_a_group_close_with_their_agents():
    crew = Crew(2)
    crew.agent.close()
    assert [hand.close() for hand in crew.hands] == [True]
    assert all(agent.is_closed for agent in crew.agents)
    assert all(link.is_closed for link in crew.links)


def test_a_hand_that_writes_keeps_its_memory():
    crew = Crew(2)
    crew.write()
    assert [hand.close() for hand in crew.hands] == [False]
    assert not crew.agents[1].is_closed
    crew.end(1, WriteState.DONE)
    assert [hand.close() for hand in crew.hands] == [True]
