"""The prefill side of KV transfers: writes each prompt's pages into the peer's, chunk by chunk as they are computed.

Two facts open a room, in either order: the own engine has the prompt (`OpenRoom`), and a decode worker wants it (`KvRequest`).
From then on every page that `PagesReady` reports is written; `FinishRoom` brings the first token, and when the last write has
completed the peer is told. A room ends with exactly one `RoomClosed` to the engine (if it had opened it) and one `KvDone` or
`KvClosed` to the peer (if it had asked), both only after every posted write has completed: that is what makes pages safe to
reuse on either side (R11).

A chunk's pages are written while the next chunk is computed: the engine reports them when the chunk's step has settled, and
with overlap the next step runs by then. So a request waits for the last chunk's write alone, and then for one message: `KvDone`
says that all is written and brings the first token, and is not answered. The peer asks as soon as it has a seat, which is before
the prefill has ended unless the peer is full. Until then its heartbeats keep the prompt's lease. The rooms of a peer that has
died, or been silent for too long, are given up.

It knows no engine and no NIXL: commands and events on one side, `TransferAgent` and `Link` on the other. Neighbours:
`outgoing` (one room), `tombstones` (those that have closed), `peers` (the decode workers).
"""

import logging
import math
import time
from collections.abc import Callable
from typing import assert_never

from common.errors import TransferError
from common.ids import MAX_ROOM
from common.memory.layout import num_pages_for
from common.messages import Leg
from transfer.agent import TransferAgent
from transfer.commands import CancelRoom, FinishRoom, OpenRoom, PagesReady, RoomClosed, SenderCommand, SenderMailbox
from transfer.config import TransferOptions
from transfer.endpoint import IDLE_WAIT_S, NAP_S, WATCH_S, Link, TransferCounts
from transfer.messages import (
    DecodeToPrefill,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    HelloReply,
    KvAbort,
    KvClosed,
    KvRequest,
    PrefillToDecode,
)
from transfer.outgoing import OutgoingRoom
from transfer.peers import Peer, Peers
from transfer.plan import MAX_GENERATION
from transfer.state import SenderState, advance
from transfer.tombstones import Tombstones

log = logging.getLogger(__name__)

_GIVEN_UP = "the decode side has given this room up"
_CLOSING_S = 5.0
"""Longest wait for posted writes when the process ends."""
_MAX_ROOMS = 2**18


class Sender:
    """The rooms of one attention group of a prefill worker, which has `dp` of them. Call it from one thread."""

    def __init__(
        self,
        agent: TransferAgent,
        link: Link[DecodeToPrefill, PrefillToDecode],
        mailbox: SenderMailbox,
        options: TransferOptions,
        *,
        peer_id: str,
        dp: int = 1,
        counts: TransferCounts | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`counts` goes on from what others have counted in it."""
        self._agent = agent
        self._link = link
        self.mailbox = mailbox
        mailbox.attach(link.wake)
        self.counts = counts or TransferCounts()
        self._options = options
        self._peer_id = peer_id
        self._processes = tuple(part.process for part in agent.pool().parts)
        self._dp = dp
        self._clock = clock
        self._peers = Peers(agent, options.peer_deadline_s)
        self._rooms: dict[int, OutgoingRoom] = {}
        # For longer than any lease.
        self._tombstones = Tombstones(2 * max(options.lease_s, options.transfer_deadline_s))
        self._now = 0.0
        self._next_watch = 0.0

    @property
    def num_rooms(self) -> int:
        """Rooms that are not closed yet."""
        return len(self._rooms)

    def turn(self, now: float) -> None:
        """Handle what is due: commands, messages, finished writes, deadlines."""
        self._now = now
        for command in self.mailbox.commands():
            self._on_command(command)
        for peer, message in self._link.receive():
            self._on_message(peer, message)
        if now >= self._next_watch:
            self._watch()
        for room in list(self._rooms.values()):
            self._progress(room)
            if now >= room.deadline:
                self._on_deadline(room)
        self._tombstones.expire(now)
        self.counts.num_rooms = len(self._rooms)

    def wait(self) -> None:
        """Sleep until there may be something to do."""
        writing = any(room.in_progress for room in self._rooms.values())
        self._link.wait(NAP_S if writing else IDLE_WAIT_S)

    def close(self) -> bool:
        """Wait for the writes that are in progress, and close agent and control sockets.

        A peer takes whoever answers next at this address as the proof that this one writes no more. So if writes are left,
        nothing is closed but by the end of the process.
        """
        deadline = time.monotonic() + _CLOSING_S
        while any(room.in_progress for room in self._rooms.values()):
            if time.monotonic() > deadline:
                return False
            for room in self._rooms.values():
                room.look(self._agent, self._clock())
            time.sleep(NAP_S)
        self.mailbox.attach(None)
        self.counts.num_rooms = 0
        self._agent.close()
        self._link.close()
        return True

    # -------------------------------------------------------------------------------------------- own engine

    def _on_command(self, command: SenderCommand) -> None:
        room = self._rooms.get(command.room)
        match command:
            case OpenRoom():
                self._open(command, room)
            case CancelRoom() if room is not None:
                self._drain(room, command.error, code=command.code, leg="prefill")
            case PagesReady() if room is not None:
                room.ready_pages += command.pages
            case FinishRoom() if room is not None:
                room.finished = command
                room.deadline = self._now + self._options.lease_s
            case _:
                self.counts.num_dropped += 1  # the room has closed meanwhile, and the engine will hear of it

    def _open(self, command: OpenRoom, room: OutgoingRoom | None) -> None:
        if (code := self._tombstones.code_of(command.room)) is not None:
            self.mailbox.emit(RoomClosed(command.room, _GIVEN_UP, code=code))
        elif room is None:
            self._rooms[command.room] = OutgoingRoom(command.room, SenderState.OFFERED, opened=command)
        elif room.opened is None:
            room.opened, room.deadline = command, math.inf
            self._match(room)
        else:
            self.mailbox.emit(RoomClosed(command.room, "this room is in use by another request"))

    # -------------------------------------------------------------------------------------------- peers

    def _on_message(self, peer: str, message: DecodeToPrefill) -> None:
        self._peers.heard(peer, self._now)
        match message:
            case Hello():
                refusal = self._peers.greet(peer, message, self._now)
                reply = HelloReply(peer=self._peer_id, processes=self._processes, dp=self._dp, refusal=refusal)
                self._link.send(peer, reply)
            case Heartbeat():
                self._renew(peer, message)
                self._answer_heartbeat(peer)
            case KvRequest() | KvAbort() if message.to != self._peer_id and message.generation > 0:
                self.counts.num_dropped += 1  # it is for a process that was here before
                self._answer_heartbeat(peer)
            case KvRequest():
                self._ask(peer, message)
            case KvAbort():
                self._abort(peer, message)
            case Goodbye():
                self._peers.leave(peer)
            case _:
                assert_never(message)

    def _answer_heartbeat(self, peer: str) -> None:
        is_paired = self._peers.get(peer) is not None
        self._link.send(peer, HeartbeatReply(peer=self._peer_id, is_paired=is_paired))

    def _renew(self, peer: str, heartbeat: Heartbeat) -> None:
        """The peer still wants these: prompts that wait for it keep their leases."""
        if self._peers.get(peer) is None:
            return
        for room_id in heartbeat.rooms:
            room = self._rooms.get(room_id)
            if room is not None and room.state is SenderState.OFFERED and room.peer in (None, peer):
                room.peer = peer
                if room.finished is not None:
                    room.deadline = self._now + self._options.lease_s

    def _watch(self) -> None:
        """Give up the rooms of peers that have died or fallen silent."""
        self._next_watch = self._now + WATCH_S
        lost = self._peers.lost(self._now)
        if not lost:
            return
        for room in list(self._rooms.values()):
            if room.peer in lost and room.state is not SenderState.DRAINING:
                self._drain(room, lost[room.peer])
        self._peers.forget(self._now, {room.peer for room in self._rooms.values() if room.peer is not None})

    def _ask(self, peer: str, request: KvRequest) -> None:
        room, known = self._rooms.get(request.room), self._peers.get(peer)
        if known is None:
            refusal, stage = self._peers.refusal(peer), "transfer"
            if refusal is None:
                refusal, stage = "the prefill worker has no handshake with this decode worker", "handshake"
            self._send_closed(peer, request.room, request.generation, refusal, stage=stage)
        elif (code := self._tombstones.code_of(request.room)) is not None:
            closed = "the prefill worker has closed this room"
            self._send_closed(peer, request.room, request.generation, closed, code=code)
        elif refusal := self._refusal(peer, known, request, room):
            self._send_closed(peer, request.room, request.generation, refusal)
        elif room is None:
            deadline = self._now + self._options.lease_s
            self._rooms[request.room] = OutgoingRoom(
                request.room, SenderState.ASKED, deadline, peer=peer, request=request, asked_at=self._clock()
            )
        elif room.request is None:
            room.peer, room.request, room.asked_at = peer, request, self._clock()
            self._match(room)
        else:
            self.counts.num_dropped += 1  # a duplicate

    def _refusal(self, peer: str, known: Peer, request: KvRequest, room: OutgoingRoom | None) -> str | None:
        pool = known.pool
        if not (1 <= request.room <= MAX_ROOM and 1 <= request.generation <= MAX_GENERATION):
            return f"there is no room {request.room} of generation {request.generation}"
        if room is not None and room.peer not in (None, peer):
            return "another decode worker has asked for this room"
        if room is None and len(self._rooms) >= _MAX_ROOMS:
            return f"{_MAX_ROOMS} rooms are open"
        if any(not 0 <= page < pool.num_pages for page in request.pages):
            return "a target page is outside of the pool"
        num_pages = num_pages_for(request.prompt_tokens, pool.page_size)
        if request.first_page < 0 or request.first_page + len(request.pages) != num_pages:
            return f"{len(request.pages)} pages from page {request.first_page} on do not hold {request.prompt_tokens} tokens"
        return None

    def _abort(self, peer: str, abort: KvAbort) -> None:
        room = self._rooms.get(abort.room)
        if room is not None and (room.peer, room.generation) == (peer, abort.generation):
            self._drain(room, _GIVEN_UP, code=abort.code)  # closing answers it
            return
        if room is None:
            # Its KvRequest was answered already, or its prefill leg is still to come and shall do nothing.
            self._tombstones.bury(abort.room, abort.code, self._now)
        elif room.request is None and room.peer in (None, peer):
            self._drain(room, _GIVEN_UP, code=abort.code)  # given up before it was asked for
        if abort.generation > 0:
            self._send_closed(peer, abort.room, abort.generation, None)

    def _send_closed(
        self,
        peer: str,
        room: int,
        generation: int,
        error: str | None,
        *,
        stage: str = "transfer",
        code: str = "leg_failed",
        leg: Leg = "prefill",
    ) -> None:
        closed = KvClosed(room=room, generation=generation, error=error, stage=stage, code=code, leg=leg)
        self._link.send(peer, closed)

    # -------------------------------------------------------------------------------------------- rooms

    def _match(self, room: OutgoingRoom) -> None:
        """Both sides are known: they must mean the same prompt."""
        room.state = advance(room.state, SenderState.SENDING)
        if (mismatch := room.mismatch) is not None:
            self._drain(room, mismatch)

    def _progress(self, room: OutgoingRoom) -> None:
        """Post what has become ready, look at posted writes, close the room when all is done."""
        if room.state is SenderState.SENDING:
            self._post(room)
        if room.look(self._agent, self._clock()):
            self._drain(room, "a KV write failed: the decode worker is gone or refused it")
        sent = room.state is SenderState.SENDING and room.finished is not None
        if not room.in_progress and (sent or room.state is SenderState.DRAINING):
            self._close(room)

    def _post(self, room: OutgoingRoom) -> None:
        try:
            write = room.post(self._agent, self._clock())
        except TransferError as error:
            self._drain(room, str(error))
            return
        if write is not None:
            self.counts.num_writes += 1
            self.counts.num_bytes += write.num_bytes

    def _drain(self, room: OutgoingRoom, error: str, *, code: str = "leg_failed", leg: Leg = "decode") -> None:
        """Post no more; close at once if nothing is in progress, else when it has completed."""
        if room.error is None:
            room.error, room.code, room.leg = error, code, leg
        room.deadline = math.inf
        if room.in_progress:
            if room.state is not SenderState.DRAINING:
                room.state = advance(room.state, SenderState.DRAINING)
        else:
            self._close(room)

    def _close(self, room: OutgoingRoom) -> None:
        if room.state is SenderState.CLOSED:
            return
        room.state = advance(room.state, SenderState.CLOSED)
        if room.request is not None and room.peer is not None:
            if room.error is None:
                self._link.send(room.peer, room.done(self._clock()))
            else:
                generation = room.request.generation
                self._send_closed(room.peer, room.number, generation, room.error, code=room.code, leg=room.leg)
        if room.opened is not None:
            self.mailbox.emit(RoomClosed(room.number, room.error, room.leg, room.code))
        del self._rooms[room.number]
        self._tombstones.bury(room.number, room.code, self._now)

    def _on_deadline(self, room: OutgoingRoom) -> None:
        lease = f"{self._options.lease_s:g} s"
        match room.state:
            case SenderState.OFFERED:
                self._drain(room, f"no decode worker has shown interest in the KV for {lease}")
            case SenderState.ASKED:
                self._drain(room, f"the prefill leg did not arrive within {lease}", leg="prefill")
            case SenderState.SENDING:
                self._drain(room, f"the KV writes took more than {lease}")
            case SenderState.DRAINING | SenderState.CLOSED:
                pass
