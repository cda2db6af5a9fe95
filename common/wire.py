"""The only file that speaks ZMQ: typed channels between processes, msgpack inside, bulk bytes as frames of their own.

    EngineChannel  <-> FrontendChannel     a leading engine rank and its HTTP frontend, over a private ipc socket
    RankLink       <-> RankLink            the ranks of one worker, likewise
    ControlDialer  <-> ControlListener     decode engines and prefill engines, over TCP

Sends never block and never wait for a peer. A message that does not decode is dropped and counted, never raised: it came from
outside. Control connections are encrypted and admitted by a shared secret, if there is one (CurveZMQ). It knows no role.
"""

import contextlib
import hashlib
import ipaddress
import logging
import os
import time
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec
import zmq
import zmq.asyncio
import zmq.utils.monitor
import zmq.utils.z85

from common.errors import TransferError, UsageError
from common.messages import EngineToFrontend, FrontendToEngine

log = logging.getLogger(__name__)

Inbound = TypeVar("Inbound")
Outbound = TypeVar("Outbound")
Frame = bytes | memoryview

_COPY_BELOW_BYTES = 65536
_MAX_CONTROL_BYTES = 16 * 2**20
"""Largest control message: the pages of a prompt of millions of tokens. Who sends a larger one is cut off."""
_CONNECTED = zmq.EVENT_HANDSHAKE_SUCCEEDED
_LOST = zmq.EVENT_DISCONNECTED


class Waker:
    """Ends another thread's wait; a file descriptor that a poller can watch."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def wake(self) -> None:
        """Any thread: end the wait, or the next one if nobody waits."""
        os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        """The waiting thread: be ready for the next wake."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)


class _Waiting:
    """What every end that is polled by a thread of its own does alike: sleep until a message, a wake or the time."""

    def __init__(self) -> None:
        self._waker = Waker()
        self._poller = zmq.Poller()
        self._poller.register(self._waker.fd, zmq.POLLIN)

    def wait(self, timeout_s: float) -> None:
        """Sleep until a message is here, `wake` is called, or the time is up; less than 1 ms is slept whatever comes."""
        if timeout_s < 0.001:
            time.sleep(timeout_s)  # ZMQ counts in whole milliseconds
        else:
            self._poller.poll(round(timeout_s * 1000))
        self._waker.clear()

    def wake(self) -> None:
        """Any thread: end a `wait`, or the next one if nobody waits."""
        self._waker.wake()


class _Codec(Generic[Inbound, Outbound]):
    """Encodes one union and decodes another."""

    def __init__(self, inbound: Any) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(inbound)
        self.num_undecodable = 0

    def encode(self, message: Outbound) -> bytes:
        return self._encoder.encode(message)

    def decode(self, frame: bytes | memoryview) -> Inbound | None:
        try:
            decoded: Inbound = self._decoder.decode(frame)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self.num_undecodable += 1
            log.warning("dropped a message that does not decode: %s", error)
            return None
        return decoded


# ------------------------------------------------------------------------------------------------ frontend <-> engine


def engine_endpoint(folder: str, group: int) -> str:
    """Where a worker's frontend talks to the leader of an attention group; `folder` is the worker's own."""
    return f"ipc://{folder}/engine-{group}"


class EngineChannel(_Waiting):
    """The engine's end: plain calls for a thread with a loop of its own."""

    def __init__(self, endpoint: str) -> None:
        super().__init__()
        self._context = zmq.Context()
        self._socket = _open(self._context, zmq.DEALER)
        self._socket.connect(endpoint)
        self._poller.register(self._socket, zmq.POLLIN)
        self._codec: _Codec[FrontendToEngine, EngineToFrontend] = _Codec(FrontendToEngine)

    def watch(self, link: "RankLink[Any, Any]") -> None:
        """Let what other ranks say end a `wait` too."""
        self._poller.register(link.socket, zmq.POLLIN)

    def send(self, message: EngineToFrontend, *frames: Frame) -> None:
        """Queue a message; large frames are not copied and must not change until they are sent."""
        self._socket.send(self._codec.encode(message), zmq.SNDMORE if frames else 0)
        for left, frame in zip(range(len(frames) - 1, -1, -1), frames, strict=True):
            self._socket.send(frame, zmq.SNDMORE if left else 0, copy=len(frame) < _COPY_BELOW_BYTES)

    def receive(self) -> list[FrontendToEngine]:
        """All messages that are here."""
        return [
            message for (frame, *_) in _receive_all(self._socket) if (message := self._codec.decode(frame)) is not None
        ]

    def close(self) -> None:
        """Send what is queued, for a second at most, and close."""
        self._socket.close(linger=1000)
        self._context.term()
        self._waker.close()


class FrontendChannel:
    """The frontend's end, for an event loop."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = _open(self._context, zmq.DEALER)
        self._socket.bind(endpoint)
        self._codec: _Codec[EngineToFrontend, FrontendToEngine] = _Codec(EngineToFrontend)

    def send(self, message: FrontendToEngine) -> None:
        """Queue a message."""
        self._socket.send(self._codec.encode(message))

    async def receive(self) -> tuple[EngineToFrontend, list[memoryview]]:
        """Wait for the next message and its extra frames."""
        while True:
            frames = await self._socket.recv_multipart(copy=False)
            message = self._codec.decode(frames[0].buffer)
            if message is not None:
                return message, [frame.buffer for frame in frames[1:]]

    def close(self) -> None:
        """Close at once."""
        self._context.destroy(linger=100)


# ------------------------------------------------------------------------------------------------ rank <-> rank


class RankLink(_Waiting, Generic[Inbound, Outbound]):
    """One rank's end of a talk among the ranks of its worker; links of one `name` in one `folder` reach each other.

    Messages from one rank arrive in order, and wait for a rank that has not opened its end yet.
    """

    def __init__(self, folder: str, name: str, rank: int, inbound: Any) -> None:
        super().__init__()
        self._path = f"ipc://{folder}/{name}"
        self._context = zmq.Context()
        self._codec: _Codec[Inbound, Outbound] = _Codec(inbound)
        self.socket = _open(self._context, zmq.PULL)
        """To be watched by others too: `EngineChannel.watch`."""
        self.socket.bind(f"{self._path}-{rank}")
        self._poller.register(self.socket, zmq.POLLIN)
        self._others: dict[int, zmq.Socket[bytes]] = {}

    def send(self, rank: int, message: Outbound) -> None:
        """Queue a message to another rank; never blocks."""
        socket = self._others.get(rank)
        if socket is None:
            socket = self._others[rank] = _open(self._context, zmq.PUSH)
            socket.connect(f"{self._path}-{rank}")
        socket.send(self._codec.encode(message))

    def receive(self) -> list[Inbound]:
        """All messages that are here."""
        return [message for (frame,) in _receive_all(self.socket) if (message := self._codec.decode(frame)) is not None]

    def close(self) -> None:
        """Send what is queued, for a moment, and close."""
        self._context.destroy(linger=100)
        self._waker.close()


# ------------------------------------------------------------------------------------------------ decode <-> prefill


class _ControlLink(_Waiting, Generic[Inbound, Outbound]):
    """What both control ends share: a context and a codec."""

    def __init__(self, inbound: Any) -> None:
        super().__init__()
        self._context = zmq.Context()
        self._codec: _Codec[Inbound, Outbound] = _Codec(inbound)

    @property
    def num_undecodable(self) -> int:
        """Messages that were dropped because they did not decode."""
        return self._codec.num_undecodable

    def close(self) -> None:
        """Close all sockets; what is queued is sent for a moment only, since the peer may be gone."""
        self._context.destroy(linger=100)
        self._waker.close()


class ControlListener(_ControlLink[Inbound, Outbound]):
    """The prefill worker's end: many decode workers, known by the ids that they connect with."""

    def __init__(self, host: str, port: int, inbound: Any, *, secret: bytes = b"") -> None:
        super().__init__(inbound)
        self._socket = _open(self._context, zmq.ROUTER, max_bytes=_MAX_CONTROL_BYTES)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        if secret:
            self._socket.setsockopt(zmq.CURVE_SERVER, 1)
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, _listener_key(secret))
        try:
            self._socket.bind(f"tcp://{address(host, port)}")
        except zmq.ZMQError as error:
            raise UsageError(f"--bootstrap-port {port} on {host}: {error.strerror}") from error
        self._poller.register(self._socket, zmq.POLLIN)

    def send(self, peer: str, message: Outbound) -> None:
        """Queue a message; one to a peer that is gone is lost."""
        self._socket.send_multipart([peer.encode(), self._codec.encode(message)])

    def receive(self) -> list[tuple[str, Inbound]]:
        """All messages that are here, with the ids of their senders."""
        return [
            (sender.decode(errors="replace"), message)
            for (sender, frame, *_) in _receive_all(self._socket)
            if (message := self._codec.decode(frame)) is not None
        ]


class ControlDialer(_ControlLink[Inbound, Outbound]):
    """The decode worker's end: dials prefill workers, `host:port`, and keeps the connections up until it is told to forget."""

    def __init__(self, peer_id: str, inbound: Any, *, secret: bytes = b"") -> None:
        super().__init__(inbound)
        self._peer_id = peer_id
        self._secret = secret
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self._monitors: dict[str, zmq.Socket[bytes]] = {}

    def dial(self, peer: str) -> None:
        """Connect, and connect again whenever the connection is lost.

        Raises TransferError if `peer` is no address, or one beyond this host without a secret: whoever is there would learn
        how to write into this worker's pages.
        """
        if not self._secret and not is_loopback(peer.rpartition(":")[0].strip("[]")):
            raise TransferError(
                f"{peer!r} is no address of a prefill worker on this host; --secret-file is required beyond"
            )
        socket = _open(self._context, zmq.DEALER, max_bytes=_MAX_CONTROL_BYTES)
        socket.setsockopt(zmq.ROUTING_ID, self._peer_id.encode())
        # What is meant for a process must not wait for the next one at its address.
        socket.setsockopt(zmq.IMMEDIATE, 1)
        if self._secret:
            public, private = zmq.curve_keypair()
            socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
            socket.setsockopt(zmq.CURVE_SECRETKEY, private)
            socket.setsockopt(zmq.CURVE_SERVERKEY, zmq.curve_public(_listener_key(self._secret)))
        monitor = socket.get_monitor_socket(_CONNECTED | _LOST)
        try:
            socket.connect(f"tcp://{peer}")
        except zmq.ZMQError as error:
            socket.disable_monitor()
            socket.close()
            raise TransferError(f"{peer!r} is no address of a prefill worker: {error.strerror}") from error
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(monitor, zmq.POLLIN)
        self._sockets[peer], self._monitors[peer] = socket, monitor

    def forget(self, peer: str) -> None:
        """Close the connection to a peer that was dialed."""
        socket, monitor = self._sockets.pop(peer), self._monitors.pop(peer)
        self._poller.unregister(monitor)
        self._poller.unregister(socket)
        socket.disable_monitor()
        socket.close()

    def send(self, peer: str, message: Outbound) -> None:
        """Queue a message to a peer that was dialed; it is lost while there is no connection."""
        with contextlib.suppress(zmq.Again):
            self._sockets[peer].send(self._codec.encode(message), zmq.NOBLOCK)

    def receive(self) -> list[tuple[str, Inbound]]:
        """All messages that are here, with the addresses of their senders."""
        return [
            (peer, message)
            for peer, socket in self._sockets.items()
            for (frame, *_) in _receive_all(socket)
            if (message := self._codec.decode(frame)) is not None
        ]

    def changes(self) -> list[tuple[str, bool]]:
        """Connections that were made (True) or lost (False) since the last call, in order."""
        return [
            (peer, zmq.utils.monitor.parse_monitor_message(event)["event"] == _CONNECTED)
            for peer, monitor in self._monitors.items()
            for event in _receive_all(monitor)
        ]


def _listener_key(secret: bytes) -> bytes:
    """Derive the listener's secret key from the shared secret.

    Its public half is never sent, and a client that does not know it gets no further than its first message.
    """
    return zmq.utils.z85.encode(hashlib.blake2b(secret, digest_size=32, person=b"tandem-control").digest())


def address(host: str, port: int) -> str:
    """Write `host:port`, the host in brackets if it is an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this host's processes can be at an address; of names this is known of `localhost` alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _open(context: "zmq.Context[Any]", kind: int, *, max_bytes: int = -1) -> Any:
    socket = context.socket(kind)
    socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    socket.setsockopt(zmq.SNDHWM, 0)  # control messages are small; blocking or losing one would be worse
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, 100)
    socket.setsockopt(zmq.IPV6, 1)
    return socket


def _receive_all(socket: "zmq.Socket[bytes]") -> Sequence[list[bytes]]:
    received: list[list[bytes]] = []
    while True:
        try:
            received.append(socket.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            return received
