"""The channels over real sockets: every message and frame arrives, what does not decode is dropped and counted, a wake wakes."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, get_args

import msgspec
import pytest
import zmq

from common.errors import TransferError, UsageError
from common.messages import (
    Abort,
    Beat,
    Bootstrap,
    CacheFlushed,
    EngineReady,
    EngineToFrontend,
    ErrorReport,
    Failed,
    Finished,
    FinishNow,
    FinishReason,
    FlushCache,
    FrontendToEngine,
    Generate,
    GetStats,
    PageCounts,
    RequestOptions,
    SamplingParams,
    Shutdown,
    Stats,
    StopAt,
    Tokens,
    VersionSpan,
)
from common.orders import (
    AwaitIdle,
    CheckWeights,
    Continue,
    Done,
    JoinWeightGroup,
    LeaveWeightGroup,
    LoadWeights,
    Order,
    Pause,
    PickledWeights,
    ReleaseMemory,
    ResumeMemory,
    SetWeightVersion,
    StartProfile,
    StopProfile,
    WarmUp,
    WeightBroadcast,
    WeightFiles,
)
from common.process import ProcessMark, free_port
from common.versions import whole
from common.wire import ControlDialer, ControlListener, EngineChannel, FrontendChannel
from tests.support.processes import DEADLINE_S
from tests.support.rows import SPEC
from transfer.messages import (
    DecodeToPrefill,
    FirstToken,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    HelloReply,
    KvAbort,
    KvClosed,
    KvDone,
    KvRequest,
    PoolInfo,
    PoolPart,
    PrefillToDecode,
)

OPTIONS = RequestOptions(
    sampling=SamplingParams(max_new_tokens=3, temperature=0.7, stop_token_ids=(1, 2), seed=2**63 - 1),
    stream=True,
    return_routed_experts=True,
    routed_experts_start_len=4,
    routed_experts_dtype="auto",
)
MARK = ProcessMark(boot_id="b", network_namespace=4, pid_namespace=1, pid=2, started_ticks=3)
PART = PoolPart(
    agent="decode-1",
    agent_metadata=b"\x00\xff",
    process=MARK,
    base_address=2**63,
    device_id=1,
    first_head=0,
    num_heads=2,
)
POOL = PoolInfo(
    num_pages=4,
    page_size=2,
    memory="VRAM",
    layout="page[head=2]",
    num_kv_heads=2,
    head_bytes=4,
    parts=(PART, PART),
)
ERROR = ErrorReport(status=502, message="nö", code="leg_failed", leg="decode", stage="transfer", rid="r")

ORDERS: list[Order] = [
    Pause(1),
    Continue(2),
    CheckWeights(3, WeightFiles("/checkpoint")),
    LoadWeights(4, WeightBroadcast(group="g", names=("a", "b"), dtypes=("float32",) * 2, shapes=((2, 3), ())), "v"),
    LoadWeights(5, PickledWeights(("/a", "/b")), "v"),
    SetWeightVersion(6, "w"),
    JoinWeightGroup(
        serial=7, group="g", address="h", port=5, rank_offset=1, world_size=3, backend="gloo", deadline_s=1.5
    ),
    LeaveWeightGroup(8, "g"),
    ReleaseMemory(9, ("weights", "kv_cache")),
    ResumeMemory(10, ("kv_cache",)),
    AwaitIdle(11, 2.5),
    WarmUp(12),
    StartProfile(serial=13, folder="/folder", kind="prefill", activities=("CPU", "GPU")),
    StopProfile(14),
]
TO_ENGINE: list[FrontendToEngine] = [
    Generate(rid="é", input_ids=[0, 2**31 - 1], options=OPTIONS, bootstrap=Bootstrap("h", 1, (2**63 - 1,))),
    Generate(rid="score", input_ids=[], options=RequestOptions()),
    Abort("r"),
    FinishNow("r"),
    StopAt(rid="r", index=2, num_tokens=5, matched="\n\né"),
    GetStats(7),
    FlushCache(8),
    *ORDERS,
    Shutdown(),
]
TO_FRONTEND: list[EngineToFrontend] = [
    EngineReady(
        model_type="qwen3_moe",
        dtype="float32",
        device="cpu",
        vocab_size=5,
        context_tokens=6,
        kv_pool_tokens=7,
        page_size=8,
        num_hidden_layers=9,
        moe_layer_ids=(1, 2, 4),
        num_experts=16,
        top_k=4,
        max_running_requests=3,
        weight_version="w",
    ),
    Tokens("r", [1, 2], [-0.5, 0.0]),
    Finished(
        rid="r",
        prompt_tokens=3,
        cached_tokens=1,
        token_ids=[4],
        logprobs=[-1.5],
        finish_reason=FinishReason(type="stop", matched=4),
        rows=SPEC.header(start=0, stop=3, weight_versions=whole(0, 3, "w")),
        weight_versions=(VersionSpan(0, 2, "v"), VersionSpan(2, 3, "w")),
        timings={"pd_transfer_duration": 0.25},
    ),
    Failed("r", ERROR),
    Stats(
        serial=7,
        queued_requests=1,
        running_requests=2,
        pages=PageCounts(total=6, free=1, cached=2, running=3, quarantined=0, unaccounted=0),
        steps=3,
        tokens_computed=4,
        tokens_cached=5,
        rows_committed=6,
        rows_dropped=7,
        rows_refused=8,
        kv_bytes=2**40,
        kv_writes=10,
        rooms=11,
        dropped_messages=12,
        swaps=13,
    ),
    Beat(num_steps=1, quarantined_pages=2, num_pages=3),
    CacheFlushed(7),
    CacheFlushed(8, "1 requests are running"),
    Done(serial=9),
    Done(serial=10, error="rank 1: no", num_left=3),
]
TO_PREFILL: list[DecodeToPrefill] = [
    Hello(peer="decode-1", protocol=1, pool=POOL),
    Heartbeat([1, 2**63 - 1]),
    KvRequest(to="p", room=2**63 - 1, generation=1, pages=[3, 1], prompt_tokens=5, prompt_digest=b"\x01" * 16),
    KvAbort(to="p", room=5, generation=2),
    Goodbye(),
]
TO_DECODE: list[PrefillToDecode] = [
    HelloReply(peer="prefill-1", processes=(MARK, MARK), dp=2, refusal="layouts differ"),
    HeartbeatReply("prefill-1", is_paired=True),
    KvDone(
        room=1,
        generation=2,
        num_writes=3,
        write_seconds=0.5,
        exposed_seconds=0.25,
        first_token=FirstToken(token_id=4, logprob=-0.125),
        prompt_versions=("v", "w"),
    ),
    KvClosed(room=1, generation=2, error="gone", stage="transfer"),
]

GARBAGE: list[bytes] = [
    b"",
    b"\xc1",
    b"noise",
    msgspec.msgpack.encode({"type": "Unheard"}),
    msgspec.msgpack.encode({"no": "type"}),
    msgspec.msgpack.encode({"type": "Abort", "rid": 5}),
    msgspec.msgpack.encode({"type": "KvAbort", "room": 5}),
    msgspec.msgpack.encode(Tokens("r", [1], [0.0]))[:-3],
    # No UTF-8 where a string belongs, and nesting without an end: msgspec has other errors for these.
    msgspec.msgpack.encode(Abort("abc")).replace(b"abc", b"\xff\xfe\xfd"),
    msgspec.msgpack.encode(Failed("abc", ERROR)).replace(b"abc", b"\xff\xfe\xfd"),
    msgspec.msgpack.encode(HelloReply(peer="abc", processes=(MARK,))).replace(b"abc", b"\xff\xfe\xfd"),
    msgspec.msgpack.encode(Hello(peer="abc", protocol=1, pool=POOL)).replace(b"abc", b"\xff\xfe\xfd"),
    *(
        bytes([0x82])
        + msgspec.msgpack.encode("type")
        + msgspec.msgpack.encode(tag)
        + msgspec.msgpack.encode("x")
        + b"\x91" * 10**5
        for tag in ("Abort", "Failed", "KvAbort", "KvClosed")
    ),
]


@pytest.mark.parametrize(
    ("union", "examples"),
    [
        (FrontendToEngine, TO_ENGINE),
        (EngineToFrontend, TO_FRONTEND),
        (DecodeToPrefill, TO_PREFILL),
        (PrefillToDecode, TO_DECODE),
    ],
    ids=["FrontendToEngine", "EngineToFrontend", "DecodeToPrefill", "PrefillToDecode"],
)
def test_the_examples_cover_their_union(union: Any, examples: list[Any]):
    """So that the tests below know of a message type that is added."""
    assert {type(example) for example in examples} == set(get_args(union))


def drain(receive: Callable[[], list[Any]], wait: Callable[[float], None], count: int) -> list[Any]:
    """Receive until there are `count` messages."""
    received: list[Any] = []
    deadline = time.monotonic() + DEADLINE_S
    while len(received) < count:
        assert time.monotonic() < deadline, f"only {len(received)} of {count} messages came"
        wait(DEADLINE_S / 10)
        received += receive()
    return received


# ------------------------------------------------------------------------------------------------ frontend <-> engine


@pytest.fixture
async def channels(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[EngineChannel, FrontendChannel]]:
    """Both ends of one channel; the folder's name is short, since a socket's path may not be long."""
    endpoint = f"ipc://{tmp_path_factory.mktemp('wire')}/s"
    frontend = FrontendChannel(endpoint)
    engine = EngineChannel(endpoint)
    yield engine, frontend
    engine.close()
    frontend.close()


async def take(engine: EngineChannel, count: int) -> list[Any]:
    return await asyncio.to_thread(drain, engine.receive, engine.wait, count)


async def next_of(frontend: FrontendChannel) -> tuple[EngineToFrontend, list[memoryview]]:
    return await asyncio.wait_for(frontend.receive(), DEADLINE_S)


async def test_every_message_to_the_engine_arrives(channels: tuple[EngineChannel, FrontendChannel]):
    engine, frontend = channels
    for message in TO_ENGINE * 2:
        frontend.send(message)
    assert await take(engine, 2 * len(TO_ENGINE)) == TO_ENGINE * 2
    assert engine.receive() == []


async def test_every_message_to_the_frontend_arrives_with_its_frames(channels: tuple[EngineChannel, FrontendChannel]):
    """None, one, several; empty, small and large ones, which are not copied."""
    engine, frontend = channels
    large = bytes(range(256)) * 5000
    for frames in ((), (b"",), (b"rows",), (memoryview(large), b"x", large)):
        for message in TO_FRONTEND:
            engine.send(message, *frames)
        for message in TO_FRONTEND:
            received, extra = await next_of(frontend)
            assert received == message
            assert [bytes(frame) for frame in extra] == [bytes(frame) for frame in frames]


async def test_the_frontend_drops_and_counts_what_does_not_decode(channels: tuple[EngineChannel, FrontendChannel]):
    """And goes on: the good message behind each piece of garbage is the next to arrive, with its own frames."""
    engine, frontend = channels
    for number, garbage in enumerate(GARBAGE):
        engine._socket.send_multipart([garbage, b"a frame of its own"])
        engine.send(Tokens(str(number), [], []), b"good")
        message, frames = await next_of(frontend)
        assert message == Tokens(str(number), [], [])
        assert [bytes(frame) for frame in frames] == [b"good"]
    assert frontend._codec.num_undecodable == len(GARBAGE)


async def test_the_engine_drops_and_counts_what_does_not_decode(channels: tuple[EngineChannel, FrontendChannel]):
    engine, frontend = channels
    good: list[FrontendToEngine] = []
    for number, garbage in enumerate(GARBAGE):
        await frontend._socket.send(garbage)
        good.append(GetStats(number))
        frontend.send(good[-1])
    assert await take(engine, len(good)) == good
    assert engine._codec.num_undecodable == len(GARBAGE)


# ------------------------------------------------------------------------------------------------ decode <-> prefill


class Control:
    """A listener, and dialers to it."""

    def __init__(self, secret: bytes = b"") -> None:
        self.secret = secret
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.listener = self.listen()
        self.dialers: list[ControlDialer[PrefillToDecode, DecodeToPrefill]] = []

    def dial(self, peer_id: str, secret: bytes = b"") -> ControlDialer[PrefillToDecode, DecodeToPrefill]:
        """Make a dialer that is connected, if its secret is right."""
        dialer: ControlDialer[PrefillToDecode, DecodeToPrefill] = ControlDialer(peer_id, PrefillToDecode, secret=secret)
        self.dialers.append(dialer)
        dialer.dial(self.address)
        if secret == self.secret:
            assert drain(dialer.changes, dialer.wait, 1) == [(self.address, True)]
        return dialer

    def listen(self) -> ControlListener[DecodeToPrefill, PrefillToDecode]:
        return ControlListener("127.0.0.1", self.port, DecodeToPrefill, secret=self.secret)

    def at_listener(self, count: int) -> list[tuple[str, DecodeToPrefill]]:
        return drain(self.listener.receive, self.listener.wait, count)

    def close(self) -> None:
        self.listener.close()
        for dialer in self.dialers:
            dialer.close()


@pytest.fixture
def control() -> Iterator[Control]:
    pair = Control()
    yield pair
    pair.close()


def test_every_control_message_arrives_with_its_sender(control: Control):
    """Two dialers; each gets the answers that are meant for it."""
    for peer in ("decode-a", "decode-b"):
        dialer = control.dial(peer)
        for message in TO_PREFILL:
            dialer.send(control.address, message)
        assert control.at_listener(len(TO_PREFILL)) == [(peer, message) for message in TO_PREFILL]
    for reply in TO_DECODE:
        control.listener.send("decode-b", reply)
        control.listener.send("decode-a", KvClosed(room=9, generation=9))
    first, second = control.dialers
    assert drain(second.receive, second.wait, len(TO_DECODE)) == [(control.address, reply) for reply in TO_DECODE]
    closed = (control.address, KvClosed(room=9, generation=9))
    assert drain(first.receive, first.wait, len(TO_DECODE)) == [closed] * len(TO_DECODE)


def test_the_listener_drops_and_counts_what_does_not_decode(control: Control):
    """Its port is open to everybody: nothing that comes in may end the thread that listens."""
    dialer = control.dial("decode-a")
    dialer.send(control.address, KvAbort(to="", room=0, generation=0))
    for garbage in GARBAGE:
        dialer._sockets[control.address].send(garbage)
    dialer._sockets[control.address].send_multipart([b"two", b"frames"])
    dialer.send(control.address, KvAbort(to="", room=1, generation=1))
    received = control.at_listener(2)
    assert received == [("decode-a", KvAbort(to="", room=n, generation=n)) for n in (0, 1)]
    assert control.listener.num_undecodable == len(GARBAGE) + 1


def test_the_dialer_drops_and_counts_what_does_not_decode(control: Control):
    dialer = control.dial("decode-a")
    dialer.send(control.address, TO_PREFILL[0])
    control.at_listener(1)
    for garbage in GARBAGE:
        control.listener._socket.send_multipart([b"decode-a", garbage])
    control.listener.send("decode-a", TO_DECODE[0])
    assert drain(dialer.receive, dialer.wait, 1) == [(control.address, TO_DECODE[0])]
    assert dialer.num_undecodable == len(GARBAGE)


def test_a_message_to_nobody_is_lost_and_no_error(control: Control):
    control.listener.send("who", TO_DECODE[0])
    dialer = control.dial("decode-a")
    nowhere = f"127.0.0.1:{free_port()}"
    dialer.dial(nowhere)
    dialer.send(nowhere, TO_PREFILL[0])
    dialer.send(control.address, TO_PREFILL[1])
    assert control.at_listener(1) == [("decode-a", TO_PREFILL[1])]


def test_a_peer_that_connects_again_takes_its_name_over(control: Control):
    old = control.dial("decode-a")
    old.send(control.address, TO_PREFILL[2])
    control.at_listener(1)
    new = control.dial("decode-a")
    new.send(control.address, TO_PREFILL[2])
    control.at_listener(1)
    control.listener.send("decode-a", TO_DECODE[0])
    assert drain(new.receive, new.wait, 1) == [(control.address, TO_DECODE[0])]
    assert old.receive() == []


def test_connections_that_are_lost_and_made_again_are_told(control: Control):
    """And what was sent in between is lost: it was meant for the listener that is gone."""
    dialer = control.dial("decode-a")
    control.listener.close()
    assert drain(dialer.changes, dialer.wait, 1) == [(control.address, False)]
    dialer.send(control.address, TO_PREFILL[0])
    control.listener = control.listen()
    assert drain(dialer.changes, dialer.wait, 1) == [(control.address, True)]
    dialer.send(control.address, TO_PREFILL[2])
    assert control.at_listener(1) == [("decode-a", TO_PREFILL[2])]


def test_a_forgotten_peer_can_be_dialed_again(control: Control):
    dialer = control.dial("decode-a")
    dialer.forget(control.address)
    assert dialer.receive() == []
    assert dialer.changes() == []
    dialer.dial(control.address)
    assert drain(dialer.changes, dialer.wait, 1) == [(control.address, True)]


def test_no_address_of_anybody(control: Control):
    dialer = control.dial("decode-a")
    for wrong in ("nothing", "127.0.0.1:port", "a b:1", ""):
        with pytest.raises(TransferError, match="is no address of a prefill worker"):
            dialer.dial(wrong)


@pytest.fixture
def guarded() -> Iterator[Control]:
    pair = Control(secret=b"a secret of some length")
    yield pair
    pair.close()


def test_a_shared_secret_lets_in(guarded: Control):
    dialer = guarded.dial("decode-a", guarded.secret)
    dialer.send(guarded.address, TO_PREFILL[0])
    assert guarded.at_listener(1) == [("decode-a", TO_PREFILL[0])]
    guarded.listener.send("decode-a", TO_DECODE[0])
    assert drain(dialer.receive, dialer.wait, 1) == [(guarded.address, TO_DECODE[0])]


@pytest.mark.parametrize("secret", [b"", b"another secret of some length"])
def test_without_the_secret_nobody_gets_in(guarded: Control, secret: bytes):
    """Nothing of a stranger's arrives, whatever it sends; one that knows the secret is served meanwhile."""
    stranger = guarded.dial("decode-b", secret)
    stranger._sockets[guarded.address].setsockopt(zmq.IMMEDIATE, 0)
    friend = guarded.dial("decode-a", guarded.secret)
    for number in range(50):
        stranger.send(guarded.address, KvAbort(to="", room=number, generation=1))
        friend.send(guarded.address, KvAbort(to="", room=number, generation=2))
    received = guarded.at_listener(50)
    assert {sender for sender, _ in received} == {"decode-a"}
    assert True not in [is_connected for _, is_connected in stranger.changes()]


def test_who_sends_a_message_of_a_size_that_none_has_is_cut_off(control: Control):
    dialer = control.dial("decode-a")
    dialer._sockets[control.address].send(bytes(17 * 2**20))
    assert drain(dialer.changes, dialer.wait, 1)[0] == (control.address, False)
    assert control.listener.receive() == []


def test_a_port_in_use_is_the_operators_mistake(control: Control):
    with pytest.raises(UsageError, match=f"--bootstrap-port {control.port}"):
        ControlListener("127.0.0.1", control.port, DecodeToPrefill)


# ------------------------------------------------------------------------------------------------ waiting


@pytest.mark.parametrize("end", ["engine", "listener", "dialer"])
async def test_a_wake_ends_a_wait_in_another_thread(
    end: str, channels: tuple[EngineChannel, FrontendChannel], control: Control
):
    """Each wait would last an hour; whether the wake comes before it or during it, it ends, and ends one wait."""
    link = {"engine": channels[0], "listener": control.listener, "dialer": control.dial("decode-a")}[end]
    for _ in range(20):
        thread = threading.Thread(target=link.wait, args=(3600.0,), daemon=True)
        thread.start()
        link.wake()
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
        assert link._poller.poll(0) == [], "the wake is used up"


@pytest.mark.parametrize("end", ["engine", "listener", "dialer"])
async def test_a_wait_of_less_than_a_millisecond_does_not_become_one(
    end: str, channels: tuple[EngineChannel, FrontendChannel], control: Control, monkeypatch: pytest.MonkeyPatch
):
    """ZMQ's poller knows whole milliseconds only, and 1 ms is half of a large write; the wake that came meanwhile is used up."""
    link = {"engine": channels[0], "listener": control.listener, "dialer": control.dial("decode-a")}[end]
    slept: list[float] = []
    monkeypatch.setattr("common.wire.time.sleep", slept.append)
    monkeypatch.setattr(link._poller, "poll", None)
    link.wake()
    link.wait(0.00002)
    assert slept == [0.00002]
    monkeypatch.undo()
    assert link._poller.poll(0) == []


async def test_a_message_ends_a_wait(channels: tuple[EngineChannel, FrontendChannel]):
    engine, frontend = channels
    waiting = asyncio.create_task(asyncio.to_thread(engine.wait, 3600.0))
    frontend.send(Shutdown())
    await asyncio.wait_for(waiting, DEADLINE_S)
    assert engine.receive() == [Shutdown()]
