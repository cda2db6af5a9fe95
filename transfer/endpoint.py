"""What both ends of a transfer have in common: commands in, events out, and a thread that turns the crank.

An endpoint is single-threaded inside: one thread calls `turn`, in production `TransferThread`'s, in tests the test's own. The
engine's thread only calls `submit` and `events`, which are a deque each. NIXL's calls can take long (`transfer` may copy
inline), so they never run in the engine's loop (R16).
"""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from msgspec import Struct

from common.errors import TransferError

Inbound = TypeVar("Inbound")
Outbound = TypeVar("Outbound", contravariant=True)
Command = TypeVar("Command", bound=Struct)
Event = TypeVar("Event", bound=Struct)
Item = TypeVar("Item")

IDLE_WAIT_S = 0.2
"""Longest wait of an idle endpoint; messages and commands end it at once."""
WATCH_S = 0.25
"""How often an endpoint looks whether its peers are still there."""
LANDING_WAIT_S = 0.001
"""Pause between two looks at NIXL, which has nothing to wait on, while a peer may be writing; its word ends the pause at once.
Over TCP NIXL needs the looks of both ends to move data."""
NAP_S = 0.00002
"""Pause between two looks at NIXL when the next one may be what a request waits for: long enough to leave the interpreter lock
and the core to others, short beside a write. One look makes all the progress that can be made."""
SWITCH_INTERVAL_S = 0.0002
"""After how long a thread that holds the interpreter lock must give it to one that waits. Each call into NIXL gives the lock
away, and Python's own 5 ms could be what it costs to get it back while the engine's thread launches a step."""


class Link(Protocol[Inbound, Outbound]):
    """Control messages to and from peers; `common.wire` has the ones over ZMQ, `transfer.loopback` one without."""

    def send(self, peer: str, message: Outbound) -> None:
        """Queue a message to a peer; never blocks. A message to a peer that is gone or not connected is lost."""

    def receive(self) -> list[tuple[str, Inbound]]:
        """All messages that are here, with their senders."""

    def wait(self, timeout_s: float) -> None:
        """Sleep until a message is here, `wake` is called, or the time is up. Less than 1 ms is slept whatever comes."""

    def wake(self) -> None:
        """End a `wait`; may be called by any thread."""

    def close(self) -> None:
        """Close the sockets."""


class DialingLink(Link[Inbound, Outbound], Protocol[Inbound, Outbound]):
    """The end that makes the connections, and knows its peers by their addresses."""

    def dial(self, peer: str) -> None:
        """Connect to a new peer, and again whenever the connection is lost. Raises TransferError if this is no address."""

    def changes(self) -> list[tuple[str, bool]]:
        """Connections that were made (True) or lost (False) since the last call, in order."""

    def forget(self, peer: str) -> None:
        """Close the connection to a peer that was dialed."""


@dataclass(slots=True)
class TransferCounts:
    """What the endpoints of one engine count, one after the other: the transfer's thread writes it, the engine's reads it."""

    num_rooms: int = 0
    """Those that are open now."""
    num_writes: int = 0
    num_bytes: int = 0
    num_dropped: int = 0


class Mailbox(Generic[Command, Event]):
    """The two deques between the engine's thread and the transfer's; the engine keeps it when its endpoint is another one."""

    def __init__(self, wake_engine: Callable[[], None]) -> None:
        self._commands: deque[Command] = deque()
        self._events: deque[Event] = deque()
        self._wake_transfer: Callable[[], None] | None = None
        self._wake_engine = wake_engine

    def attach(self, wake_transfer: Callable[[], None] | None) -> None:
        """Let commands wake an endpoint from now on; None: there is none, and they wait for the next."""
        self._wake_transfer = wake_transfer

    def submit(self, command: Command) -> None:
        """Engine's thread: ask for something."""
        self._commands.append(command)
        if self._wake_transfer is not None:
            self._wake_transfer()

    def events(self) -> list[Event]:
        """Engine's thread: what has happened since the last call."""
        return _drain(self._events)

    def commands(self) -> list[Command]:
        """Transfer's thread: what was asked for since the last call."""
        return _drain(self._commands)

    def emit(self, event: Event) -> None:
        """Transfer's thread: tell the engine."""
        self._events.append(event)
        self._wake_engine()


class Endpoint(Protocol):
    """A sender, a receiver or a hand."""

    def turn(self, now: float) -> None:
        """Handle all commands, messages, finished writes and deadlines that are due."""

    def wait(self) -> None:
        """Sleep until there may be something to do."""

    def close(self) -> bool:
        """Close agent and sockets once nothing that was posted is left; False if something is, which the process's end will end."""


class TransferThread:
    """Runs an endpoint from `start` to `stop`; started again, it opens another one.

    An exception in it is kept for the engine to raise: a half-dead worker is worse than none.
    """

    def __init__(self, open_endpoint: Callable[[], Endpoint], wake_engine: Callable[[], None]) -> None:
        self._open_endpoint = open_endpoint
        self._wake_engine = wake_engine
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._has_closed = False
        self._failure: Exception | None = None

    def start(self) -> None:
        """Open an endpoint and turn it, unless one is turning; the process's threads take turns often enough for it.

        Raises what opening raises.
        """
        if self._thread is not None:
            return
        endpoint = self._open_endpoint()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._stopping.clear()
        self._has_closed = False
        self._thread = threading.Thread(target=self._run, args=(endpoint,), name="transfer", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Engine's thread: raise what has ended the transfer's thread, if anything has."""
        if self._failure is not None:
            raise TransferError("the transfer thread has failed") from self._failure

    def stop(self, timeout_s: float) -> bool:
        """Stop turning and close the endpoint, if there is one; says whether nothing of it is left."""
        if self._thread is None:
            return True
        self._stopping.set()
        self._thread.join(timeout_s)
        if not self._has_closed:
            return False
        self._thread = None
        return True

    def _run(self, endpoint: Endpoint) -> None:
        try:
            try:
                while not self._stopping.is_set():
                    endpoint.turn(time.monotonic())
                    endpoint.wait()
                endpoint.turn(time.monotonic())  # what was asked for before the end
            finally:
                self._has_closed = endpoint.close()
        except Exception as error:  # noqa: BLE001  the top of a thread: the engine's loop raises it
            self._failure = error
            self._wake_engine()


def _drain(queue: deque[Item]) -> list[Item]:
    drained: list[Item] = []
    while queue:
        drained.append(queue.popleft())
    return drained
