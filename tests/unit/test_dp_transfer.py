"""A prefill worker of several attention groups: a request's first room says which of them has its prompt, and is asked for it."""

from typing import Any

import pytest
import torch

from tests.support.in_process_pair import DECODE, PREFILL, nothing
from tests.support.transfer_bench import MEMORY, OPTIONS, Bench, NotedLink
from transfer.commands import (
    CancelKv,
    FinishRoom,
    KvArrived,
    KvLost,
    OpenRoom,
    PagesQuiet,
    PagesReady,
    ReceiveKv,
    ReserveKv,
)
from transfer.endpoint import Mailbox
from transfer.loopback import LoopbackAgent
from transfer.messages import FirstToken, Heartbeat
from transfer.sender import Sender

DP = 3


class Groups(Bench):
    """The bench, with a sender for each group; those of group `g` fill their pages with `g + 1`."""

    def __init__(self) -> None:
        super().__init__()
        links: dict[str, Any] = self.links[0]._peers
        host, port = PREFILL.split(":")
        self.senders: list[Sender] = []
        for group in range(DP):
            address = f"{host}:{int(port) + group}"
            links.setdefault(address, NotedLink(address, links, self.network))
            pages = torch.full((8, 4), group + 1, dtype=torch.uint8)
            sender = Sender(
                LoopbackAgent(f"prefill-{group}", pages, MEMORY, self.network),
                links[address],
                Mailbox(nothing),
                OPTIONS,
                peer_id=f"prefill-{group}",
                dp=DP,
            )
            self.senders.append(sender)
        self.stopped: set[int] = set()

    def turn(self, *, sender: bool = True, receiver: bool = True) -> None:
        for _ in range(4):
            self.receiver.turn(self.now)
            for group, each in enumerate(self.senders):
                if group not in self.stopped:
                    each.turn(self.now)
        self.receiver.turn(self.now)

    def compute(self, group: int, room: int) -> None:
        """Have the prompt of a room in a group."""
        mailbox = self.senders[group].mailbox
        mailbox.submit(OpenRoom(room, 2, b"digest"))
        mailbox.submit(PagesReady(room, [0]))
        mailbox.submit(FinishRoom(room, FirstToken(token_id=1, logprob=0.0), 0.0, ("w",)))

    def fetch(self, room: int, first_room: int, page: int, source: str = PREFILL) -> None:
        command = ReceiveKv(
            room=room, source=source, first_room=first_room, pages=[page], prompt_tokens=2, prompt_digest=b"digest"
        )
        self.receiver.mailbox.submit(command)

    def rooms(self) -> list[int]:
        """How many rooms each group has open."""
        return [sender.num_rooms for sender in self.senders]


@pytest.fixture
def groups() -> Groups:
    return Groups()


@pytest.mark.parametrize("is_paired", [False, True])
def test_each_request_is_served_by_the_group_of_its_first_room(groups: Groups, is_paired: bool):
    """Whether the worker is greeted for the first time or known already; the samples of a prompt go where its first one does."""
    if is_paired:
        groups.receiver.mailbox.submit(ReserveKv(99, PREFILL, 99))
        groups.turn()
        assert groups.links[1].dialed == [PREFILL]
    first_rooms = {30: 30, 31: 31, 32: 32, 44: 31}
    for page, (room, first_room) in enumerate(first_rooms.items()):
        groups.compute(first_room % DP, room)
        groups.fetch(room, first_room, page)
    groups.turn()
    events = groups.receiver.mailbox.events()
    assert {event.room for event in events if isinstance(event, KvArrived)} == set(first_rooms)
    assert groups.decode_agent.pages[:4, 0].tolist() == [1, 2, 3, 2]
    assert sorted(groups.links[1].dialed) == ["prefill:1", "prefill:2", "prefill:3"]
    assert groups.rooms() == [0, 0, 0]


def test_a_worker_of_one_group_has_one_address():
    bench = Bench()
    bench.open()
    bench.ask()
    bench.chunk(0, 1, 2)
    bench.finish()
    bench.turn()
    assert bench.arrived()
    assert bench.links[1].dialed == [PREFILL]


@pytest.mark.parametrize("is_paired", [False, True])
def test_a_reservation_keeps_the_lease_of_its_group(groups: Groups, is_paired: bool):
    """Made before the worker is known or after: the prompt is there when there is a seat, much later than its lease."""
    if is_paired:
        groups.receiver.mailbox.submit(ReserveKv(99, PREFILL, 99))
        groups.turn()
    groups.compute(1, 44)
    groups.receiver.mailbox.submit(ReserveKv(44, PREFILL, 31))
    groups.sleep(5 * OPTIONS.lease_s)
    assert groups.rooms() == [0, 1, 0]
    groups.fetch(44, 31, 5)
    groups.turn()
    [event] = groups.receiver.mailbox.events()
    assert isinstance(event, KvArrived)
    assert groups.decode_agent.pages[5, 0] == 2


def test_a_reservation_that_was_used_or_cancelled_is_shown_no_more(groups: Groups):
    groups.compute(1, 31)
    for room in (31, 34):
        groups.receiver.mailbox.submit(ReserveKv(room, PREFILL, room))
    groups.turn()
    groups.fetch(31, 31, 5)
    groups.receiver.mailbox.submit(CancelKv(34, PREFILL, 34))
    groups.turn()
    sent: list[Any] = []
    groups.links[1].send = lambda peer, message: sent.append(message)  # type: ignore[method-assign]
    groups.sleep(3)
    assert [message for message in sent if isinstance(message, Heartbeat)] == []


def test_a_cancelled_room_is_given_up_by_its_group(groups: Groups):
    """Asked for, or not yet."""
    groups.compute(2, 32)
    groups.receiver.mailbox.submit(ReserveKv(32, PREFILL, 32))
    groups.fetch(35, 35, 5)
    groups.turn()
    assert groups.rooms() == [0, 0, 2]
    for room in (32, 35):
        groups.receiver.mailbox.submit(CancelKv(room, PREFILL, room))
    groups.turn()
    assert groups.rooms() == [0, 0, 0]
    assert groups.receiver.mailbox.events() == [PagesQuiet(35)]


def test_a_group_that_is_silent_costs_its_own_requests_alone(groups: Groups):
    groups.stopped.add(1)
    groups.compute(0, 30)
    for page, room in enumerate((30, 31)):
        groups.fetch(room, room, page)
    groups.sleep(OPTIONS.peer_deadline_s + 2)
    arrived, lost, quiet = groups.receiver.mailbox.events()
    assert isinstance(arrived, KvArrived)
    assert isinstance(lost, KvLost)
    assert (arrived.room, lost.room, quiet) == (30, 31, PagesQuiet(31))


def test_a_group_without_a_port_is_none(groups: Groups):
    """The worker says that it has three groups, at an address after which there is no port."""
    address = "prefill:65535"
    links: dict[str, Any] = groups.links[0]._peers
    groups.senders[0]._link = links[address] = NotedLink(address, links, groups.network)
    groups.fetch(31, 31, 5, source=address)
    groups.receiver.mailbox.submit(ReserveKv(34, address, 34))
    groups.turn()
    lost, quiet = groups.receiver.mailbox.events()
    assert isinstance(lost, KvLost)
    assert (lost.error.status, lost.error.leg, quiet) == (400, "decode", PagesQuiet(31))
    assert "no group 1" in lost.error.message


def test_greetings_go_to_groups_too(groups: Groups):
    groups.fetch(31, 31, 5)
    groups.turn()
    assert [sender._peers.get(DECODE) is not None for sender in groups.senders] == [True, True, False]
