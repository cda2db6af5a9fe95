"""Endpoints that are closed, have their memory taken away, and are opened again over new memory: NIXL, ZMQ, threads, all real.

Mailboxes and counters stay; the peer at the other end is another one each time, and gets on with whoever is there.
"""

import threading
from collections.abc import Iterator

import pytest
import torch

from common.ids import new_peer_id
from common.memory.device_block import DeviceBlock
from common.memory.layout import KvLayout, PoolMemory
from common.process import free_port
from common.wire import ControlDialer, ControlListener
from tests.support.processes import DEADLINE_S
from transfer.agent import NixlAgent
from transfer.commands import (
    FinishRoom,
    KvArrived,
    OpenRoom,
    PagesReady,
    ReceiveKv,
    ReceiverMailbox,
    RoomClosed,
    SenderMailbox,
)
from transfer.config import TransferOptions
from transfer.endpoint import Mailbox, TransferCounts, TransferThread
from transfer.messages import DecodeToPrefill, FirstToken, PrefillToDecode
from transfer.receiver import Receiver
from transfer.sender import Sender

NUM_PAGES, PAGE_BYTES = 8, 4096
LAYOUT = KvLayout(page_size=1, num_layers=1, num_kv_heads=1, head_dim=PAGE_BYTES // 2, dtype="uint8", itemsize_bytes=1)
OPTIONS = TransferOptions(heartbeat_s=0.1, peer_deadline_s=5.0)


class Pool:
    """Pages whose memory comes and goes."""

    def __init__(self, fill: int) -> None:
        self.pages = torch.full((NUM_PAGES, PAGE_BYTES), fill, dtype=torch.uint8)
        self.block = DeviceBlock(self.pages)

    def info(self) -> PoolMemory:
        return PoolMemory(
            base_address=self.pages.data_ptr(), num_pages=NUM_PAGES, device_id=0, memory="DRAM", layout=LAYOUT
        )

    def reopen(self, thread: TransferThread) -> None:
        """Give the memory back and take it again, at another address, as a worker does."""
        assert thread.stop(DEADLINE_S)
        self.block.release()
        assert self.pages.untyped_storage().nbytes() == 0
        in_the_way = torch.ones(NUM_PAGES, PAGE_BYTES, dtype=torch.uint8)  # so that the address changes
        self.block.resume()
        thread.start()
        assert int(in_the_way.sum()) == NUM_PAGES * PAGE_BYTES


class Ends:
    """Both ends, in one process, each on a thread of its own."""

    def __init__(self) -> None:
        self.port = free_port()
        self.heard = threading.Event()
        self.peers: list[str] = []
        self.prefill, self.decode = Pool(0), Pool(0)
        self.sending: SenderMailbox = Mailbox(self.heard.set)
        self.receiving: ReceiverMailbox = Mailbox(self.heard.set)
        self.sent, self.received = TransferCounts(), TransferCounts()
        self.sender = TransferThread(self._open_sender, self.heard.set)
        self.receiver = TransferThread(self._open_receiver, self.heard.set)
        self.sender.start()
        self.receiver.start()

    def _open_sender(self) -> Sender:
        peer_id = new_peer_id("prefill")
        self.peers.append(peer_id)
        link: ControlListener[DecodeToPrefill, PrefillToDecode] = ControlListener(
            "127.0.0.1", self.port, DecodeToPrefill
        )
        agent = NixlAgent(peer_id, self.prefill.info())
        return Sender(agent, link, self.sending, OPTIONS, peer_id=peer_id, counts=self.sent)

    def _open_receiver(self) -> Receiver:
        peer_id = new_peer_id("decode")
        self.peers.append(peer_id)
        link: ControlDialer[PrefillToDecode, DecodeToPrefill] = ControlDialer(peer_id, PrefillToDecode)
        agent = NixlAgent(peer_id, self.decode.info())
        return Receiver(agent, link, self.receiving, OPTIONS, peer_id=peer_id, counts=self.received)

    def transfer(self, room: int, ink: int) -> None:
        """Send two pages full of `ink`, and see that they are there and nothing else is."""
        self.prefill.pages[[1, 4]] = ink
        self.decode.pages.zero_()
        self.receiving.submit(
            ReceiveKv(
                room=room,
                source=f"127.0.0.1:{self.port}",
                first_room=room,
                pages=[6, 3],
                prompt_tokens=2,
                prompt_digest=b"digest",
            )
        )
        self.sending.submit(OpenRoom(room, 2, b"digest"))
        self.sending.submit(PagesReady(room, [1, 4]))
        self.sending.submit(FinishRoom(room, FirstToken(token_id=1, logprob=0.0), 0.0, ("w",)))
        events: list[object] = []
        while len(events) < 2:
            assert self.heard.wait(DEADLINE_S)
            self.heard.clear()
            self.sender.check()
            self.receiver.check()
            events += [*self.sending.events(), *self.receiving.events()]
        assert RoomClosed(room, None) in events
        assert any(isinstance(event, KvArrived) and event.room == room for event in events)
        assert [int(page.unique()) for page in self.decode.pages] == [0, 0, 0, ink, 0, 0, ink, 0]


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    assert ends.sender.stop(DEADLINE_S)
    assert ends.receiver.stop(DEADLINE_S)


def test_whoever_is_opened_again_is_another_peer_and_serves(ends: Ends):
    """In any order; the other end may know the one before, or have lost it, or be new itself."""
    ends.transfer(1, 11)
    for number, reopened in enumerate(["prefill", "decode", "prefill", "prefill", "both", "decode"], start=2):
        if reopened in ("prefill", "both"):
            ends.prefill.reopen(ends.sender)
        if reopened in ("decode", "both"):
            ends.decode.reopen(ends.receiver)
        ends.transfer(number, 10 + number)
    assert len(set(ends.peers)) == len(ends.peers) == 2 + 7
    assert ends.sent == TransferCounts(0, ends.sent.num_writes, 7 * 2 * PAGE_BYTES, ends.sent.num_dropped)
    assert ends.received.num_bytes == 7 * 2 * PAGE_BYTES
    assert ends.received.num_writes == ends.sent.num_writes >= 7


def test_start_and_stop_may_be_repeated(ends: Ends):
    ends.sender.start()
    assert len(ends.peers) == 2, "it is open already"
    assert ends.receiver.stop(DEADLINE_S)
    assert ends.receiver.stop(DEADLINE_S)
    ends.receiver.start()
    ends.transfer(1, 11)


def test_what_is_asked_for_while_it_is_closed_is_done_later(ends: Ends):
    assert ends.sender.stop(DEADLINE_S)
    ends.sending.submit(OpenRoom(7, 1, b""))
    ends.sender.start()
    ends.transfer(1, 11)
    assert ends.sent.num_rooms == 1
