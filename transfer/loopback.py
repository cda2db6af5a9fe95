"""Transfer without a network, for tests: an agent that copies between pools of one process, and links that are deques.

The same interfaces as the real ones, and faults on demand. A fault policy is asked about every write and every control
message, in order, and may have it dropped, delayed, duplicated or truncated; a truncated message no longer decodes and is
counted, a truncated write lands in part and fails, as a real one would.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Generic, TypeVar

import torch

from common.errors import TransferError
from common.memory.layout import PoolMemory
from common.process import own_mark
from transfer.agent import Write, WriteState, describe
from transfer.messages import PoolInfo, PoolPart

Inbound = TypeVar("Inbound")
Outbound = TypeVar("Outbound")


class Fault(Enum):
    """What becomes of a write or of a message."""

    NONE = auto()
    DROP = auto()
    """A write never completes; a message never comes."""
    DELAY = auto()
    """It waits until `Faults.release` is called."""
    DUPLICATE = auto()
    TRUNCATE = auto()


FaultPolicy = Callable[[str], Fault]
"""Asked with `write`, or with the type name of a message."""


def no_faults(_what: str) -> Fault:
    """Let everything through."""
    return Fault.NONE


# ------------------------------------------------------------------------------------------------ data


@dataclass(slots=True)
class _LoopbackWrite:
    num_bytes: int
    state: WriteState
    finish: Callable[[], None] | None = None


class LoopbackNetwork:
    """The agents of one process, by name."""

    def __init__(self, faults: FaultPolicy = no_faults) -> None:
        self.faults = faults
        self.agents: dict[str, LoopbackAgent] = {}
        self._delayed: list[Callable[[], None]] = []

    def delay(self, action: Callable[[], None]) -> None:
        """Keep an action for `release`."""
        self._delayed.append(action)

    def release(self) -> None:
        """Let everything that was delayed happen now, in order."""
        delayed, self._delayed = self._delayed, []
        for action in delayed:
            action()


class LoopbackAgent:
    """A `TransferAgent` of one rank whose writes are tensor copies; `pages` is its pool, seen as `[num_pages, page_bytes]`."""

    def __init__(self, name: str, pages: torch.Tensor, memory: PoolMemory, network: LoopbackNetwork) -> None:
        self.name = name
        self.pages = pages.view(torch.uint8).reshape(pages.shape[0], -1)
        self._memory = memory
        self._network = network
        self._arrivals: deque[tuple[str, bytes]] = deque()
        network.agents[name] = self

    def pool(self) -> PoolInfo:
        """The agent's name is all that a peer needs."""
        memory, layout = self._memory, self._memory.layout
        part = PoolPart(
            agent=self.name,
            agent_metadata=self.name.encode(),
            process=own_mark(),
            base_address=memory.base_address,
            device_id=memory.device_id,
            first_head=layout.first_kv_head,
            num_heads=layout.num_kv_heads,
        )
        return describe(memory, [part])

    def connect(self, peer: str, pool: PoolInfo) -> None:
        """Find the peer by name."""
        if [part.agent_metadata for part in pool.parts] != [peer.encode()] or peer not in self._network.agents:
            raise TransferError(f"there is no agent {peer}")

    def forget(self, peer: str) -> None:
        """Nothing was prepared for it."""

    def write(self, peer: str, local_pages: list[int], remote_pages: list[int], tag: bytes) -> Write:
        """Copy at once, or do what the fault policy says."""
        target = self._network.agents.get(peer)
        if target is None:
            raise TransferError(f"there is no agent {peer}")
        data = self.pages[local_pages].clone()
        write = _LoopbackWrite(data.numel(), WriteState.IN_PROGRESS)

        def land() -> None:
            target.pages[remote_pages] = data
            target._arrivals.append((self.name, tag))
            write.state = WriteState.DONE

        match self._network.faults("write"):
            case Fault.NONE:
                land()
            case Fault.DUPLICATE:
                land()
                land()
            case Fault.DELAY:
                self._network.delay(land)
            case Fault.TRUNCATE:
                half = len(remote_pages) // 2
                target.pages[remote_pages[:half]] = data[:half]
                write.state = WriteState.FAILED
            case Fault.DROP:
                pass
        return write

    def poll(self, write: Write) -> WriteState:
        """The state that the write's landing, or the fault, has left."""
        assert isinstance(write, _LoopbackWrite)
        return write.state

    def arrivals(self) -> list[tuple[str, bytes]]:
        """Tags of landed writes."""
        arrived = list(self._arrivals)
        self._arrivals.clear()
        return arrived

    def close(self) -> None:
        """Be unknown."""
        del self._network.agents[self.name]


# ------------------------------------------------------------------------------------------------ control


class LoopbackLink(Generic[Inbound, Outbound]):
    """One end of a control connection inside the process; `address` is what the other end knows it by."""

    def __init__(
        self, address: str, peers: "dict[str, LoopbackLink[Outbound, Inbound]]", network: LoopbackNetwork
    ) -> None:
        self.address = address
        self.num_undecodable = 0
        self._peers = peers
        self._network = network
        self._inbox: deque[tuple[str, Inbound]] = deque()
        self._changes: list[tuple[str, bool]] = []
        self.dialed: list[str] = []

    def dial(self, peer: str) -> None:
        """Be connected at once, whether there is a peer or not."""
        self.dialed.append(peer)
        self._changes.append((peer, True))

    def changes(self) -> list[tuple[str, bool]]:
        """What `dial` and `lose` have done since the last call."""
        changes, self._changes = self._changes, []
        return changes

    def lose(self, peer: str) -> None:
        """Lose the connection to a peer, and make it again."""
        self._changes += [(peer, False), (peer, True)]

    def forget(self, peer: str) -> None:
        """Hang up."""
        self.dialed.remove(peer)

    def send(self, peer: str, message: Outbound) -> None:
        """Put the message into the peer's inbox, or do what the fault policy says; a missing peer loses it."""
        target = self._peers.get(peer)
        if target is None:
            return

        def deliver() -> None:
            target._inbox.append((self.address, message))

        match self._network.faults(type(message).__name__):
            case Fault.NONE:
                deliver()
            case Fault.DUPLICATE:
                deliver()
                deliver()
            case Fault.DELAY:
                self._network.delay(deliver)
            case Fault.TRUNCATE:
                target.num_undecodable += 1
            case Fault.DROP:
                pass

    def receive(self) -> list[tuple[str, Inbound]]:
        """All that has come."""
        received = list(self._inbox)
        self._inbox.clear()
        return received

    def wait(self, timeout_s: float) -> None:
        """Never sleeps: whoever drives a loopback decides when to turn."""

    def wake(self) -> None:
        """Nobody sleeps."""

    def close(self) -> None:
        """Nothing is open."""
