"""The only file that speaks NIXL (R15): its states and exceptions become our own enums and errors here.

An agent belongs to one thread. Neighbours: `transfer.sender` and `transfer.receiver`, which know only `TransferAgent`;
`transfer.group`, which makes one agent of those of several ranks, and `transfer.loopback`, which has one without a network.

NIXL facts that the code below relies on, tried on 1.5.1: errors are raised, not returned; `add_remote_agent` returns bytes;
memory must be registered before the agent's metadata is taken; descriptor lists are prepared once a peer; a write's
notification reaches the peer after its data; a write that is DONE is in the peer's memory.
"""

import logging
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, NamedTuple, Protocol

import numpy as np
from nixl import _api as nixl

from common.errors import TransferError
from common.memory.layout import PoolMemory
from common.process import own_mark
from transfer.heads import Piece, pieces_of
from transfer.messages import PoolInfo, PoolPart

log = logging.getLogger(__name__)


class WriteState(Enum):
    """Where a posted write is."""

    IN_PROGRESS = auto()
    DONE = auto()
    FAILED = auto()


class Write(Protocol):
    """A posted write; the agent that made it polls it."""

    num_bytes: int


class TransferAgent(Protocol):
    """Moves KV pages from this group's pool into a peer's, one sided."""

    def pool(self) -> PoolInfo:
        """What a peer needs to write here."""

    def connect(self, peer: str, pool: PoolInfo) -> None:
        """Get ready to write into a peer's pool. Raises TransferError, also if the metadata is not that peer's."""

    def forget(self, peer: str) -> None:
        """Let go of what was prepared for a peer that is gone; no write to it may be in progress."""

    def write(self, peer: str, local_pages: list[int], remote_pages: list[int], tag: bytes) -> Write:
        """Post a write of whole pages; the peer's `arrivals` shows `tag` once the data is there. Raises TransferError."""

    def poll(self, write: Write) -> WriteState:
        """Look at a write once. DONE or FAILED is final: the agent has let go of it, and nothing of it will land any more."""

    def arrivals(self) -> list[tuple[str, bytes]]:
        """Tags of the writes that have landed here since the last call, with their senders' ids."""

    def close(self) -> None:
        """Let go of the memory and of all peers; nothing may be in progress, and nothing is called afterwards."""


class RankAgent(TransferAgent, Protocol):
    """One rank's share of that: it writes its own heads, and with an empty tag it notifies nobody."""

    @property
    def part(self) -> PoolPart:
        """What this rank holds of its group's pool."""

    def notify(self, peer: str, tag: bytes) -> None:
        """Let the peer's `arrivals` show `tag`; nothing is written. Raises TransferError."""


def describe(memory: PoolMemory, parts: list[PoolPart]) -> PoolInfo:
    """The pool of a group, one of whose ranks has this memory."""
    layout = memory.layout
    return PoolInfo(
        num_pages=memory.num_pages,
        page_size=layout.page_size,
        memory=memory.memory,
        layout=layout.fingerprint,
        num_kv_heads=layout.num_model_kv_heads,
        head_bytes=layout.head_bytes,
        parts=tuple(parts),
    )


class _Route(NamedTuple):
    """From this rank to one of a peer's: the same heads of every page on both sides, as prepared descriptors."""

    agent: str
    own_pages: Any
    peer_pages: Any
    bytes_per_page: int


@dataclass(slots=True)
class _NixlWrite:
    peer: str
    tag: bytes
    """To be sent when all is written; empty if nobody waits for it, or NIXL sends it."""
    num_bytes: int
    handles: list[Any] = field(default_factory=list)
    """Of what is in progress."""
    has_failed: bool = False
    state: WriteState = WriteState.IN_PROGRESS


class NixlAgent:
    """NIXL over UCX: NVLink or RDMA between GPUs, shared memory or TCP between hosts' memories.

    It writes the heads of the rank at `place` in a group of `group_size`.
    """

    def __init__(self, name: str, memory: PoolMemory, *, place: int = 0, group_size: int = 1) -> None:
        # NIXL's progress thread spins on a core of its own, idle or not; `poll` and `arrivals` make progress as well, and
        # are called as long as anything is expected.
        config = nixl.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        self._agent: Any = nixl.nixl_agent(name, config)
        self._memory = memory
        self._place = place
        self._group_size = group_size
        size = memory.num_pages * memory.page_bytes
        self._registered = self._agent.register_memory(
            [(memory.base_address, size, memory.device_id, "kv_pool")], memory.memory
        )
        self.part = PoolPart(
            agent=name,
            agent_metadata=self._agent.get_agent_metadata(),
            process=own_mark(),
            base_address=memory.base_address,
            device_id=memory.device_id,
            first_head=memory.layout.first_kv_head,
            num_heads=memory.layout.num_kv_heads,
        )
        self._own_pages: dict[tuple[int, int], Any] = {}
        """By the heads that they are cut down to."""
        self._routes: dict[str, list[_Route]] = {}

    def pool(self) -> PoolInfo:
        """The pool of a group that is this rank alone."""
        return describe(self._memory, [self.part])

    def connect(self, peer: str, pool: PoolInfo) -> None:
        """Add the peer's ranks that this one writes to, connect now rather than with the first write, and prepare routes."""
        routes: list[_Route] = []
        try:
            for piece in pieces_of(self._group_size, len(pool.parts), pool.num_kv_heads):
                if piece.sender != self._place:
                    continue
                part = pool.parts[piece.receiver]
                added = self._agent.add_remote_agent(part.agent_metadata)
                name = added.decode() if isinstance(added, bytes) else str(added)
                if name != part.agent:
                    raise TransferError(f"the metadata is that of {name}, not of {part.agent}")
                if peer not in self._routes:
                    self._agent.make_connection(part.agent)
                    routes.append(self._route(pool, piece))
        except Exception as error:
            self._release(routes)
            raise TransferError(f"NIXL cannot reach the peer: {error}") from error
        self._routes.setdefault(peer, routes)

    def forget(self, peer: str) -> None:
        """Release the peer's descriptors, and have NIXL forget its ranks."""
        self._release(self._routes.pop(peer, []))

    def write(self, peer: str, local_pages: list[int], remote_pages: list[int], tag: bytes) -> Write:
        """Post one NIXL WRITE a route, with one descriptor a page; adjacent whole pages are merged by NIXL."""
        routes = self._routes.get(peer)
        if routes is None:
            raise TransferError(f"peer {peer} is not connected")
        num_bytes = len(local_pages) * sum(route.bytes_per_page for route in routes)
        is_alone = len(routes) == 1
        write = _NixlWrite(peer, b"" if is_alone else tag, num_bytes)
        own, remote = np.asarray(local_pages, dtype=np.int32), np.asarray(remote_pages, dtype=np.int32)
        for route in routes:
            try:
                handle = self._agent.make_prepped_xfer(
                    "WRITE", route.own_pages, own, route.peer_pages, remote, tag if is_alone else b""
                )
                state = self._agent.transfer(handle)
            except Exception as error:
                if not write.handles:
                    raise TransferError(f"NIXL refuses a write to {peer}: {error}") from error
                log.warning("a write to %s failed when others of it were posted: %s", peer, error)
                write.has_failed = True
                break
            self._note(write, handle, state)
        self._settle(write)
        return write

    def poll(self, write: Write) -> WriteState:
        """Ask NIXL for the states of what is in progress of a write."""
        assert isinstance(write, _NixlWrite)
        handles, write.handles = write.handles, []
        for handle in handles:
            try:
                state = self._agent.check_xfer_state(handle)
            except Exception as error:  # noqa: BLE001
                log.warning("a write failed: %s", error)
                state = "ERR"
            self._note(write, handle, state)
        self._settle(write)
        return write.state

    def notify(self, peer: str, tag: bytes) -> None:
        """Send a notification of its own to the peer's leader, whose agent has the peer's name."""
        try:
            self._agent.send_notif(peer, tag)
        except Exception as error:
            raise TransferError(f"NIXL cannot notify {peer}: {error}") from error

    def arrivals(self) -> list[tuple[str, bytes]]:
        """NIXL's notifications, which follow their write's data."""
        return [(str(peer), tag) for peer, tags in self._agent.get_new_notifs().items() for tag in tags]

    def close(self) -> None:
        """Forget all peers and deregister the memory; NIXL's agent ends with the last reference to it."""
        for peer in list(self._routes):
            self.forget(peer)
        try:
            for own_pages in self._own_pages.values():
                own_pages.release()
            self._agent.deregister_memory(self._registered)
        except Exception as error:
            raise TransferError(f"NIXL does not let go of the KV pool: {error}") from error
        self._own_pages.clear()
        self._registered = self._agent = None

    def _note(self, write: _NixlWrite, handle: Any, state: str) -> None:
        """Keep what is in progress, and let go of what has ended."""
        if state == "PROC":
            write.handles.append(handle)
            return
        write.has_failed |= state != "DONE"
        try:
            handle.release()
        except Exception as error:  # noqa: BLE001
            log.warning("releasing a finished write: %s", error)

    def _settle(self, write: _NixlWrite) -> None:
        """End a write of which nothing is in progress any more."""
        if write.handles or write.state is not WriteState.IN_PROGRESS:
            return
        if write.tag and not write.has_failed:
            try:
                self.notify(write.peer, write.tag)
            except TransferError as error:
                log.warning("a write failed: %s", error)
                write.has_failed = True
        write.state = WriteState.FAILED if write.has_failed else WriteState.DONE

    def _route(self, peer_pool: PoolInfo, piece: Piece) -> _Route:
        key = (piece.first_head, piece.num_heads)
        if key not in self._own_pages:
            self._own_pages[key] = self._prepare("NIXL_INIT_AGENT", self.part, self.pool(), piece)
        part = peer_pool.parts[piece.receiver]
        return _Route(
            part.agent,
            self._own_pages[key],
            self._prepare(part.agent, part, peer_pool, piece),
            piece.num_heads * peer_pool.head_bytes,
        )

    def _prepare(self, agent_name: str, part: PoolPart, pool: PoolInfo, piece: Piece) -> Any:
        """Describe the piece's heads in each page of one rank."""
        address = part.base_address + (piece.first_head - part.first_head) * pool.head_bytes
        length, stride = piece.num_heads * pool.head_bytes, part.num_heads * pool.head_bytes
        pages = np.array([[address, length, part.device_id, stride, pool.num_pages]], dtype=np.uint64)
        return self._agent.prep_xfer_dlist(agent_name, pages, pool.memory)

    def _release(self, routes: list[_Route]) -> None:
        for route in routes:
            try:
                route.peer_pages.release()
                self._agent.remove_remote_agent(route.agent)
            except Exception as error:  # noqa: BLE001
                log.warning("forgetting agent %s: %s", route.agent, error)
