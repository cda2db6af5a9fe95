"""The decode side of KV transfers: offers its pages to the prefill worker that has the prompt, and waits for the KV.

For every `ReceiveKv` the engine hears either `KvArrived`, or `KvLost` followed, at once or later, by `PagesQuiet`. Between the
two the peer may still write into the pages: they are in quarantine, and only the peer's own word ends it (R11). KV has arrived
when the peer says that all writes have completed *and* the notification of each has been seen here.

It knows no engine and no NIXL: commands and events on one side, `TransferAgent` and `Link` on the other.
"""

import contextlib
import logging
from dataclasses import dataclass, field
from typing import assert_never

from msgspec import Struct

from common.errors import TransferError
from common.messages import (
    DecodeToPrefill,
    ErrorReport,
    FirstToken,
    Hello,
    HelloReply,
    KvAbort,
    KvClosed,
    KvDone,
    KvRequest,
    PoolInfo,
    PrefillToDecode,
)
from transfer.agent import TransferAgent
from transfer.config import TransferOptions
from transfer.endpoint import IDLE_WAIT_S, LANDING_WAIT_S, NAP_S, Link, Mailbox
from transfer.handshake import PROTOCOL
from transfer.plan import WriteTag
from transfer.state import ReceiverState, advance

log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------ commands and events


class ReceiveKv(Struct, frozen=True, kw_only=True):
    """Fetch a prompt's KV from the prefill worker at `source` (`host:port`) into these pages."""

    room: int
    source: str
    first_page: int = 0
    pages: list[int]
    prompt_tokens: int
    prompt_digest: bytes


class CancelKv(Struct, frozen=True):
    """The request is over. If its pages were offered, say when they are quiet; if not, let the prefill worker know at least."""

    room: int
    source: str


ReceiverCommand = ReceiveKv | CancelKv


class KvArrived(Struct, frozen=True, kw_only=True):
    """The prompt's KV is in the pages."""

    room: int
    first_token: FirstToken
    wait_seconds: float
    """From asking until all was here, the prefill's own time included."""
    write_seconds: float
    """How long at least one write was in progress."""
    exposed_seconds: float
    """How much of the transfer the request waited for: `KvDone.exposed_seconds`."""
    num_bytes: int


class KvLost(Struct, frozen=True):
    """The KV will not come. The pages are not safe yet."""

    room: int
    error: ErrorReport


class PagesQuiet(Struct, frozen=True):
    """Nobody will write into the room's pages any more. Last event of a room whose KV did not arrive."""

    room: int


ReceiverEvent = KvArrived | KvLost | PagesQuiet
ReceiverMailbox = Mailbox[ReceiverCommand, ReceiverEvent]


# ------------------------------------------------------------------------------------------------ the receiver


@dataclass(slots=True)
class _Room:
    source: str
    request: KvRequest
    asked_at: float
    deadline: float
    greeted_again: bool = False
    state: ReceiverState = ReceiverState.REQUESTED
    landed: set[int] = field(default_factory=set)
    """Serials of the writes whose notification is here."""
    done: KvDone | None = None

    @property
    def generation(self) -> int:
        """Tells this use of the room from any other."""
        return self.request.generation


class Receiver:
    """The rooms of one decode worker. Call it from one thread."""

    def __init__(
        self,
        agent: TransferAgent,
        link: Link[PrefillToDecode, DecodeToPrefill],
        mailbox: ReceiverMailbox,
        pool: PoolInfo,
        options: TransferOptions,
        *,
        peer_id: str,
        weight_version: str,
    ) -> None:
        self._agent = agent
        self._link = link
        self.mailbox = mailbox
        self._pool = pool
        self._options = options
        self._hello = Hello(
            peer=peer_id,
            protocol=PROTOCOL,
            agent_metadata=agent.metadata(),
            pool=pool,
            weight_version=weight_version,
        )
        self._greeted: set[str] = set()
        self._rooms: dict[int, _Room] = {}
        self._generation = 0
        self._now = 0.0
        self.num_writes = 0
        self.num_bytes = 0
        self.num_dropped = 0

    @property
    def num_rooms(self) -> int:
        """Rooms that are neither arrived nor quiet."""
        return len(self._rooms)

    def turn(self, now: float) -> None:
        """Handle what is due: commands, notifications, messages, deadlines."""
        self._now = now
        for command in self.mailbox.commands():
            match command:
                case ReceiveKv():
                    self._request(command)
                case CancelKv():
                    self._cancel(command)
                case _:
                    assert_never(command)
        if self._rooms:
            for _, tag in self._agent.arrivals():
                self._on_landed(tag)
        for source, message in self._link.receive():
            self._on_message(source, message)
        for room_id, room in list(self._rooms.items()):
            if room.state is ReceiverState.REQUESTED and now >= room.deadline:
                waited = f"the KV of the prompt did not arrive within {self._options.transfer_deadline_s:g} s"
                self._lose(room_id, room, status=504, message=waited)
                self._send_abort(room_id, room)

    def wait(self) -> None:
        """Sleep until there may be something to do."""
        open_rooms = [room for room in self._rooms.values() if room.state is ReceiverState.REQUESTED]
        if any(room.done is not None for room in open_rooms):
            self._link.wait(NAP_S)  # all is written, and only notifications are outstanding
        else:
            self._link.wait(LANDING_WAIT_S if open_rooms else IDLE_WAIT_S)

    def close(self) -> None:
        """Close the control sockets."""
        self._link.close()

    # -------------------------------------------------------------------------------------------- own engine

    def _request(self, command: ReceiveKv) -> None:
        assert command.room not in self._rooms, "the engine asks once for a room"
        self._generation += 1
        request = KvRequest(
            room=command.room,
            generation=self._generation,
            first_page=command.first_page,
            pages=command.pages,
            prompt_tokens=command.prompt_tokens,
            prompt_digest=command.prompt_digest,
        )
        room = self._rooms[command.room] = _Room(
            source=command.source,
            request=request,
            asked_at=self._now,
            deadline=self._now + self._options.transfer_deadline_s,
        )
        try:
            if command.source not in self._greeted:
                self._link.send(command.source, self._hello)
                self._greeted.add(command.source)
            self._link.send(command.source, request)
        except TransferError as error:
            self._lose(command.room, room, status=400, message=str(error))
            self._close(command.room, room)

    def _cancel(self, command: CancelKv) -> None:
        room = self._rooms.get(command.room)
        if room is None:
            # Never asked for, or just arrived: nobody waits for an answer, and a wrong address has no one to tell.
            with contextlib.suppress(TransferError):
                self._link.send(command.source, KvAbort(room=command.room, generation=0))
        elif room.state is ReceiverState.REQUESTED:
            room.state = advance(room.state, ReceiverState.ABORTING)
            self._send_abort(command.room, room)

    def _send_abort(self, room_id: int, room: _Room) -> None:
        self._link.send(room.source, KvAbort(room=room_id, generation=room.generation))

    # -------------------------------------------------------------------------------------------- peers

    def _on_landed(self, data: bytes) -> None:
        tag = WriteTag.decode(data)
        room = self._rooms.get(tag.room) if tag is not None else None
        if tag is None or room is None or room.generation != tag.generation:
            self.num_dropped += 1
            return
        room.landed.add(tag.serial)
        self._check_arrived(tag.room, room)

    def _on_message(self, source: str, message: PrefillToDecode) -> None:
        match message:
            case HelloReply():
                if message.refusal is not None:
                    log.error("prefill worker %s refuses this worker: %s", message.peer, message.refusal)
            case KvDone() | KvClosed():
                room = self._rooms.get(message.room)
                if room is None or room.generation != message.generation or room.source != source:
                    self.num_dropped += 1
                elif isinstance(message, KvDone):
                    self._on_done(message, room)
                else:
                    self._on_closed(message, room)
            case _:
                assert_never(message)

    def _on_done(self, message: KvDone, room: _Room) -> None:
        if room.state is ReceiverState.ABORTING:
            self._close(message.room, room)  # all writes have completed, which is what an abort waits for
        else:
            room.done = message
            self._check_arrived(message.room, room)

    def _on_closed(self, message: KvClosed, room: _Room) -> None:
        if room.state is ReceiverState.REQUESTED and message.stage == "handshake" and not room.greeted_again:
            # The prefill worker at this address has been restarted: it has never heard of this worker.
            room.greeted_again = True
            self._link.send(room.source, self._hello)
            self._link.send(room.source, room.request)
            return
        if room.state is ReceiverState.REQUESTED:
            self._lose(message.room, room, status=502, message=message.error or "the prefill worker closed the room")
        self._close(message.room, room)

    def _check_arrived(self, room_id: int, room: _Room) -> None:
        if room.done is None or len(room.landed) < room.done.num_writes or room.state is not ReceiverState.REQUESTED:
            return
        room.state = advance(room.state, ReceiverState.ARRIVED)
        del self._rooms[room_id]
        num_bytes = len(room.request.pages) * self._pool.page_bytes
        self.num_writes += room.done.num_writes
        self.num_bytes += num_bytes
        arrived = KvArrived(
            room=room_id,
            first_token=room.done.first_token,
            wait_seconds=self._now - room.asked_at,
            write_seconds=room.done.write_seconds,
            exposed_seconds=room.done.exposed_seconds,
            num_bytes=num_bytes,
        )
        self.mailbox.emit(arrived)

    def _lose(self, room_id: int, room: _Room, *, status: int, message: str) -> None:
        room.state = advance(room.state, ReceiverState.ABORTING)
        code = {400: "invalid_request", 504: "deadline_exceeded"}.get(status, "leg_failed")
        error = ErrorReport(status=status, message=message, code=code, leg="decode", stage="transfer")
        self.mailbox.emit(KvLost(room_id, error))

    def _close(self, room_id: int, room: _Room) -> None:
        room.state = advance(room.state, ReceiverState.CLOSED)
        del self._rooms[room_id]
        self.mailbox.emit(PagesQuiet(room_id))
