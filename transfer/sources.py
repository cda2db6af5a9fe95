"""The prefill workers that a receiver knows: connected, greeted, and shown with every heartbeat that somebody waits.

    dialed --connection--> Hello --HelloReply--> paired --connection lost, or not known there--> Hello ...

It keeps who is at each address now, and since when an answer is due. It knows no room; `receiver` asks it, and hears from it
who has paired, whose connection was lost, and who is silent.
"""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from common.errors import TransferError
from common.messages import DecodeToPrefill, Heartbeat, HeartbeatReply, Hello, HelloReply, PrefillToDecode, ProcessMark
from common.process import is_gone
from transfer.endpoint import DialingLink

log = logging.getLogger(__name__)

_FORGET_S = 600.0
"""After so long without a room, the connection to a prefill worker is closed."""
_MAX_SOURCES = 1024


@dataclass(slots=True, eq=False)
class Life:
    """One process that was or is at an address."""

    id: str
    process: ProcessMark
    has_been_replaced: bool = False
    """Another process has its address, which it could not while this one lived."""

    def meet(self, successor: "Life") -> None:
        """Another process answers at its address.

        That is proof only if both listen in one network: an address may also move to another host or container, while the
        process that was there runs on.
        """
        old, new = self.process, successor.process
        self.has_been_replaced |= (old.boot_id, old.network_namespace) == (new.boot_id, new.network_namespace)

    @property
    def is_gone(self) -> bool:
        """Whether it is proven that it has ended."""
        return self.has_been_replaced or is_gone(self.process)


@dataclass(slots=True, eq=False)
class Source:
    """One prefill worker, by its address."""

    address: str
    life: Life | None = None
    """Who is there; None until it has answered a `Hello`."""
    reserved: set[int] = field(default_factory=set)
    """Rooms that will be asked for when there is a seat."""
    next_beat: float = 0.0
    answer_due_since: float = math.inf
    """When the first message was sent since the last word from there."""
    used_at: float = 0.0


class Sources:
    """All prefill workers, by address."""

    def __init__(
        self, link: DialingLink[PrefillToDecode, DecodeToPrefill], hello: Hello, *, heartbeat_s: float, silence_s: float
    ) -> None:
        self.hello = hello
        self._link = link
        self._heartbeat_s = heartbeat_s
        self._silence_s = silence_s
        self._sources: dict[str, Source] = {}

    def contact(self, address: str, now: float) -> Source:
        """The source at an address, which is dialed if it is new. Raises TransferError if this cannot be one."""
        source = self._sources.get(address)
        if source is None:
            if len(self._sources) >= _MAX_SOURCES:
                raise TransferError(f"{_MAX_SOURCES} prefill workers are known already")
            self._link.dial(address)
            source = self._sources[address] = Source(address, answer_due_since=now, next_beat=now + self._heartbeat_s)
        source.used_at = now
        return source

    def connected(self, now: float) -> list[Source]:
        """Greet whoever is behind a new connection; returns the sources whose connection was lost."""
        lost: list[Source] = []
        for address, is_connected in self._link.changes():
            source = self._sources.get(address)
            if source is None:
                continue
            if is_connected:
                self.greet(source, now)
            elif source.life is not None:
                source.life = None
                lost.append(source)
        return lost

    def greet(self, source: Source, now: float) -> None:
        """Ask who is there; until the answer comes, nobody is."""
        source.life = None
        source.answer_due_since = min(source.answer_due_since, now)
        self._link.send(source.address, self.hello)

    def heard(self, address: str) -> Source | None:
        """The source at an address, from which a message has come; None if nobody is known there."""
        source = self._sources.get(address)
        if source is not None:
            source.answer_due_since = math.inf
        return source

    def on_hello_reply(self, source: Source, reply: HelloReply) -> Life:
        """Note who is there; a source that refuses stays without a life."""
        life = Life(reply.peer, reply.process)
        if reply.refusal is None:
            source.life = life
        else:
            log.error("prefill worker %s at %s refuses this worker: %s", reply.peer, source.address, reply.refusal)
        return life

    def on_heartbeat_reply(self, source: Source, reply: HeartbeatReply, now: float) -> None:
        """Greet whoever does not know this worker, or is not who was there."""
        if source.life is not None and (reply.peer != source.life.id or not reply.is_paired):
            self.greet(source, now)

    def is_silent(self, source: Source, now: float) -> bool:
        """Whether an answer has been due for too long."""
        return now - source.answer_due_since > self._silence_s

    def beat(self, rooms_of: dict[Source, list[int]], now: float) -> Iterable[Source]:
        """Send the heartbeats that are due, for those with rooms or reservations; gives the sources that it has sent one to."""
        for source in list(self._sources.values()):
            rooms = [*rooms_of.get(source, ()), *source.reserved]
            if source not in rooms_of and not rooms:
                # What is not asked needs not answer.
                source.answer_due_since = math.inf
                if now - source.used_at > _FORGET_S:
                    self._forget(source)
                continue
            source.used_at = now
            if now < source.next_beat:
                continue
            source.next_beat = now + self._heartbeat_s
            source.answer_due_since = min(source.answer_due_since, now)
            if source.life is not None:
                self._link.send(source.address, Heartbeat(rooms))
            else:
                self.greet(source, now)
            yield source

    def _forget(self, source: Source) -> None:
        self._link.forget(source.address)
        del self._sources[source.address]
