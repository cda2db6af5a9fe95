"""A prefill process that is stopped in the middle of a transfer, and continued later, changes no page that has a new owner.

Real processes, NIXL and ZMQ. The writer is held between having decided to write a page and writing it; so when it goes on, it
writes, whatever has been said meanwhile. The last test but one shows that this is no theory.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from common.process import PARENT_PID_VARIABLE, free_port
from common.wire import ControlDialer
from tests.fault.slow_writer import INK, OPTIONS, PROMPT_PAGES, WRITES_BEFORE_THE_PAUSE, make_pool
from tests.support.processes import DEADLINE_S, REPOSITORY, end, read_line
from transfer.agent import NixlAgent
from transfer.commands import KvArrived, KvLost, PagesQuiet, ReceiveKv, ReceiverEvent
from transfer.endpoint import Mailbox
from transfer.messages import DecodeToPrefill, PrefillToDecode
from transfer.receiver import Receiver

BLANK, OTHER, NEW = 0x00, 0x11, 0x22
OFFERED = list(range(PROMPT_PAGES))
"""Pages that the writer is given; the others are another request's from the beginning."""


class Stage:
    """The writer's process, and this one as the decode worker: the test stops and continues the one, and turns the other."""

    def __init__(self, name: str) -> None:
        port = free_port()
        self.source = f"127.0.0.1:{port}"
        self.writer = subprocess.Popen(
            [sys.executable, "-m", "tests.fault.slow_writer", str(port)],
            cwd=REPOSITORY,
            env={**os.environ, PARENT_PID_VARIABLE: str(os.getpid())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self.pages, memory = make_pool(BLANK)
        self.pages[PROMPT_PAGES:] = OTHER
        link: ControlDialer[PrefillToDecode, DecodeToPrefill] = ControlDialer(name, PrefillToDecode)
        self.receiver = Receiver(
            NixlAgent(name, memory),
            link,
            Mailbox(lambda: None),
            OPTIONS,
            peer_id=name,
        )
        assert read_line(self.writer) == "up"

    def ask(self, room: int, pages: list[int]) -> None:
        """Offer pages to the writer."""
        self.receiver.mailbox.submit(
            ReceiveKv(
                room=room,
                source=self.source,
                first_room=room,
                pages=pages,
                prompt_tokens=len(pages),
                prompt_digest=b"",
            )
        )

    def turn_until(self, condition: Callable[[], bool]) -> None:
        """Turn the receiver until something holds."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline
            self.receiver.turn(time.monotonic())
            self.receiver.wait()

    def next_event(self) -> ReceiverEvent:
        """Turn the receiver until it has something to say."""
        events: list[ReceiverEvent] = []

        def heard() -> bool:
            events.extend(self.receiver.mailbox.events())
            return bool(events)

        self.turn_until(heard)
        [event] = events
        return event

    def stop_in_a_write(self) -> None:
        """Stop the writer where it is about to write its third page, and wait until the request is lost."""
        self.ask(1, OFFERED)
        self.turn_until(lambda: self.inked() == WRITES_BEFORE_THE_PAUSE)
        assert read_line(self.writer) == "about to write"
        self.writer.send_signal(signal.SIGSTOP)
        lost = self.next_event()
        assert isinstance(lost, KvLost)
        assert (lost.error.leg, lost.error.stage) == ("prefill", "transfer")
        assert self.inked() == WRITES_BEFORE_THE_PAUSE

    def go_on(self) -> None:
        """Let the writer write."""
        assert self.writer.stdin is not None
        self.writer.stdin.write(b"!")
        self.writer.send_signal(signal.SIGCONT)

    def inked(self) -> int:
        """How many pages the writer has written."""
        return int((self.pages[:, 0] == INK).sum())

    def whole_pages(self, pages: list[int]) -> set[int]:
        """The bytes that are in these pages."""
        return set(self.pages[pages].unique().tolist())


@pytest.fixture
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    stage = Stage(f"decode-{os.getpid()}-{request.node.name}")
    yield stage
    end(stage.writer)
    stage.receiver.close()


def test_a_writer_that_goes_on_late_writes_into_quarantine_alone(stage: Stage):
    """While it is stopped its pages are nobody's; it writes one more of them when it goes on, then says that it is done."""
    stage.stop_in_a_write()
    silence_ends = time.monotonic() + 2 * OPTIONS.peer_deadline_s
    stage.turn_until(lambda: time.monotonic() > silence_ends)
    assert stage.receiver.mailbox.events() == [], "a stopped process may still write"
    stage.go_on()
    assert stage.next_event() == PagesQuiet(1)
    assert stage.inked() == WRITES_BEFORE_THE_PAUSE + 1, "the late write was real"
    assert stage.whole_pages(list(range(PROMPT_PAGES, len(stage.pages)))) == {OTHER}
    stage.pages[OFFERED] = NEW
    # The writer has served another request to its end, so whatever it had still to do is done.
    stage.ask(2, list(range(PROMPT_PAGES, 2 * PROMPT_PAGES)))
    assert isinstance(stage.next_event(), KvArrived)
    assert stage.whole_pages(OFFERED) == {NEW}


def test_whoever_reuses_the_pages_too_early_is_overwritten(stage: Stage):
    """The same without patience: the pages get a new owner when the request is lost, and the late write meets it."""
    stage.stop_in_a_write()
    stage.pages[OFFERED] = NEW
    stage.go_on()
    assert stage.next_event() == PagesQuiet(1)
    assert stage.whole_pages(OFFERED) == {NEW, INK}


def test_a_writer_that_is_killed_instead_gives_the_pages_back(stage: Stage):
    """What the launcher's fencing is for: the end of the process is the end of the quarantine."""
    stage.stop_in_a_write()
    stage.writer.kill()
    assert stage.next_event() == PagesQuiet(1)
    assert stage.inked() == WRITES_BEFORE_THE_PAUSE
