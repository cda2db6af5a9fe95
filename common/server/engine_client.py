"""The frontend's view of one attention group's engine: requests in, tokens and ends out, over one ZMQ channel.

When the engine process ends, every request that is open fails at once; nothing waits for a process that is gone. An engine that
is silent for too long, because it was stopped or hangs in a kernel, is as good as gone, but may come back: its requests fail and
are aborted, and until it beats again it is sent no others. An engine that carries out an order may be silent for as long as the
order is given. It knows no HTTP. Neighbours: `common.wire.FrontendChannel`,
`engine_groups` (its user), `common.engine.beats` (what is listened for).
"""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, NamedTuple, assert_never

from msgspec.structs import replace

from common.config import EngineOptions
from common.errors import DeadlineExceeded, LegFailed, RequestError, RequestFailed
from common.messages import (
    Abort,
    Beat,
    CacheFlushed,
    EndCause,
    EngineReady,
    EngineToFrontend,
    ErrorReport,
    Failed,
    Finished,
    FinishNow,
    FlushCache,
    Generate,
    GetStats,
    Leg,
    ReportedError,
    RowBlock,
    Shutdown,
    Stats,
    StopAt,
    Tokens,
)
from common.orders import Done, Order
from common.wire import FrontendChannel

log = logging.getLogger(__name__)

# What came while this process itself was kept from running is read before the engine is blamed.
_READING_S: Final = 0.1


class Ended(NamedTuple):
    """A sample's end with its rows, if it asked for any."""

    finished: Finished
    rows: RowBlock | None


Update = Tokens | Ended | Failed
_Answer = Stats | CacheFlushed | Done


class EngineClient:
    """One engine's requests. All methods belong to one event loop."""

    def __init__(
        self,
        channel: FrontendChannel,
        options: EngineOptions,
        *,
        leg: Leg | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._channel = channel
        self._leg: Leg | None = leg
        self._options = options
        self._clock = clock
        self._runs: dict[str, str] = {}
        """What the engine knows each open rid by."""
        self._updates: dict[str, asyncio.Queue[Update]] = {}
        self._answers: dict[int, asyncio.Future[_Answer]] = {}
        self._patience_s: dict[int, float] = {}
        """Serials of orders that the engine has, and how long it may be silent for each."""
        self._serials = itertools.count()
        self._heard_at = clock()
        self.num_open_samples = 0
        """Those that have not ended, of all requests."""
        self._silence: ErrorReport | None = None
        """Why the engine is sent nothing now: it is gone, or silent."""
        self._crowding: ErrorReport | None = None
        """Why it is sent no requests now, although it is alive: too many of its pages are in quarantine, and have been."""
        self._crowded_since: float | None = None
        self.ready: asyncio.Future[EngineReady] = asyncio.get_running_loop().create_future()

    @property
    def refusal(self) -> ErrorReport | None:
        """Why no request can be served now; None if the engine is well."""
        return self._silence or self._crowding

    @property
    def is_crowded(self) -> bool:
        """Whether the engine is well but for pages in quarantine: the requests that it has go on."""
        return self._silence is None and self._crowding is not None

    async def run(self) -> None:
        """Take in what the engine sends; runs until cancelled."""
        while True:
            message, frames = await self._channel.receive()
            self._heard()
            self._dispatch(message, frames)

    async def watch(self, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        """See that the engine is never silent for longer than its deadline; runs until cancelled."""
        usual_s = self._options.engine_deadline_s
        self._heard_at = self._clock()
        while True:
            silent_s = self._clock() - self._heard_at
            await sleep(max(0.0, usual_s - silent_s % usual_s) or usual_s)
            if self._clock() - self._heard_at < self._deadline_s:
                continue
            await sleep(_READING_S)
            if self._silence is None and self._clock() - self._heard_at >= self._deadline_s:
                self._on_silence(f"the engine has been silent for {self._deadline_s:g} s")

    @property
    def _deadline_s(self) -> float:
        """How long the engine may be silent now."""
        return self._options.engine_deadline_s + max(self._patience_s.values(), default=0.0)

    def fail(self, message: str) -> None:
        """The engine is gone: end everything that is open, and refuse what comes."""
        self._silence = self._unavailable(message, "engine_ended")
        self._fail_open(LegFailed(message, leg=self._leg, stage="engine"))

    def _on_silence(self, message: str) -> None:
        log.error("%s", message)
        self._silence = self._unavailable(message, "engine_stuck")
        self._abort_open()  # if it comes back, it is to give everything back
        self._fail_open(DeadlineExceeded(message, leg=self._leg, stage="engine"))

    def _heard(self) -> None:
        self._heard_at = self._clock()
        if self._silence is not None and self._silence.code == "engine_stuck":
            log.warning("the engine is back")
            self._silence = None

    def abandon(self, error: ErrorReport) -> None:
        """End all open requests with a failure, here and in the engine."""
        self._abort_open()
        self._fail_requests(error)

    def _abort_open(self) -> None:
        for run in self._updates:
            self._channel.send(Abort(run))

    def _fail_requests(self, error: ErrorReport) -> None:
        for rid, queue in self._updates.items():
            queue.put_nowait(Failed(rid, replace(error, rid=rid)))

    def _fail_open(self, error: RequestFailed) -> None:
        self._fail_requests(ErrorReport.of(error))
        for waiting in self._answers.values():
            if not waiting.done():
                waiting.set_exception(error)

    def _unavailable(self, message: str, code: str) -> ErrorReport:
        return ErrorReport(status=503, message=message, code=code, leg=self._leg, stage="engine")

    def has(self, rid: str) -> bool:
        """Whether a request of this name is open."""
        return rid in self._runs

    @asynccontextmanager
    async def generate(self, message: Generate, *, num_ends: int = 1) -> AsyncIterator[AsyncIterator[Update]]:
        """Run one prompt: the updates end with the last of `num_ends` times `Ended`, or with `Failed`.

        A decode engine ends each of n samples, a prefill engine all of them at once. Leaving the context early aborts all.

        Raises RequestError if the rid is in use, ReportedError with status 503 if the engine is not well.
        """
        if message.rid in self._runs:
            raise RequestError("rid", f"{message.rid!r} is in use by another request")
        if (refusal := self.refusal) is not None:
            raise ReportedError(replace(refusal, rid=message.rid))
        # The engine knows each run by a name of its own: when a client leaves and comes back with the same rid, what the
        # engine has said of the first run may still be on its way, and is not the second one's.
        run = f"{message.rid}~{next(self._serials)}"
        self._runs[message.rid] = run
        queue = self._updates[run] = asyncio.Queue()
        num_left = num_ends
        self.num_open_samples += num_left

        async def updates() -> AsyncIterator[Update]:
            nonlocal num_left
            while num_left:
                update = await queue.get()
                match update:
                    case Ended():
                        num_left -= 1
                        self.num_open_samples -= 1
                    case Failed():
                        self.num_open_samples -= num_left
                        num_left = 0
                yield _renamed(update, message.rid)

        self._channel.send(replace(message, rid=run))
        try:
            yield updates()
        finally:
            del self._runs[message.rid], self._updates[run]
            self.num_open_samples -= num_left
            if num_left:
                self._channel.send(Abort(run))

    def stop_at(self, rid: str, index: int, *, num_tokens: int, matched: str) -> None:
        """End sample `index` of an open request after its first `num_tokens` tokens, where a stop string was found."""
        self._channel.send(StopAt(rid=self._runs[rid], index=index, num_tokens=num_tokens, matched=matched))

    def finish_now(self, prefix: str, cause: EndCause = "requested") -> list[str]:
        """End the open requests whose rids begin with `prefix`: each answers with what it has. Returns their rids."""
        rids = [rid for rid in self._runs if rid.startswith(prefix)]
        for rid in rids:
            self._channel.send(FinishNow(self._runs[rid], cause))
        return rids

    async def carry_out(self, order: Order, *, patience_s: float = 0.0) -> Done:
        """Have the engine carry out an order, whose serial is drawn here; returns how that went. Raises as `stats` does.

        Meanwhile the engine may be silent for so many seconds more than usual.
        """
        serial = next(self._serials)
        self._patience_s[serial] = patience_s
        try:
            done = await self._ask(serial, replace(order, serial=serial))
        finally:
            del self._patience_s[serial]
        assert isinstance(done, Done)
        return done

    def post(self, order: Order) -> None:
        """Have an order carried out whenever the engine gets to it, even if it is silent now; nobody waits for the answer."""
        self._channel.send(replace(order, serial=next(self._serials)))

    async def stats(self) -> Stats:
        """Ask the engine for its statistics; raises ReportedError or RequestFailed if it is gone or silent."""
        serial = next(self._serials)
        stats = await self._ask(serial, GetStats(serial))
        assert isinstance(stats, Stats)
        return stats

    async def flush_cache(self) -> str | None:
        """Have the engine forget its cached prefixes; returns why it did not. Raises as `stats` does."""
        serial = next(self._serials)
        flushed = await self._ask(serial, FlushCache(serial))
        assert isinstance(flushed, CacheFlushed)
        return flushed.refusal

    def shut_down(self) -> None:
        """Ask the engine process to exit."""
        self._channel.send(Shutdown())

    async def _ask(self, serial: int, question: GetStats | FlushCache | Order) -> _Answer:
        if self._silence is not None:
            raise ReportedError(self._silence)
        waiting = self._answers[serial] = asyncio.get_running_loop().create_future()
        try:
            self._channel.send(question)
            answer: _Answer = await waiting
            return answer
        finally:
            del self._answers[serial]

    def _dispatch(self, message: EngineToFrontend, frames: list[memoryview]) -> None:
        match message:
            case EngineReady():
                self.ready.set_result(message)
            case Stats() | CacheFlushed() | Done():
                waiting = self._answers.get(message.serial)
                if waiting is not None and not waiting.done():
                    waiting.set_result(message)
            case Beat():
                self._on_beat(message)
            case Tokens() | Failed():
                self._put(message.rid, message)
            case Finished():
                rows = None if message.rows is None else RowBlock(message.rows, frames[0])
                self._put(message.rid, Ended(message, rows))
            case _:
                assert_never(message)

    def _on_beat(self, beat: Beat) -> None:
        if beat.quarantined_pages <= self._options.max_quarantine * beat.num_pages:
            self._crowded_since = self._crowding = None
            return
        now = self._clock()
        self._crowded_since = now if self._crowded_since is None else self._crowded_since
        if now - self._crowded_since < self._options.quarantine_patience_s:
            return
        message = f"{beat.quarantined_pages} of {beat.num_pages} KV pages are in quarantine"
        self._crowding = self._unavailable(message, "quarantine_full")

    def _put(self, rid: str, update: Update) -> None:
        queue = self._updates.get(rid)
        if queue is not None:  # else the client has left, and the abort has crossed this
            queue.put_nowait(update)


def _renamed(update: Update, rid: str) -> Update:
    """Put the client's rid in the place of the run's."""
    match update:
        case Tokens():
            return replace(update, rid=rid)
        case Ended():
            return Ended(replace(update.finished, rid=rid), update.rows)
        case Failed():
            return Failed(rid, replace(update.error, rid=rid))
        case _:
            assert_never(update)
