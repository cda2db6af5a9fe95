"""The prefill workers that a receiver knows: connected, greeted, and shown with every heartbeat that somebody waits.

    dialed --connection--> Hello --HelloReply--> paired --connection lost, or not known there--> Hello ...

It keeps who is at each address now, since when an answer is due, and which rooms are reserved. Of the others it knows none;
`receiver` asks it, and hears from it who has paired, whose connection was lost, and who is silent.

A worker of several attention groups listens at a port for each, one after the other. Its address is that of the first; that one
says how many there are, and then a request's first room says which has its prompt.
"""

import contextlib
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass

from common.errors import TransferError
from common.process import ProcessMark, is_gone
from common.ranks import Ranks
from transfer.endpoint import DialingLink
from transfer.messages import DecodeToPrefill, Goodbye, Heartbeat, HeartbeatReply, Hello, HelloReply, PrefillToDecode

log = logging.getLogger(__name__)

_FORGET_S = 600.0
"""After so long without a room, the connection to a prefill worker is closed."""
_MAX_SOURCES = 1024
_MAX_PORT = 2**16 - 1


@dataclass(slots=True, eq=False)
class Life:
    """One leader that was or is at an address, and its followers."""

    id: str
    processes: tuple[ProcessMark, ...]
    """Of the leader, and of the followers."""
    dp: int
    """Groups of its worker."""
    has_been_replaced: bool = False
    """Another one has its address, which it could not while this one lived."""

    def meet(self, successor: "Life") -> None:
        """Another one answers at its address.

        That is proof only if both listen in one network: an address may also move to another host or container, while the
        process that was there runs on. And it is none about followers, which listen nowhere; unless the processes are the same:
        they begin another life only when nothing of the one before is left.
        """
        old, new = self.processes[0], successor.processes[0]
        is_here = (old.boot_id, old.network_namespace) == (new.boot_id, new.network_namespace)
        self.has_been_replaced |= is_here and (len(self.processes) == 1 or self.processes == successor.processes)

    @property
    def is_gone(self) -> bool:
        """Whether it is proven that all that may write have ended."""
        return self.has_been_replaced or all(map(is_gone, self.processes))


@dataclass(slots=True, eq=False)
class Source:
    """One prefill worker, by its address."""

    address: str
    life: Life | None = None
    """Who is there; None until it has answered a `Hello`."""
    next_beat: float = 0.0
    answer_due_since: float = math.inf
    """When the first message was sent since the last word from there."""
    used_at: float = 0.0


@dataclass(slots=True)
class _Reservation:
    """A room that will be asked for when there is a seat."""

    address: str
    """Of the worker."""
    first_room: int
    source: Source
    """Who has the prompt, as far as is known."""


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
        self._reservations: dict[int, _Reservation] = {}

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

    def holder(self, address: str, first_room: int, now: float) -> Source:
        """Who has the prompt with this first room, of the worker at an address; the worker's first group until that has answered.

        Raises TransferError as `contact` does.
        """
        base = self.contact(address, now)
        if base.life is None:
            return base
        group = Ranks(tp=base.life.dp, dp=base.life.dp).group_of_room(first_room)
        return base if group == 0 else self.contact(_address_of_group(address, group), now)

    def reserve(self, room: int, address: str, first_room: int, now: float) -> None:
        """Keep a room's prompt until it is asked for. Raises TransferError as `contact` does."""
        self._reservations[room] = _Reservation(address, first_room, self.holder(address, first_room, now))

    def unreserve(self, room: int) -> None:
        """Let a room go that may be reserved."""
        self._reservations.pop(room, None)

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

    def on_hello_reply(self, source: Source, reply: HelloReply, now: float) -> Life:
        """Note who is there, and whose the rooms are that are reserved there; a source that refuses stays without a life."""
        life = Life(reply.peer, reply.processes, reply.dp)
        if reply.refusal is None:
            source.life = life
            for reservation in self._reservations.values():
                if reservation.source is source and reservation.address == source.address:
                    with contextlib.suppress(TransferError):
                        reservation.source = self.holder(reservation.address, reservation.first_room, now)
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
        reserved: dict[Source, list[int]] = {}
        for room, reservation in self._reservations.items():
            reserved.setdefault(reservation.source, []).append(room)
        for source in list(self._sources.values()):
            rooms = [*rooms_of.get(source, ()), *reserved.get(source, ())]
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

    def take_leave(self) -> None:
        """Let those that know this worker forget it at once, and its memory with it."""
        for source in self._sources.values():
            if source.life is not None:
                self._link.send(source.address, Goodbye())

    def _forget(self, source: Source) -> None:
        self._link.forget(source.address)
        del self._sources[source.address]


def _address_of_group(address: str, group: int) -> str:
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or int(port) + group > _MAX_PORT:
        raise TransferError(f"{address!r} has no group {group}")
    return f"{host}:{int(port) + group}"
