"""Control messages that nobody should send, between the real ends of a transfer.

Whatever comes, no end's turn raises, since that would end its worker; rooms are gone after their deadlines, every page is
quiet, and nothing lands where nobody has offered a page. What strangers say harms no transfer of others but by ending it.
"""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from common.process import ProcessMark, own_mark
from tests.support.hostile import STABLE
from tests.support.in_process_pair import DECODE, PREFILL
from tests.support.transfer_bench import MEMORY, OPTIONS, Bench, NotedLink, delay_writes
from transfer.agent import describe
from transfer.commands import CancelKv, CancelRoom, KvArrived, KvLost, PagesQuiet, RoomClosed
from transfer.handshake import is_sound
from transfer.loopback import LoopbackAgent, no_faults
from transfer.messages import (
    PROTOCOL,
    FirstToken,
    Heartbeat,
    HeartbeatReply,
    Hello,
    HelloReply,
    KvAbort,
    KvClosed,
    KvDone,
    KvRequest,
    PoolInfo,
    PoolPart,
)

STRANGER = "stranger"
OFFERED = [5, 6, 7]
LONGEST_S = 2 * OPTIONS.transfer_deadline_s + OPTIONS.lease_s + OPTIONS.peer_deadline_s

ROOMS = st.sampled_from([Bench.ROOM, Bench.ROOM, 2, 0, -1, 2**63 - 1, 2**63, 2**64 - 1])
GENERATIONS = st.sampled_from([1, 1, 2, 0, -1, 2**32 - 1, 2**32, 2**63, 2**64 - 1, -(2**63)])
NUMBERS = st.sampled_from([0, 1, 2, 3, 5, 6, 8, -1, 2**31, 2**63, 2**64 - 1, -(2**63)])
PAGES = st.sampled_from([OFFERED, [0, 1, 2], [3, 3, 3], [], [1], [8, 0, 1], [-1, 0, 1], [2**63] * 3])
PEERS = st.sampled_from([PREFILL, DECODE, STRANGER, "", "\0", "p" * 300])
MARKS = st.just(own_mark()) | st.builds(
    ProcessMark,
    boot_id=st.sampled_from([own_mark().boot_id, "", "\0"]),
    network_namespace=st.sampled_from([own_mark().network_namespace, 0, -1]),
    pid_namespace=st.sampled_from([own_mark().pid_namespace, -1, 2**64 - 1]),
    pid=st.sampled_from([own_mark().pid, 0, -1, 2**22, 2**64 - 1]),
    started_ticks=NUMBERS,
)
SECONDS = st.sampled_from([0.0, -1.0, 1e308, float("nan"), float("inf")])
TEXTS = st.none() | st.sampled_from(["", "handshake", "transfer", "x" * 10_000])


def part_of(name: str) -> PoolPart:
    return PoolPart(
        agent=name,
        agent_metadata=name.encode(),
        process=own_mark(),
        base_address=0,
        device_id=0,
        first_head=0,
        num_heads=1,
    )


def pool_of(name: str) -> PoolInfo:
    return describe(MEMORY, [part_of(name)])


PARTS = st.sampled_from([part_of(STRANGER), part_of(DECODE)]) | st.builds(
    PoolPart,
    agent=PEERS,
    agent_metadata=st.sampled_from([DECODE.encode(), STRANGER.encode(), b"", b"\xff\xfe", b"x" * 2**21]),
    process=MARKS,
    base_address=NUMBERS,
    device_id=NUMBERS,
    first_head=st.just(0) | NUMBERS,
    num_heads=st.just(1) | NUMBERS,
)
POOLS = st.sampled_from([pool_of(STRANGER), pool_of(DECODE)]) | st.builds(
    PoolInfo,
    num_pages=NUMBERS | st.just(8),
    page_size=st.just(2) | NUMBERS,
    memory=st.sampled_from(["DRAM", "VRAM"]),
    layout=st.just(MEMORY.layout.fingerprint) | st.text(max_size=3),
    num_kv_heads=st.just(1) | NUMBERS,
    head_bytes=st.just(4) | NUMBERS,
    parts=st.lists(PARTS, max_size=3).map(tuple) | st.just((part_of(STRANGER),) * 65),
)
HELLOS = st.builds(
    Hello,
    peer=PEERS,
    protocol=st.just(PROTOCOL) | NUMBERS,
    pool=POOLS,
)
TO_SENDER = (
    HELLOS
    | st.builds(Heartbeat, st.lists(ROOMS, max_size=5))
    | st.builds(
        KvRequest,
        to=PEERS,
        room=ROOMS,
        generation=GENERATIONS,
        first_page=st.just(0) | NUMBERS,
        pages=PAGES,
        prompt_tokens=st.just(6) | NUMBERS,
        prompt_digest=st.sampled_from([b"digest", b""]),
    )
    | st.builds(KvAbort, to=PEERS, room=ROOMS, generation=GENERATIONS)
)
TO_RECEIVER = (
    st.builds(
        HelloReply,
        peer=PEERS,
        processes=st.lists(MARKS, max_size=3).map(tuple) | st.just((own_mark(),) * 65),
        dp=st.just(1) | NUMBERS,
        refusal=TEXTS,
    )
    | st.builds(HeartbeatReply, peer=PEERS, is_paired=st.booleans())
    | st.builds(
        KvDone,
        room=ROOMS,
        generation=GENERATIONS,
        num_writes=NUMBERS,
        write_seconds=SECONDS,
        exposed_seconds=SECONDS,
        first_token=st.builds(FirstToken, token_id=NUMBERS, logprob=SECONDS),
    )
    | st.builds(
        KvClosed,
        room=ROOMS,
        generation=GENERATIONS,
        error=TEXTS,
        stage=TEXTS,
        leg=st.sampled_from(["prefill", "decode"]),
    )
)
MESSAGES = st.tuples(st.just(PREFILL), TO_SENDER) | st.tuples(st.just(DECODE), TO_RECEIVER)
"""To whom, and what."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Every refusal is logged."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


class Rig(Bench):
    """The bench, and a third process that has an agent of its own and speaks to both ends."""

    def __init__(self, *, delayed: bool) -> None:
        super().__init__(*[delay_writes] * delayed)
        links = self.links[0]._peers
        self.stranger: Any = NotedLink(STRANGER, links, self.network)
        links[STRANGER] = self.stranger
        self.stranger_agent = LoopbackAgent(STRANGER, torch.zeros(8, 4, dtype=torch.uint8), MEMORY, self.network)
        self.prompt = self.network.agents[PREFILL].pages.clone()
        self.senders = {PREFILL: self.links[0], DECODE: self.links[1], STRANGER: self.stranger}
        self.allowed = {DECODE: set(OFFERED), STRANGER: set[int]()}
        """Pages that each decode worker has offered."""
        self.has_moved = False
        """Whether the prefill worker has said that it is on another host, or has followers: nothing can be proven about those."""
        self.closed: list[RoomClosed] = []
        self.events: list[Any] = []

    def do(self, step: str) -> None:
        """One step of the real transfer, or of the world around it."""
        match step:
            case "open":
                self.open()
            case "ask":
                self.ask()
            case "chunk":
                self.chunk(0)
            case "finish":
                self.chunk(1, 2)
                self.finish()
            case "give up":
                self.sender.mailbox.submit(CancelRoom(self.ROOM, "given up"))
            case "cancel":
                self.receiver.mailbox.submit(CancelKv(self.ROOM, PREFILL, self.ROOM))
            case "sleep":
                self.sleep(2)
            case "release":
                self.network.release()
            case "turn":
                self.look()

    def sleep(self, seconds: float, **ends: bool) -> None:
        """Let time pass, in steps that are longer than the bench's, and still short beside every deadline."""
        for _ in range(round(seconds)):
            self.now += 1.0
            self.turn(**ends)

    def say(self, who: str, to: str, message: Any) -> None:
        """Send a message as one of the three processes."""
        if isinstance(message, KvRequest):
            self.allowed[who] |= set(message.pages)
        if isinstance(message, HelloReply):
            own = own_mark()
            is_here = [(own.boot_id, own.network_namespace)] == [
                (told.boot_id, told.network_namespace) for told in message.processes
            ]
            self.has_moved |= who == PREFILL and is_sound(message) and not is_here
        self.senders[who].send(to, message)

    def look(self) -> None:
        """Turn, and take in what the engines hear."""
        self.turn()
        self.closed += self.sender.mailbox.events()
        self.events += self.receiver.mailbox.events()

    def check_end(self) -> None:
        """Nothing is held any more, and all has come to one end."""
        self.network.faults = no_faults
        for _ in range(4):
            self.network.release()
            self.sleep(LONGEST_S / 4)
        self.look()
        assert self.sender.num_rooms == 0
        if self.has_moved and self.receiver.num_rooms:
            assert [type(event) for event in self.events] in ([], [KvLost])  # cancelled, or lost; the pages stay away
            return
        assert self.receiver.num_rooms == 0
        self.sleep(LONGEST_S)
        assert len(self.sender._tombstones) == 0
        assert torch.equal(self.network.agents[PREFILL].pages, self.prompt)
        for name, allowed in self.allowed.items():
            pages = self.network.agents[name].pages
            assert {page for page in range(8) if pages[page].any()} <= allowed
        assert [closed.room for closed in self.closed] == [self.ROOM]
        kinds = [type(event) for event in self.events]
        assert kinds in ([KvArrived], [KvLost, PagesQuiet], [PagesQuiet])
        assert {event.room for event in self.events} == {self.ROOM}
        if isinstance(self.events[0], KvLost):
            error = self.events[0].error
            assert error.message
            assert (error.stage, error.leg in ("prefill", "decode")) == ("transfer", True)


@st.composite
def scripts(draw: st.DrawFn, said: st.SearchStrategy[Any], steps: list[str]) -> list[Any]:
    """A whole transfer, with other things said and done in between: steps by name, and messages."""
    script = draw(st.lists(said | said | st.sampled_from(["turn", "turn", "sleep", "release", *steps]), max_size=16))
    base = draw(st.sampled_from([["open", "ask", "chunk", "finish"], ["ask", "open", "chunk", "finish"]]))
    places = sorted(draw(st.lists(st.integers(0, len(script)), min_size=4, max_size=4)))
    for place, step in reversed(list(zip(places, base, strict=True))):
        script.insert(place, step)
    return script


def run(script: list[Any], *, delayed: bool) -> Rig:
    rig = Rig(delayed=delayed)
    for step in script:
        if isinstance(step, str):
            rig.do(step)
        else:
            rig.say(*step)
    rig.look()
    rig.check_end()
    return rig


TO_BOTH = st.tuples(st.just(PREFILL), TO_SENDER) | st.tuples(st.just(DECODE), TO_RECEIVER)
BY_STRANGERS = st.tuples(st.just(STRANGER), TO_BOTH).map(lambda said: (said[0], *said[1]))
BY_THE_PAIR = st.tuples(st.just(DECODE), st.just(PREFILL), TO_SENDER) | st.tuples(
    st.just(PREFILL), st.just(DECODE), TO_RECEIVER
)
HELLO = Hello(peer=STRANGER, protocol=PROTOCOL, pool=pool_of(STRANGER))
OWN_HELLO = (DECODE, PREFILL, replace(HELLO, peer=DECODE, pool=pool_of(DECODE)))


def hello_with(**fields: Any) -> Hello:
    """A stranger's, with other things said about its one rank."""
    return replace(HELLO, pool=replace(HELLO.pool, parts=(replace(HELLO.pool.parts[0], **fields),)))


REAL = ["open", "ask", "turn", "chunk", "finish"]


def request(**fields: Any) -> KvRequest:
    good = KvRequest(to=PREFILL, room=Bench.ROOM, generation=1, pages=OFFERED, prompt_tokens=6, prompt_digest=b"digest")
    return replace(good, **fields)


@STABLE
@given(scripts(BY_STRANGERS, []), st.booleans())
@example([(STRANGER, PREFILL, hello_with(agent_metadata=DECODE.encode())), *REAL], False)
@example([(STRANGER, PREFILL, hello_with(agent_metadata=b"\xff")), *REAL], False)
@example([(STRANGER, PREFILL, HELLO), (STRANGER, PREFILL, request(room=-1, prompt_tokens=6)), *REAL], False)
@example([(STRANGER, PREFILL, HELLO), "turn", (STRANGER, PREFILL, request(pages=[0, 1, 2])), *REAL], False)
def test_strangers(script: list[Any], delayed: bool):
    """The transfer's own prompt arrives, or an error says why not."""
    rig = run(script, delayed=delayed)
    if isinstance(rig.events[0], KvArrived):
        assert torch.equal(rig.decode_agent.pages[OFFERED], rig.prompt[[0, 1, 2]])
        assert (rig.events[0].first_token.token_id, rig.events[0].prompt_versions) == (1, ("w",))


@STABLE
@given(scripts(BY_THE_PAIR | BY_STRANGERS, ["give up", "cancel"]), st.booleans())
@example([*REAL[:3], (PREFILL, DECODE, HelloReply(peer="", processes=(own_mark(),), refusal="no")), *REAL[3:]], True)
@example([*REAL[:3], (DECODE, PREFILL, request(generation=2)), *REAL[3:]], True)
@example([OWN_HELLO, "open", (DECODE, PREFILL, request(generation=2**63)), "chunk", "turn", "ask", "finish"], False)
@example([OWN_HELLO, (DECODE, PREFILL, request(room=-1)), "turn", *REAL], False)
def test_liars(script: list[Any], delayed: bool):
    """Either end of the pair itself may say anything: what it harms is its own transfer."""
    run(script, delayed=delayed)


def test_nothing_said_harms_nothing():
    rig = run(REAL, delayed=False)
    assert torch.equal(rig.decode_agent.pages[OFFERED], rig.prompt[[0, 1, 2]])
    assert rig.closed == [RoomClosed(Bench.ROOM, None)]


@pytest.mark.parametrize(
    "fields",
    [
        {"room": -1},
        {"room": 0},
        {"room": 2**63},
        {"generation": 2**32},
        {"pages": [8, 0, 1]},
        {"pages": [5, 6]},
        {"pages": [5, 6, 7, 0]},
        {"first_page": -1, "pages": [5, 6, 7, 0]},
        {"first_page": 1},
        {"prompt_tokens": -6},
    ],
)
def test_what_cannot_be_asked_for_is_refused_at_once(fields: dict[str, Any]):
    """It opens no room, nor takes the one that is there."""
    rig = Rig(delayed=False)
    rig.say(STRANGER, PREFILL, HELLO)
    rig.open()
    rig.say(STRANGER, PREFILL, request(**fields))
    rig.chunk(0, 1, 2)
    rig.finish()
    rig.turn()
    assert (rig.sender.num_rooms, rig.sender.counts.num_writes) == (1, 0)
    assert rig.sender.mailbox.events() == []


@pytest.mark.parametrize("generation", [0, 2, -1])
def test_the_end_of_another_generation_ends_nothing(generation: int):
    rig = Rig(delayed=True)
    for step in ("open", "ask", "chunk", "turn"):
        rig.do(step)
    token = FirstToken(token_id=9, logprob=0.0)
    done = KvDone(
        room=rig.ROOM,
        generation=generation,
        num_writes=0,
        write_seconds=0.0,
        exposed_seconds=0.0,
        first_token=token,
        prompt_versions=("another",),
    )
    rig.say(PREFILL, DECODE, done)
    rig.say(PREFILL, DECODE, KvClosed(room=rig.ROOM, generation=generation, error="closed"))
    rig.look()
    assert rig.events == []
    rig.do("finish")
    rig.look()
    rig.check_end()
    assert isinstance(rig.events[0], KvArrived)
    assert (rig.events[0].first_token.token_id, rig.events[0].prompt_versions) == (1, ("w",))


def test_a_peer_cannot_move_its_pool():
    """What is prepared for a peer are the addresses of its first greeting; page numbers of another pool would miss them."""
    rig = Rig(delayed=False)
    for pool in (HELLO.pool, replace(HELLO.pool, num_pages=100)):
        rig.say(STRANGER, PREFILL, replace(HELLO, pool=pool))
    rig.say(STRANGER, PREFILL, request(pages=[97, 98, 99]))
    rig.turn()
    assert rig.sender.num_rooms == 0
    assert rig.sender._peers.refusal(STRANGER) is not None
    known = rig.sender._peers.get(STRANGER)
    assert known is not None
    assert known.pool == HELLO.pool


def test_a_room_that_is_spoken_for_is_not_given_to_others():
    """One decode worker waits for a seat and keeps the prompt; another knows the room's number and all of its prompt."""
    rig = Rig(delayed=False)
    rig.open()
    rig.say(DECODE, PREFILL, OWN_HELLO[2])
    rig.say(DECODE, PREFILL, Heartbeat([rig.ROOM]))
    rig.say(STRANGER, PREFILL, HELLO)
    rig.say(STRANGER, PREFILL, request())
    rig.chunk(0, 1, 2)
    rig.finish()
    rig.turn()
    assert not rig.stranger_agent.pages.any()
    rig.ask()
    rig.turn()
    assert rig.arrived().room == rig.ROOM


def test_a_tombstone_that_is_renewed_does_not_keep_the_others():
    rig = Rig(delayed=False)
    for room in range(10, 20):
        rig.say(STRANGER, PREFILL, KvAbort(to="", room=room, generation=0))
    rig.turn()
    rig.sleep(OPTIONS.transfer_deadline_s)
    rig.say(STRANGER, PREFILL, KvAbort(to="", room=10, generation=0))
    rig.sleep(OPTIONS.transfer_deadline_s + 1)
    assert [room for room in range(10, 20) if room in rig.sender._tombstones] == [10]
