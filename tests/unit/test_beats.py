"""Signs of life of an engine process: its beats, and the report of a loop that stands still."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

from common.engine.beats import BEAT_S, Beats
from common.engine.loop import serve
from common.messages import Beat, EngineReady, EngineToFrontend, FrontendToEngine, GetStats, Shutdown, Stats
from common.scheduling.request import RequestState
from deploy.aggregated import NoTransfer
from tests.support.aggregated import InProcessAggregated
from tests.support.processes import DEADLINE_S, REPOSITORY, end, read_line


def holder(state: RequestState, *pages: int) -> Any:
    return SimpleNamespace(state=state, pages=pages)


def test_a_loop_that_turns_beats_about_once_a_second() -> None:
    quarantined, running = RequestState.QUARANTINED, RequestState.RUNNING
    holders = [holder(quarantined, 1, 2), holder(quarantined, 2, 3), holder(running, 4)]
    engine: Any = SimpleNamespace(
        num_steps=7, seats=SimpleNamespace(holders=holders), allocator=SimpleNamespace(num_pages=9)
    )
    now = 100.0
    sent: list[Beat] = []
    beats = Beats(engine, sent.append, watchdog_s=DEADLINE_S, clock=lambda: now)
    try:
        for _ in range(3):
            beats.turn()
        assert sent == [Beat(num_steps=7, quarantined_pages=3, num_pages=9)], "a shared page is one page"
        now += BEAT_S * 0.9
        beats.turn()
        assert len(sent) == 1
        now += BEAT_S * 20  # a long step
        for _ in range(3):
            beats.turn()
        assert len(sent) == 2, "what was missed is not made up for"
    finally:
        beats.stop()


STUCK = """
import threading
from types import SimpleNamespace
from common.engine.beats import Beats

engine = SimpleNamespace(
    num_steps=0, seats=SimpleNamespace(holders=set()), allocator=SimpleNamespace(num_pages=1)
)
beats = Beats(engine, print, watchdog_s=0.01)
beats.turn()

def launch_that_never_returns():
    threading.Event().wait()

launch_that_never_returns()
"""


def test_a_loop_that_stands_still_says_where():
    child = subprocess.Popen(
        [sys.executable, "-c", STUCK], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
    )
    try:
        while "launch_that_never_returns" not in (line := read_line(child)):
            assert line, "the child has ended without a word"
    finally:
        end(child)


class Channel:
    """The frontend's end: says one thing after the other, and keeps what it is told."""

    def __init__(self, *messages: FrontendToEngine) -> None:
        self.to_say = list(messages)
        self.sent: list[EngineToFrontend] = []
        self.is_closed = False

    def receive(self) -> list[FrontendToEngine]:
        return [self.to_say.pop(0)]

    def send(self, message: EngineToFrontend, *frames: bytes | memoryview) -> None:
        self.sent.append(msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=EngineToFrontend))  # type: ignore[arg-type]

    def wait(self, timeout_s: float) -> None:
        """The next message is here already."""

    def close(self) -> None:
        self.is_closed = True


def test_an_engine_process_is_ready_beats_and_stops(checkpoint_of: Callable[[str], Path]):
    worker = InProcessAggregated(checkpoint_of("plain"), page_size=4, pool_tokens=64)
    channel = Channel(GetStats(5), Shutdown())
    serve(
        channel,
        worker.engine,
        worker.role,
        NoTransfer(),
        overlap=True,
        watchdog_s=DEADLINE_S,
        shutdown_deadline_s=DEADLINE_S,
    )
    ready, stats, beat = channel.sent
    assert isinstance(ready, EngineReady)
    assert isinstance(stats, Stats)
    assert (stats.serial, stats.failed_steps) == (5, 0)
    assert beat == Beat(num_steps=0, quarantined_pages=0, num_pages=16)
    assert channel.is_closed
