"""The decode workers that a sender knows: where their pages are, when each was last heard of, and which of them are gone.

A worker that is silent has lost what it asked for, but may come back; one that is gone is forgotten. It knows no room.
Neighbour: `sender`.
"""

import logging
from dataclasses import dataclass

from common.errors import TransferError
from common.process import is_gone
from transfer.agent import TransferAgent
from transfer.handshake import refusal_of
from transfer.messages import Hello, PoolInfo

log = logging.getLogger(__name__)

_MAX_PEERS = 1024
_FORGET_S = 3600.0
"""A worker elsewhere cannot be proven to be gone; after so much silence it is forgotten, and greets again if it is there."""


@dataclass(slots=True)
class Peer:
    """One life of a decode worker."""

    pool: PoolInfo
    heard_at: float
    has_left: bool = False
    """It has said so: nobody is behind this id any more."""

    @property
    def is_gone(self) -> bool:
        """Whether it has left, or all of its ranks are proven to have ended."""
        return self.has_left or all(is_gone(part.process) for part in self.pool.parts)

    @property
    def agents(self) -> set[str]:
        """What its ranks' agents are called."""
        return {part.agent for part in self.pool.parts}


class Peers:
    """All decode workers with a handshake, by their ids, and those that were refused one."""

    def __init__(self, agent: TransferAgent, silence_s: float) -> None:
        self._agent = agent
        self._pool = agent.pool()
        self._silence_s = silence_s
        self._peers: dict[str, Peer] = {}
        self._refusals: dict[str, str] = {}

    def get(self, peer: str) -> Peer | None:
        """The worker with this id, if it has a handshake."""
        return self._peers.get(peer)

    def refusal(self, peer: str) -> str | None:
        """Why the worker with this id was refused, if it was."""
        return self._refusals.get(peer)

    def heard(self, peer: str, now: float) -> None:
        """Any message came from it."""
        if (known := self._peers.get(peer)) is not None:
            known.heard_at = now

    def leave(self, peer: str) -> None:
        """A worker has said that it is going."""
        if (known := self._peers.get(peer)) is not None:
            known.has_left = True

    def greet(self, peer: str, hello: Hello, now: float) -> str | None:
        """Take a worker in, or say why not."""
        refusal = self._greet(peer, hello, now)
        if refusal is None:
            self._refusals.pop(peer, None)
        else:
            log.error("refused decode worker %s: %s", peer, refusal)
            if len(self._refusals) < _MAX_PEERS:
                self._refusals[peer] = refusal
        return refusal

    def _greet(self, peer: str, hello: Hello, now: float) -> str | None:
        if hello.peer != peer:
            return f"it calls itself {hello.peer} and connects as {peer}"
        refusal = refusal_of(hello, self._pool)
        if refusal is None and peer not in self._peers and len(self._peers) >= _MAX_PEERS:
            refusal = f"{_MAX_PEERS} decode workers are known already"
        if refusal is None and peer in self._peers and self._peers[peer].pool != hello.pool:
            refusal = "its pages are not where they were"  # what is prepared for it are the addresses from before
        agents = {part.agent for part in hello.pool.parts}
        if refusal is None and any(agents & known.agents for other, known in self._peers.items() if other != peer):
            refusal = "an agent of it is another worker's"
        if refusal is not None:
            return refusal
        try:
            self._agent.connect(peer, hello.pool)
        except TransferError as error:
            return str(error)
        self._peers[peer] = Peer(hello.pool, now)
        return None

    def lost(self, now: float) -> dict[str, str]:
        """Which workers are gone or silent, and how that is known."""
        reasons: dict[str, str] = {}
        for peer, known in self._peers.items():
            if known.is_gone:
                reasons[peer] = "the decode worker has left" if known.has_left else "the decode worker has died"
            elif now - known.heard_at > self._silence_s:
                reasons[peer] = f"the decode worker has been silent for {self._silence_s:g} s"
        return reasons

    def forget(self, now: float, in_use: set[str]) -> None:
        """Forget the workers that are gone and have no room any more."""
        gone = {peer for peer, known in self._peers.items() if now - known.heard_at > _FORGET_S or known.is_gone}
        for peer in gone - in_use:
            del self._peers[peer]
            self._agent.forget(peer)
