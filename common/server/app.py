"""A worker's HTTP routes, the same for both roles: it translates between HTTP bodies and the engine's messages.

It knows no model and no scheduler; limits come from the engine's `EngineReady`. The server must run with handler cancellation:
a client that leaves cancels its handler, and leaving `EngineClient.generate` aborts the request. Neighbours:
`common.protocol` (bodies), `engine_client` (the engine), `frontend` (the process around this).
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from common.config import ModelOptions, ServerOptions
from common.errors import DeadlineExceeded, RequestError, TandemError
from common.ids import new_rid
from common.messages import (
    EngineReady,
    ErrorReport,
    Failed,
    Generate,
    Leg,
    ReportedError,
    RequestOptions,
    SamplingParams,
)
from common.observability.metrics import render_stats
from common.protocol.generate import GenerateCall, Sample, parse_generate
from common.protocol.limits import check_limits
from common.protocol.replies import (
    MSGPACK,
    SSE_DONE,
    Reply,
    encode_json,
    encode_msgpack,
    error_fields,
    progress_reply,
    sample_reply,
    sse_event,
    wants_msgpack,
)
from common.routed_experts.codec import row_fields
from common.server.engine_client import Ended, EngineClient
from common.server.http import EventStream, answer_errors, together
from common.server.tokenizer import Tokenizer


class WorkerApp:
    """The routes of one worker."""

    def __init__(
        self,
        leg: Leg,
        engine: EngineClient,
        ready: EngineReady,
        tokenizer: Tokenizer,
        model: ModelOptions,
        server: ServerOptions,
        *,
        bootstrap_port: int | None,
    ) -> None:
        self._leg: Leg = leg
        self._engine = engine
        self._ready = ready
        self._tokenizer = tokenizer
        self._model = model
        self._server = server
        self._bootstrap_port = bootstrap_port

    def application(self) -> web.Application:
        """Make the aiohttp application."""
        app = web.Application(client_max_size=self._server.max_body_bytes, middlewares=[answer_errors(self._leg)])
        app.router.add_post("/generate", self._generate)
        app.router.add_get("/health", self._health)
        app.router.add_get("/health_generate", self._health_generate)
        app.router.add_get("/server_info", self._server_info)
        app.router.add_get("/get_server_info", self._server_info)
        app.router.add_get("/metrics", self._metrics)
        return app

    # -------------------------------------------------------------------------------------------- POST /generate

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        call = parse_generate(await request.read())
        as_msgpack = wants_msgpack(request.headers.get("Accept"), stream=call.stream)
        # All samples are checked before the first one starts, so that a refused request leaves nothing behind.
        messages = [self._message_of(sample) for sample in call.samples]
        if call.stream:
            return await self._stream(request, call, messages)
        pairs = zip(call.samples, messages, strict=True)
        async with self._deadline():
            replies = await together([self._answer(sample, message, as_msgpack) for sample, message in pairs])
        body = replies if call.is_list else replies[0]
        if as_msgpack:
            return web.Response(body=encode_msgpack(body), content_type=MSGPACK)
        return web.Response(body=encode_json(body), content_type="application/json")

    def _message_of(self, sample: Sample) -> Generate:
        """Tokenise and check a sample. Raises RequestError."""
        if sample.bootstrap is None and (self._leg == "decode" or sample.options.sampling.max_new_tokens > 0):
            raise RequestError(
                "bootstrap_room", f"a {self._leg} worker needs the room that ties its leg to the other one"
            )
        input_ids = self._tokenizer.encode(sample.text) if sample.text is not None else list(sample.input_ids or ())
        check_limits(
            sample,
            len(input_ids),
            vocab_size=self._ready.vocab_size,
            context_tokens=self._ready.context_tokens,
            kv_pool_tokens=self._ready.kv_pool_tokens,
        )
        return Generate(rid=sample.rid, input_ids=input_ids, options=sample.options, bootstrap=sample.bootstrap)

    async def _answer(self, sample: Sample, message: Generate, as_msgpack: bool) -> Reply:
        """Run one sample to its end."""
        async for reply in self._replies(sample, message, as_msgpack):
            last = reply
        return last

    async def _replies(self, sample: Sample, message: Generate, as_msgpack: bool) -> AsyncIterator[Reply]:
        """Run one sample: a reply for each update if it streams, then the last one. Raises ReportedError."""
        started = time.perf_counter()
        options = sample.options
        token_ids: list[int] = []
        logprobs: list[float] = []
        async with self._engine.generate(message) as updates:
            async for update in updates:
                if isinstance(update, Ended):
                    yield self._last_reply(sample, update, started, as_msgpack)
                elif isinstance(update, Failed):
                    raise ReportedError(update.error)
                else:
                    token_ids += update.token_ids
                    logprobs += update.logprobs
                    yield progress_reply(
                        sample.rid,
                        text=self._tokenizer.decode(token_ids, options.sampling),
                        token_ids=token_ids,
                        logprobs=logprobs,
                        prompt_tokens=len(message.input_ids),
                        options=options,
                    )

    def _last_reply(self, sample: Sample, ended: Ended, started: float, as_msgpack: bool) -> Reply:
        finished, rows = ended
        options = sample.options
        return sample_reply(
            finished,
            text=self._tokenizer.decode(finished.token_ids, options.sampling, finished.finish_reason),
            options=options,
            weight_version=self._ready.weight_version,
            e2e_latency_s=time.perf_counter() - started,
            rows=None if rows is None else row_fields(rows, options.routed_experts_dtype, binary=as_msgpack),
            is_leg=True,
        )

    @asynccontextmanager
    async def _deadline(self) -> AsyncIterator[None]:
        """Bound a request's time. Raises DeadlineExceeded."""
        try:
            async with asyncio.timeout(self._server.request_deadline_s):
                yield
        except TimeoutError as error:
            waited = f"not done within {self._server.request_deadline_s:g} s"
            raise DeadlineExceeded(waited, leg=self._leg, stage=self._leg) from error

    async def _stream(self, request: web.Request, call: GenerateCall, messages: list[Generate]) -> web.StreamResponse:
        client = EventStream(request)

        async def relay(index: int) -> None:
            async for reply in self._replies(call.samples[index], messages[index], as_msgpack=False):
                await client.send(sse_event({**reply, "index": index} if call.is_list else reply))

        try:
            async with self._deadline():
                await together([relay(index) for index in range(len(messages))])
        except TandemError as error:
            if not client.response.prepared:
                raise
            await client.end(sse_event(error_fields(ErrorReport.of(error, leg=self._leg))))
        else:
            await client.end(SSE_DONE)
        return client.response

    # -------------------------------------------------------------------------------------------- control

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response()

    async def _health_generate(self, _request: web.Request) -> web.Response:
        """One token through this worker's own engine, without the other role."""
        options = RequestOptions(sampling=SamplingParams(max_new_tokens=1, temperature=0.0))
        message = Generate(rid=f"health-{new_rid()}", input_ids=[0], options=options)
        async with self._deadline(), self._engine.generate(message) as updates:
            async for update in updates:
                if isinstance(update, Failed):
                    raise ReportedError(update.error)
        return web.Response()

    async def _server_info(self, _request: web.Request) -> web.Response:
        ready, stats = self._ready, await self._engine.stats()
        info: Reply = {
            "disaggregation_mode": self._leg,
            "disaggregation_bootstrap_port": self._bootstrap_port,
            "model_path": self._model.model,
            "model_type": ready.model_type,
            "dtype": ready.dtype,
            "device": ready.device,
            "weight_version": ready.weight_version,
            "enable_return_routed_experts": True,
            "context_tokens": ready.context_tokens,
            "max_total_num_tokens": ready.kv_pool_tokens,
            "max_running_requests": ready.max_running_requests,
            "page_size": ready.page_size,
            "num_hidden_layers": ready.num_hidden_layers,
            "moe_layer_ids": ready.moe_layer_ids,
            "num_experts": ready.num_experts,
            "num_experts_per_tok": ready.top_k,
            "stats": stats,
        }
        return web.Response(body=encode_json(info), content_type="application/json")

    async def _metrics(self, _request: web.Request) -> web.Response:
        return web.Response(body=render_stats(await self._engine.stats(), self._leg), content_type="text/plain")
