"""Workers for the router's tests: they speak the leg replies over real sockets, and fail exactly as they are told.

A stub answers any prompt with tokens that follow from the seed, and with the rows of one big array, so that what a pair must
answer can be computed beside it. It waits for nothing but events.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

from common.config import ServerOptions
from common.errors import RequestError
from common.messages import EndCause, ErrorReport, Finished, FinishReason, Leg, PromptLogprobs, RowBlock
from common.protocol.generate import Sample, parse_generate
from common.protocol.logprobs import logprob_fields
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
from common.versions import whole
from router.app import create_app
from router.config import RouterConfig, RouterOptions
from tests.support.rows import SPEC, cut, make_rows

ROWS = make_rows(SPEC, 400, seed=1)
CACHED_TOKENS = 2
TIMING = {"prefill": "pd_prefill_forward_duration", "decode": "pd_transfer_duration"}

ORDERS = (
    "/pause_generation",
    "/continue_generation",
    "/update_weights_from_disk",
    "/update_weights_from_tensor",
    "/update_weights_from_distributed",
    "/init_weights_update_group",
    "/destroy_weights_update_group",
    "/update_weight_version",
    "/begin_weight_update",
    "/end_weight_update",
    "/release_memory_occupation",
    "/resume_memory_occupation",
    "/start_profile",
    "/stop_profile",
)

Behaviour = Callable[["StubWorker", web.Request, Sample], Awaitable[web.StreamResponse]]


def prompt_tokens(sample: Sample) -> int:
    """Count P; the stubs' tokenizer makes each character a token, and each message of a chat."""
    if sample.messages is not None:
        return len(sample.messages)
    return len(sample.text if sample.input_ids is None else sample.input_ids)  # type: ignore[arg-type]


def prompt_ids(sample: Sample) -> list[int]:
    """Give the prompt's tokens, as the stubs' tokenizer makes them."""
    return list(range(prompt_tokens(sample)) if sample.input_ids is None else sample.input_ids)


def output_ids(sample: Sample, index: int = 0) -> list[int]:
    """Draw the G tokens that a pair answers sample `index` of a prompt with; they go on where resumed ones have ended."""
    sampling, resumed = sample.options.sampling, sample.options.resumed_tokens
    return [(sampling.seed + index + resumed + i) % 1000 for i in range(sampling.max_new_tokens)]


def text_of(token_id: int) -> str:
    """Give a token's text."""
    return f"<{token_id}>"


def whole_text(sample: Sample, tokens: Sequence[int]) -> str:
    """Give the text of the tokens, behind that of the resumed ones."""
    resumed = (sample.input_ids or ())[-sample.options.resumed_tokens :] if sample.options.resumed_tokens else ()
    return "".join(map(text_of, (*resumed, *tokens)))


def logprob_of(token_id: int) -> float:
    """Give the logprob that a stub says a token has."""
    return -float(token_id)


def top_logprobs_of(token_id: int, num: int) -> list[tuple[float, int]]:
    """Give the likeliest tokens in the place of this one: itself and those after it."""
    return [(logprob_of(token_id + i), token_id + i) for i in range(num)]


@dataclass
class StubWorker:
    """One worker; what it does is `behaviour`, and what it saw is beside it."""

    role: Leg
    """A decode leg's stub can also answer whole requests: `is_alone`."""
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
    drop_logprobs: bool = False
    drop_versions: bool = False
    is_alone: bool = False
    shift_rows: int = 0
    weight_version: str = "w1"
    aborts: list[object] = field(default_factory=list)
    abort_arrived: asyncio.Event = field(default_factory=asyncio.Event)
    authorizations: list[str | None] = field(default_factory=list)
    flush_status: int = 200
    orders: list[tuple[str, bytes]] = field(default_factory=list)
    """What was ordered: path and query, and body."""
    order_status: int = 200
    order_of: list[str] = field(default_factory=list)
    """Orders and aborts, as they came."""
    paused: asyncio.Event = field(default_factory=asyncio.Event)
    meet: asyncio.Barrier | None = None
    """Whom an order has to wait for."""
    tp_size: int = 1
    health: tuple[int, dict[str, Any]] | None = (200, {})
    """What GET /health answers; None: nothing, ever."""
    health_asked: asyncio.Event = field(default_factory=asyncio.Event)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Serve POST /generate."""
        call = parse_generate(await request.read())
        (sample,) = call.samples
        self.samples.append(sample)
        self.accepts.append(request.headers["Accept"])
        self.authorizations.append(request.headers.get("Authorization"))
        self.arrived.set()
        try:
            return await (self.behaviour or good)(self, request, sample)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            self.cancelled.set()
            raise

    async def get_health(self, request: web.Request) -> web.Response:
        """Serve GET /health."""
        self.health_asked.set()
        if self.health is None:
            await asyncio.Event().wait()
        assert self.health is not None
        status, answer = self.health
        return web.json_response(answer, status=status)

    async def take_order(self, request: web.Request) -> web.Response:
        """Serve the routes of `ORDERS`."""
        self.orders.append((request.path_qs, await request.read()))
        self.order_of.append(request.path)
        if request.path == "/pause_generation":
            self.paused.set()
        if self.meet is not None:
            await self.meet.wait()
        if self.order_status != 200:
            error = {"error": {"message": "not now"}, "success": False}
            return web.json_response(error, status=self.order_status)
        return web.json_response({"success": True, "message": "done", "weight_version": self.weight_version})

    async def get_weight_version(self, request: web.Request) -> web.Response:
        """Serve GET /get_weight_version."""
        return web.json_response({"weight_version": self.weight_version})

    async def abort_request(self, request: web.Request) -> web.Response:
        """Serve POST /abort_request."""
        self.aborts.append(await request.json())
        self.order_of.append("abort")
        self.abort_arrived.set()
        return web.Response()

    def finished(
        self, sample: Sample, index: int = 0, *, num_tokens: int | None = None, cause: EndCause = "requested"
    ) -> tuple[Finished, RowBlock | None]:
        """Make this leg's end of a sample; with `num_tokens`, its early end after so many."""
        options = sample.options
        tokens = output_ids(sample, index)[:num_tokens]
        prompt = prompt_tokens(sample) + self.prompt_offset
        prompt_logprobs = None
        reason = FinishReason(type="length", length=len(tokens))
        if num_tokens is not None:
            reason = FinishReason.early(cause, "here")
        if self.role == "prefill":
            start = options.routed_experts_start_len
            stop = max(start, prompt if tokens else prompt - 1)
            if tokens:
                tokens = [output_ids(sample, i)[0] + self.first_token_offset for i in range(options.sampling.n)]
        else:
            start, stop = options.routed_experts_start_len if self.is_alone else prompt, prompt + len(tokens) - 1
        first, last = (0, prompt - (not tokens)) if self.role == "prefill" else (0 if self.is_alone else start, stop)
        if (self.role == "prefill" or self.is_alone) and options.logprob_start_len >= 0 and not self.drop_logprobs:
            prompt_logprobs = self.prompt_logprobs(sample)
        versions = () if num_tokens == 0 or self.drop_versions else whole(first, last, self.weight_version)
        start += self.shift_rows
        block = cut(SPEC, ROWS, start, max(start, stop), self.weight_version)
        wants_rows = options.return_routed_experts and num_tokens != 0
        finished = Finished(
            rid=sample.rid,
            index=index,
            prompt_tokens=prompt,
            cached_tokens=CACHED_TOKENS if self.role == "prefill" else 0,
            token_ids=tokens,
            logprobs=[logprob_of(token) for token in tokens],
            top_logprobs=[top_logprobs_of(token, options.top_logprobs_num) for token in tokens],
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            rows=block.header if wants_rows and not self.drop_rows else None,
            weight_versions=versions,
            timings={TIMING[self.role]: 0.5},
        )
        return finished, block if wants_rows else None

    def prompt_logprobs(self, sample: Sample) -> PromptLogprobs:
        """Make the prompt's logprobs from `logprob_start_len` on."""
        options = sample.options
        ids = prompt_ids(sample)
        positions = range(options.logprob_start_len, len(ids))
        return PromptLogprobs(
            [logprob_of(ids[i]) if i else None for i in positions],
            [ids[i] for i in positions],
            [top_logprobs_of(ids[i], options.top_logprobs_num) if i else None for i in positions],
        )

    def reply(
        self,
        sample: Sample,
        index: int = 0,
        *,
        binary: bool,
        num_tokens: int | None = None,
        cause: EndCause = "requested",
    ) -> dict[str, object]:
        """Make this leg's reply."""
        finished, block = self.finished(sample, index, num_tokens=num_tokens, cause=cause)
        goes_on = finished.finish_reason.is_retracted and num_tokens != 0
        logprobs = logprob_fields(finished, sample.options, text_of)
        return sample_reply(
            finished,
            text=whole_text(sample, finished.token_ids),
            prompt_ids=prompt_ids(sample) if goes_on else None,
            options=sample.options,
            weight_version=self.weight_version,
            e2e_latency_s=0.0,
            rows=None if block is None else row_fields(block, "auto", binary=binary),
            logprobs={} if self.drop_logprobs else logprobs,
            is_leg=True,
        )

    async def send(
        self,
        request: web.Request,
        sample: Sample,
        *,
        num_tokens: int | Sequence[int | None] | None = None,
        cause: EndCause = "requested",
    ) -> web.StreamResponse:
        """Send this leg's whole answer; `num_tokens` is of all samples alike, or of each."""
        n = sample.options.sampling.n if self.role == "decode" else 1
        counts = num_tokens if isinstance(num_tokens, Sequence) else [num_tokens] * n
        if not sample.options.stream:
            replies = [
                self.reply(sample, index, binary=True, num_tokens=counts[index], cause=cause) for index in range(n)
            ]
            return web.Response(body=encode_msgpack(replies if n > 1 else replies[0]), content_type=MSGPACK)
        response = await begin_stream(request)
        await send_progress(response, sample, counts)
        for index in range(n):
            last = self.reply(sample, index, binary=False, num_tokens=counts[index], cause=cause)
            await response.write(sse_event({**last, "index": index} if n > 1 else last))
        await response.write(SSE_DONE)
        return response


async def good(stub: StubWorker, request: web.Request, sample: Sample) -> web.StreamResponse:
    """Answer as a worker should."""
    return await stub.send(request, sample)


def retract(*num_tokens: int | None) -> Behaviour:
    """Give the first leg back with so many tokens of each sample, None: of one that has ended; answer the others well."""

    async def behaviour(stub: StubWorker, request: web.Request, sample: Sample) -> web.StreamResponse:
        if len(stub.samples) == 1:
            return await stub.send(request, sample, num_tokens=num_tokens, cause="retracted")
        return await good(stub, request, sample)

    return behaviour


def when_aborted(num_tokens: int) -> Behaviour:
    """Answer with so many tokens once /abort_request has come."""

    async def behaviour(stub: StubWorker, request: web.Request, sample: Sample) -> web.StreamResponse:
        await stub.abort_arrived.wait()
        return await stub.send(request, sample, num_tokens=num_tokens)

    return behaviour


async def fail_when_aborted(stub: StubWorker, request: web.Request, sample: Sample) -> web.StreamResponse:
    """Fail once /abort_request has come, as a worker does that only sees that its peer has closed the room."""
    await stub.abort_arrived.wait()
    return await refuse(502, "the room was closed")(stub, request, sample)


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


async def reset_in_reply(stub: StubWorker, request: web.Request, sample: Sample) -> web.StreamResponse:
    """Begin to answer, and lose the connection before there is anything of use."""
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b"data: {")
    return await reset(stub, request, sample)


async def garbage(stub: StubWorker, request: web.Request, sample: Sample) -> web.StreamResponse:
    """Answer 200 with what is no reply."""
    return web.Response(body=b"\xc1 nonsense")


def refuse(
    status: int, message: str = "no", code: str = "internal", *, leg: Leg | None = None, stage: str = "forward"
) -> Behaviour:
    """Answer with an error."""
    report = ErrorReport(status=status, message=message, code=code, leg=leg, stage=stage)
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


async def send_progress(
    response: web.StreamResponse, sample: Sample, num_tokens: Sequence[int | None] | None = None
) -> None:
    """Send one event for each token but the last, of all samples in turn."""
    options, n = sample.options, sample.options.sampling.n
    outputs = [output_ids(sample, index)[:count] for index, count in enumerate(num_tokens or [None] * n)]
    for count in range(1, max(map(len, outputs))):
        for index, tokens in enumerate(outputs):
            if count >= len(tokens):
                continue
            event = progress_reply(
                sample.rid,
                text=whole_text(sample, tokens[:count]),
                token_ids=tokens[:count],
                logprobs=[logprob_of(token) for token in tokens[:count]],
                top_logprobs=[top_logprobs_of(token, options.top_logprobs_num) for token in tokens[:count]],
                prompt_tokens=prompt_tokens(sample),
                options=options,
                text_of=text_of,
            )
            await response.write(sse_event({**event, "index": index} if n > 1 else event))


@dataclass
class Stack:
    """A router and its stubs, the first pair and all of them, and a client for it."""

    prefill: StubWorker
    decode: StubWorker
    pairs: list[tuple[StubWorker, StubWorker]]
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
    *,
    prefill: Behaviour | None = None,
    decode: Behaviour | None = None,
    num_pairs: int = 1,
    deadline_s: float = 30.0,
    router: dict[str, Any] | None = None,
    server: dict[str, Any] | None = None,
) -> AsyncIterator[Stack]:
    """Start pairs of stubs, of which all but the first one behave well, a router for them and a client.

    Pairs take turns, the first one first. Unless `router` has options that say otherwise nothing is tried again and nobody
    is asked for its health, so that a test sees each failure once. A router that hangs fails its test after 20 s.
    """
    async with asyncio.timeout(20), AsyncExitStack() as stubs:
        pairs = []
        for index in range(num_pairs):
            behaviours = (prefill, decode) if index == 0 else (None, None)
            pair = StubWorker("prefill", behaviours[0]), StubWorker("decode", behaviours[1])
            for stub in pair:
                await stubs.enter_async_context(serving_stub(stub))
            pairs.append(pair)
        places = {
            "prefill": tuple((one.url, 8998) for one, _ in pairs),
            "decode": tuple(one.url for _, one in pairs),
        }
        quiet: dict[str, Any] = {"policy": "round_robin", "max_retries": 0, "health_interval_s": 3600.0}
        config = RouterConfig(
            router=RouterOptions(**places | quiet | (router or {})),
            server=ServerOptions(request_deadline_s=deadline_s, **server or {}),
        )
        async with serving(await create_app(config)) as url, aiohttp.ClientSession(url) as client:
            yield Stack(*pairs[0], pairs, client, url)


@asynccontextmanager
async def serving_stub(stub: StubWorker) -> AsyncIterator[StubWorker]:
    """Serve a stub on a port of its own."""

    async def ok(_: web.Request) -> web.Response:
        return web.json_response({"role": stub.role})

    async def server_info(_: web.Request) -> web.Response:
        info = {"role": stub.role, "model_path": "stub/model", "context_tokens": 4096, "tp_size": stub.tp_size}
        return web.json_response(info)

    async def flush(_: web.Request) -> web.Response:
        return web.json_response({"role": stub.role}, status=stub.flush_status)

    app = web.Application(client_max_size=2**26)
    for path in ORDERS:
        app.router.add_post(path, stub.take_order)
    app.router.add_get("/get_weight_version", stub.get_weight_version)
    app.router.add_post("/generate", stub.generate)
    app.router.add_post("/abort_request", stub.abort_request)
    app.router.add_get("/health", stub.get_health)
    for path in ("/model_info", "/v1/loads"):
        app.router.add_get(path, ok)
    app.router.add_get("/server_info", server_info)
    app.router.add_post("/flush_cache", flush)
    async with serving(app) as stub.url:
        yield stub
