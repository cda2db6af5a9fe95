"""A sender and a receiver over the loopback, without engines: the test moves the clock, and is the process at either end."""

import math
from typing import Any

import torch

from common.memory.layout import KvLayout, PoolMemory
from tests.support.in_process_pair import DECODE, PREFILL, nothing
from transfer.commands import FinishRoom, KvArrived, OpenRoom, PagesReady, ReceiveKv
from transfer.config import TransferOptions
from transfer.endpoint import Mailbox
from transfer.loopback import Fault, FaultPolicy, LoopbackAgent, LoopbackLink, LoopbackNetwork, no_faults
from transfer.messages import FirstToken
from transfer.receiver import Receiver
from transfer.sender import Sender

OPTIONS = TransferOptions(lease_s=10.0, transfer_deadline_s=30.0, heartbeat_s=1.0, peer_deadline_s=5.0)
LAYOUT = KvLayout(page_size=2, num_layers=1, num_kv_heads=1, head_dim=1, dtype="uint8", itemsize_bytes=1)
MEMORY = PoolMemory(base_address=0, num_pages=8, device_id=0, memory="DRAM", layout=LAYOUT)


def delay_writes(what: str) -> Fault:
    """Every write is in progress until it is released."""
    return Fault.DELAY if what == "write" else Fault.NONE


class NotedLink(LoopbackLink[Any, Any]):
    """Keeps how long it would have waited last."""

    waited = math.nan

    def wait(self, timeout_s: float) -> None:
        self.waited = timeout_s


class DeafAgent(LoopbackAgent):
    """Hears of no arrival as long as it is deaf."""

    deaf = False

    def arrivals(self) -> list[tuple[str, bytes]]:
        return [] if self.deaf else super().arrivals()


class Bench:
    """A sender and a receiver without engines, over a loopback; the clock is the test's."""

    ROOM = 1

    def __init__(self, faults: FaultPolicy = no_faults) -> None:
        self.clock = 0.0
        self.network = LoopbackNetwork(faults)
        links: dict[str, Any] = {}
        for name in (PREFILL, DECODE):
            links[name] = NotedLink(name, links, self.network)
        self.links = (links[PREFILL], links[DECODE])
        self.now = 0.0
        self.decode_agent = DeafAgent(DECODE, torch.zeros(8, 4, dtype=torch.uint8), MEMORY, self.network)
        self.sender = self.start_sender(PREFILL)
        self.receiver = Receiver(
            self.decode_agent,
            links[DECODE],
            Mailbox(nothing),
            OPTIONS,
            peer_id=DECODE,
        )

    def start_sender(self, peer_id: str) -> Sender:
        """Make a sender at the one address; the one that was there before is heard no more."""
        self.sender = Sender(
            LoopbackAgent(peer_id, torch.arange(32, dtype=torch.uint8).reshape(8, 4), MEMORY, self.network),
            self.links[0],
            Mailbox(nothing),
            OPTIONS,
            peer_id=peer_id,
            clock=lambda: self.clock,
        )
        return self.sender

    def open(self) -> None:
        self.sender.mailbox.submit(OpenRoom(self.ROOM, 6, b"digest"))

    def ask(self) -> None:
        self.receiver.mailbox.submit(
            ReceiveKv(
                room=self.ROOM,
                source=PREFILL,
                first_room=self.ROOM,
                pages=[5, 6, 7],
                prompt_tokens=6,
                prompt_digest=b"digest",
            )
        )

    def chunk(self, *pages: int) -> None:
        self.sender.mailbox.submit(PagesReady(self.ROOM, list(pages)))

    def finish(self) -> None:
        self.sender.mailbox.submit(FinishRoom(self.ROOM, FirstToken(token_id=1, logprob=-1.0), self.clock, ("w",)))

    def at(self, clock: float) -> None:
        """Move the clock there, and turn until nothing is under way."""
        self.clock = clock
        self.turn()

    def turn(self, *, sender: bool = True, receiver: bool = True) -> None:
        """Turn until nothing is under way; an end that does not turn is stopped."""
        for _ in range(3):
            if receiver:
                self.receiver.turn(self.now)
            if sender:
                self.sender.turn(self.now)
        if receiver:
            self.receiver.turn(self.now)

    def sleep(self, seconds: float, *, sender: bool = True, receiver: bool = True) -> None:
        """Let time pass, in steps that are short beside every deadline."""
        for _ in range(round(seconds * 4)):
            self.now += 0.25
            self.turn(sender=sender, receiver=receiver)

    @property
    def waits(self) -> tuple[float, float]:
        """How long sender and receiver would sleep now."""
        self.sender.wait()
        self.receiver.wait()
        prefill, decode = self.links
        return prefill.waited, decode.waited

    def arrived(self) -> KvArrived:
        [event] = self.receiver.mailbox.events()
        assert isinstance(event, KvArrived)
        return event
