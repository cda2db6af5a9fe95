"""Workers for the router's tests: they speak the leg replies over real sockets, and fail exactly as they are told.

A stub answers any prompt with tokens that follow from the seed, and with the rows of one big array, so that what a pair must
answer can be computed beside it. It waits for nothing but events.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web

from common.config import ServerOptions
from common.errors import RequestError
from common.messages import ErrorReport, Finished, FinishReason, Leg, RowBlock
from common.protocol.generate import Sample, parse_generate
from common.protocol.replies import (
    MSGPACK,
    SSE_DONE,
    encode_msgpack,
    error_body,
    error_fields,
    progress_reply,
    sample_reply,
    sse_event,
)
from common.routed_experts.codec import row_fields
from router.app import create_app
from router.config import RouterConfig, RouterOptions
from tests.support.rows import SPEC, cut, make_rows

ROWS = make_rows(SPEC, 400, seed=1)
CACHED_TOKENS = 2
TIMING = {"prefill": "pd_prefill_forward_duration", "decode": "pd_transfer_duration"}

Behaviour = Callable[["StubWorker", web.Request, Sample], Awaitable[web.StreamResponse]]


def prompt_tokens(sample: Sample) -> int:
    """Count P; the stubs' tokenizer makes each character a token."""
    return len(sample.text if sample.input_ids is None else sample.input_ids)  # type: ignore[arg-type]


def output_ids(sample: Sample) -> list[int]:
    """Draw the G tokens that a pair answers this sample with."""
    return [(sample.options.sampling.seed + i) % 1000 for i in range(sample.options.sampling.max_new_tokens)]


@dataclass
class StubWorker:
    """One worker; what it does is `behaviour`, and what it saw is beside it."""

    role: Leg
    behaviour: Behaviour | None = None
    url: str = ""
    samples: list[Sample] = field(default_factory=list)
    accepts: list[str] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    release: asyncio.Event = field(default_factory=asyncio.Event)
    num_cancelled: int = 0
    prompt_offset: int = 0
    first_token_offset: int = 0
    drop_rows: bool = False
    shift_rows: int = 0
    weight_version: str = "w1"

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Serve POST /generate."""
        call = parse_generate(await request.read())
        (sample,) = call.samples
        self.samples.append(sample)
        self.accepts.append(request.headers["Accept"])
        self.arrived.set()
        try:
            return await (self.behaviour or good)(self, request, sample)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            self.cancelled.set()
            raise

    def finished(self, sample: Sample) -> tuple[Finished, RowBlock | None]:
        """Make this leg's end of a sample."""
        tokens = output_ids(sample)
        prompt = prompt_tokens(sample) + self.prompt_offset
        if self.role == "prefill":
            start = sample.options.routed_experts_start_len
            stop = max(start, prompt if tokens else prompt - 1)
            tokens = [token + self.first_token_offset for token in tokens[:1]]
        else:
            start, stop = prompt, prompt + len(tokens) - 1
        start += self.shift_rows
        block = cut(SPEC, ROWS, start, max(start, stop), self.weight_version)
        wants_rows = sample.options.return_routed_experts
        finished = Finished(
            rid=sample.rid,
            prompt_tokens=prompt,
            cached_tokens=CACHED_TOKENS if self.role == "prefill" else 0,
            token_ids=tokens,
            logprobs=[-float(token) for token in tokens],
            finish_reason=FinishReason(type="length", length=len(tokens)),
            rows=block.header if wants_rows and not self.drop_rows else None,
            timings={TIMING[self.role]: 0.5},
        )
        return finished, block if wants_rows else None

    def reply(self, sample: Sample, *, binary: bool) -> dict[str, object]:
        """Make this leg's reply."""
        finished, block = self.finished(sample)
        return sample_reply(
            finished,
            text="".join(f"<{token}>" for token in finished.token_ids),
            options=sample.options,
            weight_version=self.weight_version,
            e2e_latency_s=0.0,
            rows=None if block is None else row_fields(block, "auto", binary=binary),
            is_leg=True,
        )


async def good(stub: StubWorker, request: web.Request, sample: Sample) -> web.StreamResponse:
    """Answer as a worker should."""
    if not sample.options.stream:
        return web.Response(body=encode_msgpack(stub.reply(sample, binary=True)), content_type=MSGPACK)
    response = await begin_stream(request)
    await send_progress(response, sample)
    await response.write(sse_event(stub.reply(sample, binary=False)))
    await response.write(SSE_DONE)
    return response


async def after_release(stub: StubWorker, request: web.Request, sample: Sample) -> web.StreamResponse:
    """Answer well, but not before the test says so."""
    await stub.release.wait()
    return await good(stub, request, sample)


async def hang(stub: StubWorker, request: web.Request, sample: Sample) -> web.StreamResponse:
    """Never answer."""
    await asyncio.Event().wait()
    raise AssertionError


async def reset(stub: StubWorker, request: web.Request, sample: Sample) -> web.StreamResponse:
    """Lose the connection without a word."""
    assert request.transport is not None
    request.transport.abort()
    await asyncio.Event().wait()
    raise AssertionError


async def garbage(stub: StubWorker, request: web.Request, sample: Sample) -> web.StreamResponse:
    """Answer 200 with what is no reply."""
    return web.Response(body=b"\xc1 nonsense")


def refuse(status: int, message: str = "no", code: str = "internal") -> Behaviour:
    """Answer with an error."""
    report = ErrorReport(status=status, message=message, code=code, stage="forward")
    if status == 400:
        report = ErrorReport.of(RequestError("input_ids", message))

    async def behaviour(stub: StubWorker, request: web.Request, sample: Sample) -> web.StreamResponse:
        return web.Response(status=report.status, body=error_body(report))

    return behaviour


async def die_mid_stream(stub: StubWorker, request: web.Request, sample: Sample) -> web.StreamResponse:
    """Send some events, and then lose the connection."""
    response = await begin_stream(request)
    await send_progress(response, sample)
    await stub.release.wait()
    return await reset(stub, request, sample)


async def end_without_last_event(stub: StubWorker, request: web.Request, sample: Sample) -> web.StreamResponse:
    """Send some events, and then end as if that were all."""
    response = await begin_stream(request)
    await send_progress(response, sample)
    await response.write(SSE_DONE)
    return response


async def error_event(stub: StubWorker, request: web.Request, sample: Sample) -> web.StreamResponse:
    """Send some events, and then an error."""
    response = await begin_stream(request)
    await send_progress(response, sample)
    report = ErrorReport(status=500, message="lost a page", code="internal", leg="decode", stage="step")
    await response.write(sse_event(error_fields(report)))
    return response


async def stream_and_hang(stub: StubWorker, request: web.Request, sample: Sample) -> web.StreamResponse:
    """Send some events, and then nothing more."""
    response = await begin_stream(request)
    await send_progress(response, sample)
    return await hang(stub, request, sample)


async def begin_stream(request: web.Request) -> web.StreamResponse:
    """Send a stream's headers."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    return response


async def send_progress(response: web.StreamResponse, sample: Sample) -> None:
    """Send one event for each token but the last."""
    tokens = output_ids(sample)
    for count in range(1, len(tokens)):
        event = progress_reply(
            sample.rid,
            text="".join(f"<{token}>" for token in tokens[:count]),
            token_ids=tokens[:count],
            logprobs=[-float(token) for token in tokens[:count]],
            prompt_tokens=prompt_tokens(sample),
            options=sample.options,
        )
        await response.write(sse_event(event))


@dataclass
class Stack:
    """A router and its stubs, and a client for it."""

    prefill: StubWorker
    decode: StubWorker
    client: aiohttp.ClientSession
    url: str


@asynccontextmanager
async def serving(app: web.Application) -> AsyncIterator[str]:
    """Serve an application on a port of its own; yields its URL."""
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def stack(
    *, prefill: Behaviour | None = None, decode: Behaviour | None = None, deadline_s: float = 30.0
) -> AsyncIterator[Stack]:
    """Start two stubs, a router for them and a client. A router that hangs fails its test after 20 s."""
    stubs = StubWorker("prefill", prefill), StubWorker("decode", decode)
    async with asyncio.timeout(20), serving_stub(stubs[0]), serving_stub(stubs[1]):
        config = RouterConfig(
            router=RouterOptions(prefill=((stubs[0].url, 8998),), decode=(stubs[1].url,)),
            server=ServerOptions(request_deadline_s=deadline_s),
        )
        async with serving(await create_app(config)) as url, aiohttp.ClientSession(url) as client:
            yield Stack(*stubs, client, url)


@asynccontextmanager
async def serving_stub(stub: StubWorker) -> AsyncIterator[StubWorker]:
    """Serve a stub on a port of its own."""

    async def ok(_: web.Request) -> web.Response:
        return web.json_response({"role": stub.role})

    app = web.Application(client_max_size=2**26)
    app.router.add_post("/generate", stub.generate)
    app.router.add_get("/health", ok)
    app.router.add_get("/server_info", ok)
    async with serving(app) as stub.url:
        yield stub
