"""The only file that speaks NIXL (R15): its states and exceptions become our own enums and errors here.

An agent belongs to one thread. Neighbours: `transfer.sender` and `transfer.receiver`, which know only `TransferAgent`, and
`transfer.loopback`, which has an agent without a network.

NIXL facts that the code below relies on, tried on 1.5.1: errors are raised, not returned; `add_remote_agent` returns bytes;
memory must be registered before the agent's metadata is taken; descriptor lists are prepared once a peer; a write's
notification reaches the peer after its data.
"""

import logging
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Protocol

import numpy as np
from nixl import _api as nixl

from common.errors import TransferError
from common.messages import PoolInfo

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
    """Moves KV pages from this process's pool into a peer's, one sided."""

    def metadata(self) -> bytes:
        """What a peer needs to write here."""

    def connect(self, peer: str, metadata: bytes, pool: PoolInfo) -> None:
        """Get ready to write into a peer's pool. Raises TransferError, also if the metadata is not that peer's."""

    def forget(self, peer: str) -> None:
        """Let go of what was prepared for a peer that is gone; no write to it may be in progress."""

    def write(self, peer: str, local_pages: list[int], remote_pages: list[int], tag: bytes) -> Write:
        """Post a write of whole pages; the peer's `arrivals` shows `tag` once the data is there. Raises TransferError."""

    def poll(self, write: Write) -> WriteState:
        """Look at a write once. DONE or FAILED is final: the agent has let go of it, and nothing of it will land any more."""

    def arrivals(self) -> list[tuple[str, bytes]]:
        """Tags of the writes that have landed here since the last call, with their senders' ids."""


@dataclass(slots=True)
class _NixlWrite:
    handle: Any
    num_bytes: int
    state: WriteState


class NixlAgent:
    """NIXL over UCX: NVLink or RDMA between GPUs, shared memory or TCP between hosts' memories."""

    def __init__(self, peer: str, pool: PoolInfo) -> None:
        # NIXL's progress thread spins on a core of its own, idle or not; `poll` and `arrivals` make progress as well, and
        # are called as long as anything is expected.
        config = nixl.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        self._agent = nixl.nixl_agent(peer, config)
        self._pool = pool
        size = pool.num_pages * pool.page_bytes
        self._agent.register_memory([(pool.base_address, size, pool.device_id, "kv_pool")], pool.memory)
        self._metadata: bytes = self._agent.get_agent_metadata()
        self._own_pages = self._prepare("NIXL_INIT_AGENT", pool)
        self._peer_pages: dict[str, Any] = {}

    def metadata(self) -> bytes:
        """NIXL's own description of this agent and its registered memory."""
        return self._metadata

    def connect(self, peer: str, metadata: bytes, pool: PoolInfo) -> None:
        """Add the peer, connect now rather than with the first write, and prepare one descriptor a page of its pool."""
        try:
            added = self._agent.add_remote_agent(metadata)
            name = added.decode() if isinstance(added, bytes) else str(added)
            if name != peer:
                raise TransferError(f"the metadata is that of {name}, not of {peer}")
            if peer not in self._peer_pages:
                self._agent.make_connection(peer)
                self._peer_pages[peer] = self._prepare(peer, pool)
        except Exception as error:
            raise TransferError(f"NIXL cannot reach the peer: {error}") from error

    def forget(self, peer: str) -> None:
        """Release the peer's descriptors, and have NIXL forget it."""
        pages = self._peer_pages.pop(peer, None)
        if pages is None:
            return
        try:
            pages.release()
            self._agent.remove_remote_agent(peer)
        except Exception as error:  # noqa: BLE001
            log.warning("forgetting peer %s: %s", peer, error)

    def write(self, peer: str, local_pages: list[int], remote_pages: list[int], tag: bytes) -> Write:
        """Post one NIXL WRITE with one descriptor a page; adjacent pages are merged by NIXL."""
        if peer not in self._peer_pages:
            raise TransferError(f"peer {peer} is not connected")
        try:
            handle = self._agent.make_prepped_xfer(
                "WRITE",
                self._own_pages,
                np.asarray(local_pages, dtype=np.int32),
                self._peer_pages[peer],
                np.asarray(remote_pages, dtype=np.int32),
                tag,
            )
            state = self._agent.transfer(handle)
        except Exception as error:
            raise TransferError(f"NIXL refuses a write to {peer}: {error}") from error
        return self._settled(
            _NixlWrite(handle, len(local_pages) * self._pool.page_bytes, WriteState.IN_PROGRESS), state
        )

    def poll(self, write: Write) -> WriteState:
        """Ask NIXL for the state of a write that is in progress."""
        assert isinstance(write, _NixlWrite)
        if write.state is WriteState.IN_PROGRESS:
            try:
                state = self._agent.check_xfer_state(write.handle)
            except Exception as error:  # noqa: BLE001
                log.warning("a write failed: %s", error)
                state = "ERR"
            self._settled(write, state)
        return write.state

    def arrivals(self) -> list[tuple[str, bytes]]:
        """NIXL's notifications, which follow their write's data."""
        return [(str(peer), tag) for peer, tags in self._agent.get_new_notifs().items() for tag in tags]

    def _settled(self, write: _NixlWrite, state: str) -> _NixlWrite:
        write.state = {"DONE": WriteState.DONE, "PROC": WriteState.IN_PROGRESS}.get(state, WriteState.FAILED)
        if write.state is not WriteState.IN_PROGRESS:
            try:
                write.handle.release()
            except Exception as error:  # noqa: BLE001
                log.warning("releasing a finished write: %s", error)
        return write

    def _prepare(self, agent_name: str, pool: PoolInfo) -> Any:
        pages = np.array(
            [[pool.base_address, pool.page_bytes, pool.device_id, pool.page_bytes, pool.num_pages]], dtype=np.uint64
        )
        return self._agent.prep_xfer_dlist(agent_name, pages, pool.memory)
