"""The frontend's view of its engine over a real socket, against an engine that is a script in a thread."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable

import pytest

from common.config import EngineOptions
from common.errors import LegFailed, RequestError
from common.messages import (
    Abort,
    EngineReady,
    EngineToFrontend,
    ErrorReport,
    Failed,
    Finished,
    FinishReason,
    FrontendToEngine,
    Generate,
    GetStats,
    PageCounts,
    ReportedError,
    RequestOptions,
    RowHeader,
    Shutdown,
    Stats,
    Tokens,
)
from common.server.engine_client import Ended, EngineClient, Update
from common.wire import EngineChannel, FrontendChannel
from tests.support.processes import DEADLINE_S
from tests.support.rows import SPEC, cut, make_rows

READY = EngineReady(
    model_type="qwen3_moe",
    dtype="float32",
    device="cpu",
    vocab_size=500,
    context_tokens=64,
    kv_pool_tokens=64,
    page_size=4,
    num_hidden_layers=5,
    moe_layer_ids=(1, 2, 4),
    num_experts=16,
    top_k=4,
    max_running_requests=3,
    weight_version="w",
)
PAGES = PageCounts(total=1, free=1, cached=0, running=0, quarantined=0, unaccounted=0)
Send = Callable[..., None]
Script = Callable[[FrontendToEngine, Send], None]


def message_of(rid: str, *input_ids: int) -> Generate:
    return Generate(rid=rid, input_ids=list(input_ids), options=RequestOptions())


def finished(rid: str, *token_ids: int, rows: RowHeader | None = None) -> Finished:
    return Finished(
        rid=rid,
        prompt_tokens=1,
        cached_tokens=0,
        token_ids=list(token_ids),
        logprobs=[0.0] * len(token_ids),
        finish_reason=FinishReason(type="length", length=len(token_ids)),
        rows=rows,
    )


def stats_of(serial: int, steps: int) -> Stats:
    return Stats(
        serial=serial,
        queued_requests=0,
        running_requests=0,
        pages=PAGES,
        steps=steps,
        tokens_computed=0,
        tokens_cached=0,
        rows_committed=0,
        rows_dropped=0,
        rows_refused=0,
        kv_bytes=0,
        kv_writes=0,
        rooms=0,
        dropped_messages=0,
    )


class ScriptedEngine:
    """Another thread with the engine's end of the channel: it runs the script on each message, and shows what has come."""

    def __init__(self, endpoint: str) -> None:
        self.script: Script = lambda message, send: None
        self._channel = EngineChannel(endpoint)
        self._seen: queue.Queue[FrontendToEngine] = queue.Queue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._channel.send(READY)
        while not self._stopping.is_set():
            self._channel.wait(DEADLINE_S)
            for message in self._channel.receive():
                self.script(message, self._channel.send)
                self._seen.put(message)
        self._channel.close()

    async def next(self) -> FrontendToEngine:
        """The next message that has come, once the script is through with it."""
        return await asyncio.to_thread(self._seen.get, True, DEADLINE_S)

    def stop(self) -> None:
        self._stopping.set()
        self._channel.wake()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()


class Both:
    """A client and its scripted engine."""

    def __init__(self, client: EngineClient, engine: ScriptedEngine) -> None:
        self.client = client
        self.engine = engine

    async def run(self, message: Generate) -> list[Update]:
        """One request to its end."""
        async with asyncio.timeout(DEADLINE_S), self.client.generate(message) as updates:
            return [update async for update in updates]


@pytest.fixture
async def both(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Both]:
    endpoint = f"ipc://{tmp_path_factory.mktemp('client')}/s"
    channel = FrontendChannel(endpoint)
    engine = ScriptedEngine(endpoint)
    client = EngineClient(channel, EngineOptions(), leg="decode")
    running = asyncio.create_task(client.run())
    yield Both(client, engine)
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled(), "the client's loop has ended by itself"
    engine.stop()
    channel.close()


async def test_ready_is_what_the_engine_says(both: Both):
    assert await asyncio.wait_for(both.client.ready, DEADLINE_S) == READY


async def test_updates_come_in_order_and_end_with_the_rows(both: Both):
    block = cut(SPEC, make_rows(SPEC, 3), 0, 3)

    def script(message: FrontendToEngine, send: Send) -> None:
        if isinstance(message, Generate):
            send(Tokens(message.rid, [7], [-1.0]))
            send(Tokens(message.rid, [8, 9], [-2.0, -3.0]))
            send(finished(message.rid, 7, 8, 9, rows=block.header), block.data)

    both.engine.script = script
    *tokens, ended = await both.run(message_of("r", 1))
    assert tokens == [Tokens("r", [7], [-1.0]), Tokens("r", [8, 9], [-2.0, -3.0])]
    assert isinstance(ended, Ended)
    assert ended.finished == finished("r", 7, 8, 9, rows=block.header)
    assert ended.rows is not None
    assert ended.rows.header == block.header
    assert bytes(ended.rows.data) == bytes(block.data)
    # An end that has come is not followed by an abort.
    both.client.shut_down()
    assert isinstance(await both.engine.next(), Generate)
    assert await both.engine.next() == Shutdown()


async def test_a_failure_is_an_end(both: Both):
    def script(message: FrontendToEngine, send: Send) -> None:
        if isinstance(message, Generate):
            send(Failed(message.rid, ErrorReport(status=500, message="no", code="internal", rid=message.rid)))

    both.engine.script = script
    [failed] = await both.run(message_of("r", 1))
    assert failed == Failed("r", ErrorReport(status=500, message="no", code="internal", rid="r"))
    both.client.shut_down()
    assert isinstance(await both.engine.next(), Generate)
    assert await both.engine.next() == Shutdown()


async def test_many_requests_get_each_their_own(both: Both):
    """The engine answers in the opposite order, pieces interleaved."""
    waiting: list[Generate] = []

    def script(message: FrontendToEngine, send: Send) -> None:
        if isinstance(message, Generate):
            waiting.append(message)
        if len(waiting) == 8:
            for other in reversed(waiting):
                send(Tokens(other.rid, other.input_ids, [0.0]))
            for other in waiting:
                send(finished(other.rid, *other.input_ids))
            waiting.clear()

    both.engine.script = script
    all_updates = await asyncio.gather(*(both.run(message_of(f"r{n}", n)) for n in range(8)))
    for number, (tokens, ended) in enumerate(all_updates):
        assert isinstance(tokens, Tokens)
        assert isinstance(ended, Ended)
        assert (tokens.rid, tokens.token_ids) == (f"r{number}", [number])
        assert (ended.finished.rid, ended.finished.token_ids) == (f"r{number}", [number])


@pytest.mark.parametrize("after_tokens", [False, True])
async def test_leaving_early_aborts(both: Both, after_tokens: bool):
    def script(message: FrontendToEngine, send: Send) -> None:
        if isinstance(message, Generate):
            send(Tokens(message.rid, [1], [0.0]))

    both.engine.script = script
    async with asyncio.timeout(DEADLINE_S):
        async with both.client.generate(message_of("r", 1)) as updates:
            if after_tokens:
                await anext(updates)
        started, abort = await both.engine.next(), await both.engine.next()
    assert isinstance(started, Generate)
    assert abort == Abort(started.rid)


async def test_a_handler_that_is_cancelled_aborts(both: Both):
    task = asyncio.create_task(both.run(message_of("r", 1)))
    started = await both.engine.next()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert isinstance(started, Generate)
    assert await both.engine.next() == Abort(started.rid)


async def test_a_rid_in_use_is_refused_and_the_first_goes_on(both: Both):
    both.engine.script = lambda message, send: (
        send(finished(message.rid, 5)) if isinstance(message, Generate) and message.input_ids == [2] else None
    )
    async with asyncio.timeout(DEADLINE_S), both.client.generate(message_of("r", 1)) as updates:
        with pytest.raises(RequestError, match=r"^rid: 'r' is in use"):
            await both.run(message_of("r", 2))
        started = await both.engine.next()
        assert isinstance(started, Generate)
        assert started.input_ids == [1]
        both.engine.script = lambda message, send: send(finished(started.rid, 6))
        both.client.shut_down()  # any message makes the script run
        [ended] = [update async for update in updates]
    assert isinstance(ended, Ended)
    assert ended.finished.token_ids == [6]
    assert await both.engine.next() == Shutdown(), "nothing of the refused request has reached the engine"
    both.engine.script = lambda message, send: send(finished(message.rid, 7)) if isinstance(message, Generate) else None
    [again] = await both.run(message_of("r", 3))
    assert isinstance(again, Ended), "after its end a rid may be used again"
    assert again.finished.token_ids == [7]


async def test_a_late_answer_never_meets_the_next_request_of_that_rid(both: Both):
    """The engine's answer and the client's abort cross; a new request of the same rid must not get the old one's rows."""
    first: list[Generate] = []

    def script(message: FrontendToEngine, send: Send) -> None:
        if isinstance(message, Generate) and not first:
            first.append(message)
        elif isinstance(message, Generate):
            send(Tokens(first[0].rid, [1], [0.0]))
            send(finished(first[0].rid, 1))
            send(finished(message.rid, 2))

    both.engine.script = script
    async with asyncio.timeout(DEADLINE_S), both.client.generate(message_of("r", 1)):
        await both.engine.next()
    updates = await both.run(message_of("r", 2))
    assert [u.finished.token_ids for u in updates if isinstance(u, Ended)] == [[2]]
    assert len(updates) == 1


async def test_a_dead_engine_ends_all_that_is_open(both: Both):
    """Requests, statistics, and whatever comes later."""
    requests = [asyncio.create_task(both.run(message_of(f"r{n}", n))) for n in range(3)]
    waiting = asyncio.create_task(both.client.stats())
    for _ in range(4):
        await both.engine.next()
    both.client.fail("the engine has exited with 9")
    for number, updates in enumerate(await asyncio.wait_for(asyncio.gather(*requests), DEADLINE_S)):
        [failed] = updates
        assert isinstance(failed, Failed)
        assert (failed.rid, failed.error.rid, failed.error.stage) == (f"r{number}", f"r{number}", "engine")
        assert (failed.error.status, failed.error.code, failed.error.leg) == (502, "leg_failed", "decode")
        assert failed.error.message == "the engine has exited with 9"
    with pytest.raises(LegFailed, match="exited with 9"):
        await asyncio.wait_for(waiting, DEADLINE_S)
    for later in (both.run(message_of("later", 1)), both.client.stats()):
        with pytest.raises(ReportedError, match="exited with 9") as raised:
            await asyncio.wait_for(later, DEADLINE_S)
        assert (raised.value.report.status, raised.value.report.code) == (503, "engine_ended")


async def test_stats_are_matched_by_their_serial(both: Both):
    """Answers in the wrong order, one to nobody, each twice; a caller that has given up disturbs no other."""
    asked: list[int] = []

    def script(message: FrontendToEngine, send: Send) -> None:
        if isinstance(message, GetStats):
            asked.append(message.serial)
        if len(asked) == 3:
            for serial in (999, *reversed(asked)):
                send(stats_of(serial, steps=100 + serial))
                send(stats_of(serial, steps=0))
            asked.clear()

    both.engine.script = script
    given_up = asyncio.create_task(both.client.stats())
    await both.engine.next()
    given_up.cancel()
    await asyncio.wait([given_up])
    first, second = await asyncio.wait_for(asyncio.gather(both.client.stats(), both.client.stats()), DEADLINE_S)
    assert first.serial != second.serial
    assert [stats.steps for stats in (first, second)] == [100 + stats.serial for stats in (first, second)]


async def test_messages_of_requests_that_are_gone_are_dropped(both: Both):
    def script(message: FrontendToEngine, send: Send) -> None:
        late: list[EngineToFrontend] = [
            Tokens("gone", [1], [0.0]),
            finished("gone", 1),
            Failed("gone", ErrorReport(status=500, message="", code="internal")),
        ]
        for other in late:
            send(other)
        if isinstance(message, Generate):
            send(finished(message.rid, 4))

    both.engine.script = script
    [ended] = await both.run(message_of("r", 1))
    assert isinstance(ended, Ended)
    assert ended.finished.token_ids == [4]
