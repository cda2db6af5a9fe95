"""A worker's frontend over an engine that is played by the test: no process, no model, a real HTTP server and tokenizer."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec

from common.config import EngineOptions, ModelOptions, ServerOptions
from common.messages import (
    EngineReady,
    EngineToFrontend,
    ErrorReport,
    Failed,
    Finished,
    FinishReason,
    FrontendToEngine,
    Generate,
    PageCounts,
    RowBlock,
    Stats,
    Tokens,
    TopLogprobs,
    WorkerKind,
    leg_of,
)
from common.server.app import WorkerApp
from common.server.engine_client import EngineClient
from common.server.engine_groups import EngineGroups
from common.server.tokenizer import Tokenizer
from common.versions import whole
from common.wire import FrontendChannel
from deploy.demo_model import train_tokenizer
from tests.support.processes import until
from tests.support.rows import SPEC, cut, make_rows
from tests.support.stub_workers import serving

TOKENIZER = Tokenizer(train_tokenizer())
ROWS = make_rows(SPEC, 30_000)
READY = EngineReady(
    model_type="qwen3_moe",
    dtype="float32",
    device="cpu",
    vocab_size=1000,
    context_tokens=40_000,
    kv_pool_tokens=40_000,
    page_size=4,
    num_hidden_layers=SPEC.num_hidden_layers,
    moe_layer_ids=SPEC.layer_ids,
    num_experts=SPEC.num_experts,
    top_k=SPEC.top_k,
    max_running_requests=4,
    weight_version="w1",
)
STATS = Stats(
    serial=0,
    queued_requests=1,
    running_requests=2,
    pages=PageCounts(total=9, free=5, cached=3, running=1, quarantined=0, unaccounted=0),
    steps=0,
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
ROOM = {"bootstrap_host": "h", "bootstrap_port": 1}


def logprob(position: int) -> float:
    """The logprob of the token at an output position."""
    return -0.25 * (position + 1)


def tops(count: int) -> list[TopLogprobs]:
    """Two likeliest tokens at each output position."""
    return [[(logprob(position), 5), (-9.0, 6)] for position in range(count)]


class ScriptedEngine(FrontendChannel):
    """The engine's end: the test reads what was sent to it, and says what it answers."""

    def __init__(self) -> None:
        self._received: asyncio.Queue[FrontendToEngine] = asyncio.Queue()
        self._answers: asyncio.Queue[tuple[EngineToFrontend, list[memoryview]]] = asyncio.Queue()
        self.on_message: Callable[[FrontendToEngine], None] = lambda message: None

    def send(self, message: FrontendToEngine) -> None:
        # What crosses a process crosses an encoding.
        data = msgspec.msgpack.encode(message)
        decoded: FrontendToEngine = msgspec.msgpack.decode(data, type=FrontendToEngine)  # type: ignore[arg-type]
        self._received.put_nowait(decoded)
        self.on_message(decoded)

    async def receive(self) -> tuple[EngineToFrontend, list[memoryview]]:
        return await self._answers.get()

    async def next(self) -> FrontendToEngine:
        """The next message that the frontend has sent."""
        return await self._received.get()

    @property
    def num_received(self) -> int:
        """How many messages have come that nobody has looked at."""
        return self._received.qsize()

    def received(self) -> FrontendToEngine:
        """The next message, which must have come."""
        return self._received.get_nowait()

    async def next_generate(self) -> Generate:
        """The next message, which must be a request."""
        message = await self.next()
        assert isinstance(message, Generate)
        return message

    def answer(self, message: EngineToFrontend, rows: RowBlock | None = None) -> None:
        """Send a message to the frontend."""
        self._answers.put_nowait((message, [] if rows is None else [memoryview(rows.data)]))

    async def read(self) -> None:
        """Return once the frontend has read all that was sent to it."""
        await until(self._answers.empty)

    def tokens(self, to: Generate, token_ids: list[int], *, index: int = 0, first: int = 0) -> None:
        """Report tokens of a sample, those from output position `first` on."""
        positions = range(first, first + len(token_ids))
        top = tops(positions.stop)[first:] if to.options.top_logprobs_num else []
        self.answer(Tokens(to.rid, token_ids, [logprob(p) for p in positions], index, top))

    def fail(self, to: Generate) -> None:
        """End a request with a failure."""
        self.answer(Failed(to.rid, ErrorReport(status=500, message="no", code="internal")))

    def finish(
        self,
        to: Generate,
        token_ids: list[int],
        *,
        index: int = 0,
        reason: FinishReason | None = None,
        start: int | None = None,
        without_rows: bool = False,
        **fields: Any,
    ) -> None:
        """End a sample, with the rows `[start, P+G-1)`; by default those of a decode leg."""
        prompt, count = len(to.input_ids), len(token_ids)
        begin = prompt if start is None else start
        rows = None
        if to.options.return_routed_experts and not without_rows:
            rows = cut(SPEC, ROWS, begin, max(begin, prompt + count - 1))
        self.answer(
            Finished(
                rid=to.rid,
                index=index,
                prompt_tokens=prompt,
                cached_tokens=0,
                token_ids=token_ids,
                logprobs=[logprob(position) for position in range(count)],
                top_logprobs=tops(count) if to.options.top_logprobs_num else [],
                finish_reason=reason or FinishReason(type="length", length=count),
                rows=None if rows is None else rows.header,
                weight_versions=whole(begin, prompt + count - 1, "w1"),
                **fields,
            ),
            rows,
        )


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self._now = 0.0
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    def now(self) -> float:
        """Seconds since the beginning."""
        return self._now

    async def sleep(self, duration_s: float) -> None:
        """Sleep until so much time has passed."""
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.append((self._now + duration_s, woken))
        await woken

    async def advance(self, duration_s: float) -> None:
        """Let time pass; returns when everybody sleeps again whose sleep has ended meanwhile."""
        until = self._now + duration_s
        await asyncio.sleep(0)
        while due := [sleeper for sleeper in self._sleepers if sleeper[0] <= until]:
            first = min(due, key=lambda sleeper: sleeper[0])
            self._sleepers.remove(first)
            self._now = max(self._now, first[0])
            first[1].set_result(None)
            await asyncio.sleep(0)
        self._now = until


class Worker:
    """A frontend that serves, its engine, and a client; `engines` are those of all groups, `engine` is the first one's."""

    def __init__(
        self,
        engines: list[ScriptedEngine],
        client: aiohttp.ClientSession,
        clock: Clock,
        app: WorkerApp,
        engine_client: EngineGroups,
    ) -> None:
        self.engines = engines
        self.engine = engines[0]
        self.client = client
        self.clock = clock
        self.app = app
        self.engine_client = engine_client

    async def post(self, path: str = "/generate", *, msgpack: bool = False, **body: Any) -> tuple[int, Any]:
        """POST: status and decoded body."""
        headers = {"Accept": "application/msgpack"} if msgpack else {}
        async with self.client.post(path, json=body, headers=headers) as response:
            raw = await response.read()
            return response.status, msgspec.msgpack.decode(raw) if msgpack else json.loads(raw)

    async def get(self, path: str) -> tuple[int, Any]:
        """GET: status and body, decoded if it is JSON."""
        async with self.client.get(path) as response:
            raw = await response.read()
            return response.status, json.loads(raw) if response.content_type == "application/json" else raw

    async def stream(self, **body: Any) -> list[Any]:
        """All events of a stream."""
        async with self.client.post("/generate", json={**body, "stream": True}) as response:
            assert response.status == 200, await response.text()
            events = (await response.text()).split("\n\n")
        assert events.pop() == ""
        data = [event.removeprefix("data: ") for event in events]
        return [item if item == "[DONE]" else json.loads(item) for item in data if item]


@asynccontextmanager
async def scripted_worker(
    leg: WorkerKind = "decode",
    *,
    headers: dict[str, str] | None = None,
    options: EngineOptions = EngineOptions(),  # noqa: B008  it is frozen
    **server: Any,
) -> AsyncIterator[Worker]:
    """Serve one worker; a test that hangs fails after 20 s."""
    ranks = options.ranks
    engines = [ScriptedEngine() for _ in range(ranks.dp)]
    clock, leg_name = Clock(), leg_of(leg)
    clients = [EngineClient(engine, options, leg=leg_name, clock=clock.now) for engine in engines]
    client = EngineGroups(clients, ranks, leg=leg_name)
    app = WorkerApp(
        leg,
        client,
        READY,
        TOKENIZER,
        ModelOptions(model="demo"),
        ServerOptions(**server),
        options,
        bootstrap_port=None,
    )
    running = asyncio.gather(client.run(), client.watch(sleep=clock.sleep))
    try:
        async with (
            asyncio.timeout(20),
            serving(app.application()) as url,
            aiohttp.ClientSession(url, headers=headers) as session,
        ):
            yield Worker(engines, session, clock, app, client)
    finally:
        running.cancel()
