"""A prefill worker's transfer alone, which can be held in the middle of a write. `python -m tests.fault.slow_writer PORT`.

It offers each room that is asked for, one page at a time, all of whose bytes are `INK`. Before the third write is posted it
waits for a byte on stdin, inside of the call that posts it: whoever stops the process now stops it between having decided to
write and writing.
"""

import os
import sys
import time

import torch

from common.memory.layout import KvLayout, PoolMemory
from common.observability.logging import configure_logging
from common.process import run_main
from common.wire import ControlListener
from transfer.agent import NixlAgent, Write
from transfer.commands import FinishRoom, OpenRoom, PagesReady, SenderMailbox
from transfer.config import TransferOptions
from transfer.endpoint import Mailbox
from transfer.messages import DecodeToPrefill, FirstToken, KvRequest, PrefillToDecode
from transfer.sender import Sender

PAGE_BYTES = 65536
NUM_PAGES = 16
PROMPT_PAGES = 8
INK = 0xAB
WRITES_BEFORE_THE_PAUSE = 2
OPTIONS = TransferOptions(heartbeat_s=0.1, peer_deadline_s=1.0, lease_s=60.0, transfer_deadline_s=60.0)


def make_pool(fill: int) -> tuple[torch.Tensor, PoolMemory]:
    """Memory in pages of one token each, and its description."""
    pages = torch.full((NUM_PAGES, PAGE_BYTES), fill, dtype=torch.uint8)
    layout = KvLayout(
        page_size=1, num_layers=1, num_kv_heads=1, head_dim=PAGE_BYTES // 2, dtype="uint8", itemsize_bytes=1
    )
    memory = PoolMemory(base_address=pages.data_ptr(), num_pages=NUM_PAGES, device_id=0, memory="DRAM", layout=layout)
    return pages, memory


class PausingAgent(NixlAgent):
    """Waits for a byte on stdin before the third write."""

    num_writes = 0

    def write(self, peer: str, local_pages: list[int], remote_pages: list[int], tag: bytes) -> Write:
        """Post a write, in the end."""
        if self.num_writes == WRITES_BEFORE_THE_PAUSE:
            print("about to write", flush=True)
            os.read(sys.stdin.fileno(), 1)
        self.num_writes += 1
        return super().write(peer, local_pages, remote_pages, tag)


class ObligingLink(ControlListener[DecodeToPrefill, PrefillToDecode]):
    """Has the prompt of every room that is asked for, at once."""

    def __init__(self, port: int) -> None:
        super().__init__("127.0.0.1", port, DecodeToPrefill)
        self.mailbox: SenderMailbox = Mailbox(lambda: None)

    def receive(self) -> list[tuple[str, DecodeToPrefill]]:
        """Receive, and open the rooms that are asked for."""
        received = super().receive()
        for _, message in received:
            if isinstance(message, KvRequest):
                self.mailbox.submit(OpenRoom(message.room, PROMPT_PAGES, message.prompt_digest))
                self.mailbox.submit(PagesReady(message.room, [0]))
        return received


def main(argv: list[str]) -> None:
    """Serve until killed."""
    configure_logging("writer", "warning")
    link = ObligingLink(int(argv[0]))
    peer_id = f"writer-{os.getpid()}"
    _, memory = make_pool(INK)
    agent = PausingAgent(peer_id, memory)
    sender = Sender(agent, link, link.mailbox, OPTIONS, peer_id=peer_id)
    print("up", flush=True)
    while True:
        sender.turn(time.monotonic())
        for room_id, room in sender._rooms.items():
            num_ready = len(room.ready_pages)
            if room.opened is not None and num_ready < PROMPT_PAGES and room.num_posted_pages == num_ready:
                link.mailbox.submit(PagesReady(room_id, [num_ready]))
            elif num_ready == PROMPT_PAGES and room.finished is None:
                link.mailbox.submit(FinishRoom(room_id, FirstToken(token_id=1, logprob=0.0), 0.0, ("w",)))
        sender.wait()


if __name__ == "__main__":
    run_main(main)
