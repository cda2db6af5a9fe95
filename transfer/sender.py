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

It knows no engine and no NIXL: commands and events on one side, `TransferAgent` and `Link` on the other.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import NamedTuple, assert_never

from common.errors import TransferError
from common.ids import MAX_ROOM
from common.memory.layout import num_pages_for
from common.messages import Leg
from transfer.agent import TransferAgent, Write, WriteState
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
    KvDone,
    KvRequest,
    PrefillToDecode,
)
from transfer.peers import Peer, Peers
from transfer.plan import MAX_GENERATION, WriteTag
from transfer.state import SenderState, advance

log = logging.getLogger(__name__)

_GIVEN_UP = "the decode side has given this room up"
_CLOSING_S = 5.0
"""Longest wait for posted writes when the process ends."""
_MAX_ROOMS = 2**18
_MAX_TOMBSTONES = 2**20


@dataclass(slots=True)
class _Room:
    state: SenderState
    deadline: float = math.inf
    # What the own engine has told.
    opened: OpenRoom | None = None
    ready_pages: list[int] = field(default_factory=list)
    finished: FinishRoom | None = None
    # What the peer has told.
    peer: str | None = None
    """Who has asked for the KV, or has shown that it will."""
    request: KvRequest | None = None
    asked_at: float = 0.0
    # How far it is.
    num_posted_pages: int = 0
    num_writes: int = 0
    in_progress: list[Write] = field(default_factory=list)
    writing_since: float = 0.0
    """When the first of the writes in progress was posted to a room that had none."""
    write_seconds: float = 0.0
    """How long at least one write was in progress, up to when there last was none."""
    # Why it drains, and on whose side the reason lies.
    error: str | None = None
    code: str = "leg_failed"
    leg: Leg = "decode"

    @property
    def generation(self) -> int | None:
        """The generation that the peer has asked with."""
        return None if self.request is None else self.request.generation


class _Tombstone(NamedTuple):
    """A closed room is remembered for so long; `code` is what whoever comes late is told of it."""

    until: float
    code: str


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
        self._rooms: dict[int, _Room] = {}
        self._tombstones: dict[int, _Tombstone] = {}
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
        for room_id, room in list(self._rooms.items()):
            self._progress(room_id, room)
            if now >= room.deadline:
                self._on_deadline(room_id, room)
        for room_id in list(takewhile(lambda room_id: self._tombstones[room_id].until <= now, self._tombstones)):
            del self._tombstones[room_id]
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
                self._look(room)
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
                self._drain(command.room, room, command.error, code=command.code, leg="prefill")
            case PagesReady() if room is not None:
                room.ready_pages += command.pages
            case FinishRoom() if room is not None:
                room.finished = command
                room.deadline = self._now + self._options.lease_s
            case _:
                self.counts.num_dropped += 1  # the room has closed meanwhile, and the engine will hear of it

    def _open(self, command: OpenRoom, room: _Room | None) -> None:
        if (tombstone := self._tombstones.get(command.room)) is not None:
            self.mailbox.emit(RoomClosed(command.room, _GIVEN_UP, code=tombstone.code))
        elif room is None:
            self._rooms[command.room] = _Room(SenderState.OFFERED, opened=command)
        elif room.opened is None:
            room.opened, room.deadline = command, math.inf
            self._match(command.room, room)
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
        for room_id, room in list(self._rooms.items()):
            if room.peer in lost and room.state is not SenderState.DRAINING:
                self._drain(room_id, room, lost[room.peer])
        self._peers.forget(self._now, {room.peer for room in self._rooms.values() if room.peer is not None})

    def _ask(self, peer: str, request: KvRequest) -> None:
        room, known = self._rooms.get(request.room), self._peers.get(peer)
        if known is None:
            refusal, stage = self._peers.refusal(peer), "transfer"
            if refusal is None:
                refusal, stage = "the prefill worker has no handshake with this decode worker", "handshake"
            self._send_closed(peer, request.room, request.generation, refusal, stage=stage)
        elif (tombstone := self._tombstones.get(request.room)) is not None:
            closed = "the prefill worker has closed this room"
            self._send_closed(peer, request.room, request.generation, closed, code=tombstone.code)
        elif refusal := self._refusal(peer, known, request, room):
            self._send_closed(peer, request.room, request.generation, refusal)
        elif room is None:
            deadline = self._now + self._options.lease_s
            self._rooms[request.room] = _Room(
                SenderState.ASKED, deadline, peer=peer, request=request, asked_at=self._clock()
            )
        elif room.request is None:
            room.peer, room.request, room.asked_at = peer, request, self._clock()
            self._match(request.room, room)
        else:
            self.counts.num_dropped += 1  # a duplicate

    def _refusal(self, peer: str, known: Peer, request: KvRequest, room: _Room | None) -> str | None:
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
            self._drain(abort.room, room, _GIVEN_UP, code=abort.code)  # closing answers it
            return
        if room is None:
            # Its KvRequest was answered already, or its prefill leg is still to come and shall do nothing.
            self._bury(abort.room, abort.code)
        elif room.request is None and room.peer in (None, peer):
            self._drain(abort.room, room, _GIVEN_UP, code=abort.code)  # given up before it was asked for
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

    def _match(self, room_id: int, room: _Room) -> None:
        """Both sides are known: they must mean the same prompt."""
        assert room.opened is not None
        assert room.request is not None
        room.state = advance(room.state, SenderState.SENDING)
        offered = (room.opened.prompt_tokens, room.opened.prompt_digest)
        asked = (room.request.prompt_tokens, room.request.prompt_digest)
        if offered != asked:
            message = (
                f"the workers tokenised the prompt differently: {offered[0]} tokens on prefill, {asked[0]} on decode"
            )
            self._drain(room_id, room, message)

    def _progress(self, room_id: int, room: _Room) -> None:
        """Post what has become ready, look at posted writes, close the room when all is done."""
        if room.state is SenderState.SENDING:
            self._post(room_id, room)
        if self._look(room):
            self._drain(room_id, room, "a KV write failed: the decode worker is gone or refused it")
        sent = room.state is SenderState.SENDING and room.finished is not None
        if not room.in_progress and (sent or room.state is SenderState.DRAINING):
            self._close(room_id, room)

    def _look(self, room: _Room) -> bool:
        """Look once at each write in progress; whether one has failed."""
        if not room.in_progress:
            return False
        states = [(write, self._agent.poll(write)) for write in room.in_progress]
        room.in_progress = [write for write, state in states if state is WriteState.IN_PROGRESS]
        if not room.in_progress:
            room.write_seconds += self._clock() - room.writing_since
        return any(state is WriteState.FAILED for _, state in states)

    def _post(self, room_id: int, room: _Room) -> None:
        assert room.request is not None
        assert room.peer is not None
        first = room.request.first_page
        begin, end = max(first, room.num_posted_pages), len(room.ready_pages)
        if begin >= end:
            return
        posted_at = self._clock()
        tag = WriteTag(room_id, room.request.generation, room.num_writes).encode()
        try:
            write = self._agent.write(
                room.peer, room.ready_pages[begin:end], room.request.pages[begin - first : end - first], tag
            )
        except TransferError as error:
            self._drain(room_id, room, str(error))
            return
        room.num_posted_pages = end
        room.num_writes += 1
        if not room.in_progress:
            room.writing_since = posted_at
        room.in_progress.append(write)
        self.counts.num_writes += 1
        self.counts.num_bytes += write.num_bytes

    def _drain(self, room_id: int, room: _Room, error: str, *, code: str = "leg_failed", leg: Leg = "decode") -> None:
        """Post no more; close at once if nothing is in progress, else when it has completed."""
        if room.error is None:
            room.error, room.code, room.leg = error, code, leg
        room.deadline = math.inf
        if room.in_progress:
            if room.state is not SenderState.DRAINING:
                room.state = advance(room.state, SenderState.DRAINING)
        else:
            self._close(room_id, room)

    def _close(self, room_id: int, room: _Room) -> None:
        if room.state is SenderState.CLOSED:
            return
        room.state = advance(room.state, SenderState.CLOSED)
        if room.request is not None and room.peer is not None:
            generation = room.request.generation
            if room.error is None:
                assert room.finished is not None
                total = room.request.first_page + len(room.request.pages)
                assert max(room.num_posted_pages, room.request.first_page) == total, "a page was not reported"
                done = KvDone(
                    room=room_id,
                    generation=generation,
                    num_writes=room.num_writes,
                    write_seconds=room.write_seconds,
                    exposed_seconds=self._clock() - max(room.finished.computed_at, room.asked_at),
                    first_token=room.finished.first_token,
                    prompt_versions=room.finished.prompt_versions,
                )
                self._link.send(room.peer, done)
            else:
                self._send_closed(room.peer, room_id, generation, room.error, code=room.code, leg=room.leg)
        if room.opened is not None:
            self.mailbox.emit(RoomClosed(room_id, room.error, room.leg, room.code))
        del self._rooms[room_id]
        self._bury(room_id, room.code)

    def _bury(self, room_id: int, code: str) -> None:
        """Remember a closed room for longer than any lease: a late message or a late start of it does nothing."""
        self._tombstones.pop(room_id, None)  # those that last longest are last
        if len(self._tombstones) >= _MAX_TOMBSTONES:
            del self._tombstones[next(iter(self._tombstones))]
        until = self._now + 2 * max(self._options.lease_s, self._options.transfer_deadline_s)
        self._tombstones[room_id] = _Tombstone(until, code)

    def _on_deadline(self, room_id: int, room: _Room) -> None:
        match room.state:
            case SenderState.OFFERED:
                self._drain(
                    room_id, room, f"no decode worker has shown interest in the KV for {self._options.lease_s:g} s"
                )
            case SenderState.ASKED:
                self._drain(
                    room_id, room, f"the prefill leg did not arrive within {self._options.lease_s:g} s", leg="prefill"
                )
            case SenderState.SENDING:
                self._drain(room_id, room, f"the KV writes took more than {self._options.lease_s:g} s")
            case SenderState.DRAINING | SenderState.CLOSED:
                pass
