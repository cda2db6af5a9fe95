"""One rank of a worker that only transfers. `python -m tests.support.group_rank ROLE FOLDER RANK TP HEADS PORT FILE`.

All elements of all pages are different numbers, on the decode side negative ones. The leaders play the transfers of `SCRIPT`; a
decode leader prints a line for each that arrives. A line on stdin has a rank save its pool into FILE, and answer with a line.
"""

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.ids import new_peer_id
from common.memory.layout import KvLayout, PoolMemory
from common.observability.logging import configure_logging
from common.process import run_main
from common.ranks import Rank, Ranks
from common.wire import ControlDialer, ControlListener
from transfer.commands import FinishRoom, KvArrived, OpenRoom, PagesReady, ReceiveKv, ReceiverMailbox, SenderMailbox
from transfer.config import TransferOptions
from transfer.endpoint import Endpoint, Mailbox, TransferThread
from transfer.group import open_agent
from transfer.hand import open_hand
from transfer.messages import DecodeToPrefill, FirstToken, PrefillToDecode
from transfer.receiver import Receiver
from transfer.sender import Sender

NUM_PAGES, NUM_LAYERS, PAGE_SIZE, HEAD_DIM = 12, 3, 4, 8


@dataclass(frozen=True)
class Prompt:
    """One transfer."""

    room: int
    chunks: list[list[int]]
    """Pages of the prefill worker, as they become ready."""
    first_page: int
    """The pages of the prompt before it stay where they are."""
    decode_pages: list[int]

    @property
    def prefill_pages(self) -> list[int]:
        """All of them, in order."""
        return [page for chunk in self.chunks for page in chunk]


SCRIPT = [Prompt(1, [[7, 2], [3], [9, 0]], 0, [4, 5, 1, 8, 10]), Prompt(2, [[6, 1]], 1, [11])]


def elements(num_kv_heads: int) -> npt.NDArray[np.float32]:
    """`[page, head, layer, 2, slot, dim]` of all heads of the model: each its own number, from 1 on."""
    shape = (NUM_PAGES, num_kv_heads, NUM_LAYERS, 2, PAGE_SIZE, HEAD_DIM)
    return np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape)


def main(argv: list[str]) -> None:
    """Transfer until stdin ends."""
    role, folder, index, tp, num_kv_heads, port, file = argv
    configure_logging(f"{role}-{index}", "warning")
    rank = Ranks(tp=int(tp)).rank(int(index))
    heads = rank.kv_heads(int(num_kv_heads))
    sign = 1 if role == "prefill" else -1
    pool = np.ascontiguousarray(sign * elements(int(num_kv_heads))[:, heads.start : heads.stop])
    memory = memory_of(pool, rank, int(num_kv_heads))
    heard = threading.Event()
    endpoint = make_endpoint(role, memory, rank, folder, int(port), heard.set)
    thread = TransferThread(lambda: endpoint, heard.set)
    thread.start()
    if isinstance(endpoint, Receiver):
        tell(endpoint, thread, heard)
    for _ in sys.stdin:
        thread.check()
        np.save(file, pool)
        print("saved", flush=True)


def memory_of(pool: npt.NDArray[np.float32], rank: Rank, num_kv_heads: int) -> PoolMemory:
    """Describe what a rank holds."""
    heads = rank.kv_heads(num_kv_heads)
    layout = KvLayout(
        page_size=PAGE_SIZE,
        num_layers=NUM_LAYERS,
        num_kv_heads=len(heads),
        first_kv_head=heads.start,
        model_kv_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        dtype="float32",
        itemsize_bytes=4,
    )
    assert pool.nbytes == NUM_PAGES * layout.page_bytes
    return PoolMemory(base_address=pool.ctypes.data, num_pages=NUM_PAGES, device_id=0, memory="DRAM", layout=layout)


def tell(receiver: Receiver, thread: TransferThread, heard: threading.Event) -> None:
    """Print what comes of each transfer."""
    num_heard = 0
    while num_heard < len(SCRIPT):
        heard.wait()
        heard.clear()
        thread.check()
        for event in receiver.mailbox.events():
            num_heard += 1
            print("arrived" if isinstance(event, KvArrived) else event, flush=True)


def make_endpoint(
    role: str, memory: PoolMemory, rank: Rank, folder: str, port: int, wake: Callable[[], None]
) -> Endpoint:
    """A sender or a receiver with its commands given, or a hand."""
    name = f"{new_peer_id(role)}-{rank.index}"
    if not rank.is_leader:
        return open_hand(name, memory, rank, folder)
    agent = open_agent(name, memory, rank, folder)
    link: Any
    if role == "prefill":
        link = ControlListener("127.0.0.1", port, DecodeToPrefill)
        sender_mailbox: SenderMailbox = Mailbox(lambda: None)
        for prompt in SCRIPT:
            sender_mailbox.submit(OpenRoom(prompt.room, PAGE_SIZE * len(prompt.prefill_pages), b"digest"))
            for chunk in prompt.chunks:
                sender_mailbox.submit(PagesReady(prompt.room, chunk))
            sender_mailbox.submit(FinishRoom(prompt.room, FirstToken(token_id=1, logprob=0.0), 0.0, ("w",)))
        return Sender(agent, link, sender_mailbox, TransferOptions(), peer_id=name)
    link = ControlDialer(name, PrefillToDecode)
    mailbox: ReceiverMailbox = Mailbox(wake)
    for prompt in SCRIPT:
        command = ReceiveKv(
            room=prompt.room,
            source=f"127.0.0.1:{port}",
            first_room=prompt.room,
            first_page=prompt.first_page,
            pages=prompt.decode_pages,
            prompt_tokens=PAGE_SIZE * len(prompt.prefill_pages),
            prompt_digest=b"digest",
        )
        mailbox.submit(command)
    return Receiver(agent, link, mailbox, TransferOptions(), peer_id=name)


if __name__ == "__main__":
    run_main(main)
