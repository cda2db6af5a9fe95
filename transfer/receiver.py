"""The decode side of KV transfers: offers its pages to the prefill worker that has the prompt, and waits for the KV.

For every `ReceiveKv` the engine hears either `KvArrived`, or `KvLost` followed, at once or later, by `PagesQuiet`. Between the
two the peer may still write into the pages: they are in quarantine, until the peer's own word or the proof that its process
has ended (R11). The abort is sent again and again until then. KV has arrived when the peer says that all writes have completed
*and* the notification of each has been seen here.

A room is lost when its deadline passes, when its peer closes it, has ended or falls silent, or when the connection is lost.
It knows no engine and no NIXL: commands and events on one side, `TransferAgent` and `Link` on the other. Neighbour: `sources`
(the prefill workers).
"""

import contextlib
import logging
from dataclasses import dataclass, field
from typing import assert_never

from common.errors import TransferError
from common.messages import ErrorReport, Leg
from transfer.agent import TransferAgent
from transfer.commands import CancelKv, KvArrived, KvLost, PagesQuiet, ReceiveKv, ReceiverMailbox, ReserveKv
from transfer.config import TransferOptions
from transfer.endpoint import IDLE_WAIT_S, LANDING_WAIT_S, NAP_S, WATCH_S, DialingLink, TransferCounts
from transfer.handshake import is_sound
from transfer.messages import (
    PROTOCOL,
    DecodeToPrefill,
    HeartbeatReply,
    Hello,
    HelloReply,
    KvAbort,
    KvClosed,
    KvDone,
    KvRequest,
    PrefillToDecode,
    RoomCode,
)
from transfer.plan import WriteTag
from transfer.sources import Life, Source, Sources
from transfer.state import ReceiverState, advance

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Room:
    command: ReceiveKv
    generation: int
    """Tells this use of the room from any other."""
    asked_at: float
    deadline: float
    source: Source | None = None
    """Who has the prompt, as far as is known; None if the command names no address."""
    life: Life | None = None
    """Who has been asked, and may write from then on."""
    greeted_again: bool = False
    state: ReceiverState = ReceiverState.REQUESTED
    code: RoomCode = "leg_failed"
    """What its end is called on the other side if this one gives it up."""
    landed: set[int] = field(default_factory=set)
    """Serials of the writes whose notification is here."""
    done: KvDone | None = None


class Receiver:
    """The rooms of one attention group of a decode worker. Call it from one thread."""

    def __init__(
        self,
        agent: TransferAgent,
        link: DialingLink[PrefillToDecode, DecodeToPrefill],
        mailbox: ReceiverMailbox,
        options: TransferOptions,
        *,
        peer_id: str,
        counts: TransferCounts | None = None,
    ) -> None:
        """`counts` goes on from what others have counted in it."""
        self._agent = agent
        self._link = link
        self.mailbox = mailbox
        mailbox.attach(link.wake)
        self.counts = counts or TransferCounts()
        self._pool = agent.pool()
        self._options = options
        hello = Hello(peer=peer_id, protocol=PROTOCOL, pool=self._pool)
        self.sources = Sources(link, hello, heartbeat_s=options.heartbeat_s, silence_s=options.peer_deadline_s)
        self._rooms: dict[int, _Room] = {}
        self._generation = 0
        self._now = 0.0
        self._next_watch = 0.0

    @property
    def num_rooms(self) -> int:
        """Rooms that are neither arrived nor quiet."""
        return len(self._rooms)

    def turn(self, now: float) -> None:
        """Handle what is due: commands, notifications, messages, deadlines."""
        self._now = now
        for command in self.mailbox.commands():
            match command:
                case ReserveKv():
                    self._reserve(command)
                case ReceiveKv():
                    self._request(command)
                case CancelKv():
                    self._cancel(command)
                case _:
                    assert_never(command)
        if self._rooms:
            for peer, tag in self._agent.arrivals():
                self._on_landed(peer, tag)
        for source in self.sources.connected(now):
            self._lose_all(source, f"the connection to the prefill worker at {source.address} was lost")
        for address, message in self._link.receive():
            self._on_message(address, message)
        if now >= self._next_watch:
            self._watch()
        self.counts.num_rooms = len(self._rooms)

    def wait(self) -> None:
        """Sleep until there may be something to do."""
        open_rooms = [room for room in self._rooms.values() if room.state is ReceiverState.REQUESTED]
        if any(room.done is not None for room in open_rooms):
            self._link.wait(NAP_S)  # all is written, and only notifications are outstanding
        else:
            self._link.wait(LANDING_WAIT_S if open_rooms else IDLE_WAIT_S)

    def close(self) -> bool:
        """Take leave of the prefill workers, and close agent and control sockets."""
        self.sources.take_leave()
        self.mailbox.attach(None)
        self.counts.num_rooms = 0
        self._agent.close()
        self._link.close()
        return True

    # -------------------------------------------------------------------------------------------- own engine

    def _reserve(self, command: ReserveKv) -> None:
        with contextlib.suppress(TransferError):  # a wrong address fails the request when it is asked
            self.sources.reserve(command.room, command.source, command.first_room, self._now)

    def _request(self, command: ReceiveKv) -> None:
        assert command.room not in self._rooms, "the engine asks once for a room"
        self._generation += 1
        deadline = self._now + self._options.transfer_deadline_s
        room = self._rooms[command.room] = _Room(command, self._generation, self._now, deadline)
        self.sources.unreserve(command.room)
        self._ask(room)

    def _ask(self, room: _Room) -> None:
        """Ask whoever has the prompt, if that one has answered yet."""
        command = room.command
        if room.source is None or room.source.address == command.source:
            try:
                room.source = self.sources.holder(command.source, command.first_room, self._now)
            except TransferError as error:
                self._lose(room, str(error), status=400, leg="decode")
                return
        if room.source.life is None:
            return
        room.life = room.source.life
        request = KvRequest(
            to=room.life.id,
            room=command.room,
            generation=room.generation,
            first_page=command.first_page,
            pages=command.pages,
            prompt_tokens=command.prompt_tokens,
            prompt_digest=command.prompt_digest,
        )
        self._link.send(room.source.address, request)

    def _cancel(self, command: CancelKv) -> None:
        room = self._rooms.get(command.room)
        if room is not None:
            if room.state is ReceiverState.REQUESTED:
                room.state = advance(room.state, ReceiverState.ABORTING)
                room.code = command.code
                self._send_abort(room)
            return
        self.sources.unreserve(command.room)
        # Never asked for, or just arrived: nobody waits for an answer, and a wrong address has no one to tell.
        with contextlib.suppress(TransferError):
            source = self.sources.holder(command.source, command.first_room, self._now)
            self._link.send(source.address, KvAbort(to="", room=command.room, generation=0, code=command.code))

    def _send_abort(self, room: _Room) -> None:
        """Tell whoever was asked; if nobody was, nobody can write."""
        assert room.source is not None
        if room.life is None:
            abort = KvAbort(to="", room=room.command.room, generation=0, code=room.code)
            self._link.send(room.source.address, abort)
            self._close(room)
        else:
            abort = KvAbort(to=room.life.id, room=room.command.room, generation=room.generation, code=room.code)
            self._link.send(room.source.address, abort)

    # -------------------------------------------------------------------------------------------- peers

    def _on_landed(self, peer: str, data: bytes) -> None:
        tag = WriteTag.decode(data)
        room = self._rooms.get(tag.room) if tag is not None else None
        if (
            tag is None
            or room is None
            or room.generation != tag.generation
            or room.life is None
            or room.life.id != peer
        ):
            self.counts.num_dropped += 1
            return
        room.landed.add(tag.serial)
        self._check_arrived(room)

    def _on_message(self, address: str, message: PrefillToDecode) -> None:
        source = self.sources.heard(address)
        if source is None:
            self.counts.num_dropped += 1
            return
        match message:
            case HelloReply() if not is_sound(message):
                self.counts.num_dropped += 1
            case HelloReply():
                self._on_hello_reply(source, message)
            case HeartbeatReply():
                self.sources.on_heartbeat_reply(source, message, self._now)
            case KvDone() | KvClosed():
                room = self._rooms.get(message.room)
                # Whoever is at the address now can speak for nobody who was there before.
                if room is None or room.generation != message.generation or not self._speaks_for(source, room):
                    self.counts.num_dropped += 1
                elif isinstance(message, KvDone):
                    self._on_done(message, room)
                else:
                    self._on_closed(message, room)
            case _:
                assert_never(message)

    def _speaks_for(self, source: Source, room: _Room) -> bool:
        return (
            room.source is source
            and room.life is not None
            and source.life is not None
            and (room.life.id == source.life.id)
        )

    def _on_hello_reply(self, source: Source, reply: HelloReply) -> None:
        life = self.sources.on_hello_reply(source, reply, self._now)
        for room in self._rooms_at(source):
            if room.life is None:
                if reply.refusal is not None:
                    self._lose(room, reply.refusal or "the prefill worker refuses this one", leg="decode")
                else:
                    self._ask(room)
            elif room.life.id != life.id:
                room.life.meet(life)
                if room.state is ReceiverState.REQUESTED:
                    self._lose(room, f"the prefill worker at {source.address} has been restarted")
        self._release_gone()

    def _on_done(self, message: KvDone, room: _Room) -> None:
        if room.state is ReceiverState.ABORTING:
            self._close(room)  # all writes have completed, which is what an abort waits for
        else:
            room.done = message
            self._check_arrived(room)

    def _on_closed(self, message: KvClosed, room: _Room) -> None:
        assert room.source is not None
        if room.state is ReceiverState.REQUESTED and message.stage == "handshake" and not room.greeted_again:
            # It does not know this worker, and so will not write.
            room.greeted_again, room.life = True, None
            self.sources.greet(room.source, self._now)
            return
        if room.state is ReceiverState.REQUESTED:
            room.state = advance(room.state, ReceiverState.ABORTING)
            reason = message.error or "the prefill worker closed the room"
            self._report(room, reason, status=502, code=message.code, leg=message.leg)
        self._close(room)

    def _check_arrived(self, room: _Room) -> None:
        if room.done is None or len(room.landed) < room.done.num_writes or room.state is not ReceiverState.REQUESTED:
            return
        room.state = advance(room.state, ReceiverState.ARRIVED)
        del self._rooms[room.command.room]
        num_bytes = len(room.command.pages) * self._pool.page_bytes
        self.counts.num_writes += room.done.num_writes
        self.counts.num_bytes += num_bytes
        arrived = KvArrived(
            room=room.command.room,
            first_token=room.done.first_token,
            prompt_versions=room.done.prompt_versions,
            wait_seconds=self._now - room.asked_at,
            write_seconds=room.done.write_seconds,
            exposed_seconds=room.done.exposed_seconds,
            num_bytes=num_bytes,
        )
        self.mailbox.emit(arrived)

    # -------------------------------------------------------------------------------------------- losses

    def _watch(self) -> None:
        """Look for rooms whose time is up or whose peer has ended, and keep the prefill workers informed."""
        self._next_watch = self._now + WATCH_S
        rooms_of: dict[Source, list[_Room]] = {}
        for room in list(self._rooms.values()):
            if room.state is ReceiverState.REQUESTED and self._now >= room.deadline:
                waited = f"the KV of the prompt did not arrive within {self._options.transfer_deadline_s:g} s"
                self._lose(room, waited, status=504)
            elif room.source is not None:
                rooms_of.setdefault(room.source, []).append(room)
        for source in rooms_of:
            if self.sources.is_silent(source, self._now):
                silence = (
                    f"the prefill worker at {source.address} has been silent for {self._options.peer_deadline_s:g} s"
                )
                self._lose_all(source, silence)
        self._release_gone()
        wanted = {
            source: [room.command.room for room in rooms if room.state is ReceiverState.REQUESTED]
            for source, rooms in rooms_of.items()
        }
        for source in self.sources.beat(wanted, self._now):
            for room in self._rooms_at(source):
                if room.state is ReceiverState.ABORTING:
                    self._send_abort(room)

    def _release_gone(self) -> None:
        """Nobody writes for a process that has ended."""
        lives = {room.life for room in self._rooms.values() if room.life is not None}
        gone = {life for life in lives if life.is_gone}
        for room in [room for room in self._rooms.values() if room.life in gone]:
            if room.state is ReceiverState.REQUESTED:
                self._lose(room, "the prefill worker has died")
            else:
                self._close(room)

    def _rooms_at(self, source: Source) -> list[_Room]:
        return [room for room in self._rooms.values() if room.source is source]

    def _lose_all(self, source: Source, message: str) -> None:
        for room in self._rooms_at(source):
            if room.state is ReceiverState.REQUESTED:
                self._lose(room, message)

    def _lose(self, room: _Room, message: str, *, status: int = 502, leg: Leg = "prefill") -> None:
        """The KV will not come: say so, and have whoever may still write stop."""
        room.state = advance(room.state, ReceiverState.ABORTING)
        code = {400: "invalid_request", 504: "deadline_exceeded"}.get(status, "leg_failed")
        self._report(room, message, status=status, code=code, leg=leg)
        if room.source is None or (room.life is not None and room.life.is_gone):
            self._close(room)
        else:
            self._send_abort(room)

    def _report(self, room: _Room, message: str, *, status: int, code: str, leg: Leg) -> None:
        error = ErrorReport(status=status, message=message, code=code, leg=leg, stage="transfer")
        self.mailbox.emit(KvLost(room.command.room, error))

    def _close(self, room: _Room) -> None:
        room.state = advance(room.state, ReceiverState.CLOSED)
        del self._rooms[room.command.room]
        self.mailbox.emit(PagesQuiet(room.command.room))
