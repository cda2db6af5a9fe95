"""A worker's HTTP application and its POST /generate, the same for all kinds: HTTP bodies to the engine's messages and back.

It knows no model and no scheduler; limits come from the engine's `EngineReady`. The server must run with handler cancellation:
a client that leaves cancels its handler, and leaving `EngineGroups.generate` aborts the request. Neighbours:
`common.protocol` (bodies), `output` (what a sample's answer is), `engine_groups` (the engine), `control` (the other routes),
`frontend` (the process around this).
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Final, TypeVar, assert_never

from aiohttp import web

from common.config import EngineOptions, ModelOptions, ServerOptions
from common.errors import DeadlineExceeded, MissingRows, RequestError, TandemError
from common.messages import EngineReady, ErrorReport, Failed, Generate, ReportedError, Tokens, WorkerKind, leg_of
from common.protocol.generate import GenerateCall, Sample, parse_generate
from common.protocol.limits import check_limits
from common.protocol.replies import (
    SSE_DONE,
    Reply,
    encode_json,
    encode_msgpack,
    error_fields,
    sample_reply,
    sse_event,
    wants_msgpack,
)
from common.server.admission import Admission
from common.server.bodies import BodyWriter, send_body
from common.server.control import WorkerControl
from common.server.device_api import DeviceApi
from common.server.engine_client import Ended
from common.server.engine_groups import EngineGroups
from common.server.http import EventStream, make_application, together
from common.server.occupation import Occupation
from common.server.output import Answer, SampleOutput, logprobs_of
from common.server.tokenizer import Tokenizer
from common.server.updates import Updates
from common.server.weights_api import WeightsApi

Result = TypeVar("Result")

# What takes longer than about a millisecond is done in a thread: the tokenizer's work on this many characters or tokens.
_LONG_TEXT_CHARS: Final = 4096
_LONG_OUTPUT_TOKENS: Final = 1024


class WorkerApp:
    """The routes of one worker."""

    def __init__(
        self,
        kind: WorkerKind,
        engine: EngineGroups,
        ready: EngineReady,
        tokenizer: Tokenizer,
        model: ModelOptions,
        server: ServerOptions,
        options: EngineOptions,
        *,
        bootstrap_port: int | None,
    ) -> None:
        self._leg = leg_of(kind)
        self._engine = engine
        self._ready = ready
        self._tokenizer = tokenizer
        self._server = server
        self._admission = Admission(server.max_open_requests)
        self._updates = Updates(
            engine,
            weight_version=ready.weight_version,
            model_path=model.model,
            deadline_s=options.weights_deadline_s,
            leg=self._leg,
        )
        self._weights_api = WeightsApi(
            self._updates,
            num_ranks=engine.ranks.tp,
            leg=self._leg,
            deadline_s=options.weights_deadline_s,
            max_bytes=server.max_weights_bytes,
            allow_pickled=options.allow_pickled_weights,
        )
        occupation = Occupation(
            engine,
            self._updates,
            is_enabled=options.enable_memory_saver,
            deadline_s=options.weights_deadline_s,
            leg=self._leg,
        )
        self._device_api = DeviceApi(
            kind,
            engine,
            self._updates,
            occupation,
            profile_folder=options.profile_folder,
            deadline_s=options.weights_deadline_s,
        )
        self._control = WorkerControl(
            kind,
            engine,
            ready,
            model,
            self._updates,
            self._admission,
            self._deadline,
            health_deadline_s=options.health_deadline_s,
            bootstrap_port=bootstrap_port,
            enable_memory_saver=options.enable_memory_saver,
        )

    def application(self) -> web.Application:
        """Make the aiohttp application."""
        app = make_application(self._server, self._leg)
        app.router.add_post("/generate", self._generate)
        app.add_routes(self._control.routes())
        app.add_routes(self._weights_api.routes())
        app.add_routes(self._device_api.routes())
        return app

    async def drain(self) -> None:
        """Refuse new requests, and wait until the open ones have been answered."""
        await self._admission.drain()

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        started = asyncio.get_running_loop().time()
        call = parse_generate(await request.read())
        as_msgpack = wants_msgpack(request.headers.get("Accept"), stream=call.stream)
        with self._admission.admit(call.num_answers):
            if call.stream:
                return await self._stream(request, call, started)
            return await self._send_whole(request, call, as_msgpack, started)

    # -------------------------------------------------------------------------------------------- replies

    async def _send_whole(
        self, request: web.Request, call: GenerateCall, as_msgpack: bool, started: float
    ) -> web.StreamResponse:
        async with self._deadline(started=started):
            messages = await self._messages_of(call)
            pairs = zip(call.samples, messages, strict=True)
            answers = await together([self._answers(sample, message) for sample, message in pairs])
        writer = BodyWriter(binary=as_msgpack)
        replies = [
            self._last_reply(sample, answer, started, writer)
            for sample, mine in zip(call.samples, answers, strict=True)
            for answer in mine
        ]
        encode = encode_msgpack if as_msgpack else encode_json
        body = writer.body(encode(replies if self._answers_list(call) else replies[0]))
        return await send_body(request, body, binary=as_msgpack)

    async def _stream(self, request: web.Request, call: GenerateCall, started: float) -> web.StreamResponse:
        client = EventStream(request)
        is_list = self._answers_list(call)

        async def relay(sample: Sample, message: Generate, first_index: int) -> None:
            async with aclosing(self._run(sample, message)) as events:
                async for number, event in events:
                    place: Reply = {"index": first_index + number} if is_list else {}
                    if isinstance(event, Answer):
                        writer = BodyWriter()
                        reply = self._last_reply(sample, event, started, writer)
                        await client.send_body(writer.body(sse_event({**reply, **place})))
                    else:
                        await client.send(sse_event({**event, **place}))

        try:
            async with self._deadline(started=started):
                messages = await self._messages_of(call)
                triples = zip(call.samples, messages, self._first_indices(call), strict=True)
                await together([relay(*triple) for triple in triples])
        except TandemError as error:
            if not client.response.prepared:
                raise
            await client.end(sse_event(error_fields(ErrorReport.of(error, leg=self._leg))))
        else:
            await client.end(SSE_DONE)
        return client.response

    def _last_reply(self, sample: Sample, answer: Answer, started: float, writer: BodyWriter) -> Reply:
        finished, rows = answer.ended
        options = sample.options
        if rows is None and options.return_routed_experts and finished.finish_reason.type != "abort":
            raise MissingRows(f"the engine has ended {sample.rid!r} without its routed-expert rows", leg=self._leg)
        return sample_reply(
            finished,
            text=answer.text,
            options=options,
            weight_version=self._updates.weight_version,
            e2e_latency_s=asyncio.get_running_loop().time() - started,
            rows=None if rows is None else writer.rows(rows, options.routed_experts_dtype),
            logprobs=answer.logprobs,
            prompt_ids=answer.prompt_ids,
            is_leg=True,
        )

    def _answers_list(self, call: GenerateCall) -> bool:
        """Say whether the reply is a list. A prefill leg has one answer for all samples of a prompt."""
        return call.has_prompt_list if self._leg == "prefill" else call.is_list

    def _first_indices(self, call: GenerateCall) -> list[int]:
        """Number all answers through; gives the number of each prompt's first one."""
        indices = [0]
        for sample in call.samples:
            indices.append(indices[-1] + self._num_ends(sample))
        return indices[:-1]

    def _num_ends(self, sample: Sample) -> int:
        return 1 if self._leg == "prefill" else sample.options.sampling.n

    # -------------------------------------------------------------------------------------------- one prompt

    async def _messages_of(self, call: GenerateCall) -> list[Generate]:
        """Check all prompts before the first one starts, so that a refused request leaves nothing behind."""
        return [await self._message_of(sample) for sample in call.samples]

    async def _message_of(self, sample: Sample) -> Generate:
        """Tokenise and check a prompt. Raises RequestError."""
        self._check_bootstrap(sample)
        input_ids = await self._input_ids_of(sample)
        check_limits(
            sample,
            len(input_ids),
            vocab_size=self._ready.vocab_size,
            context_tokens=self._ready.context_tokens,
            kv_pool_tokens=self._ready.kv_pool_tokens,
        )
        message = Generate(rid=sample.rid, input_ids=input_ids, options=sample.options, bootstrap=sample.bootstrap)
        self._engine.check_group(message)
        return message

    def _check_bootstrap(self, sample: Sample) -> None:
        has_room, has_tokens = sample.bootstrap is not None, sample.options.sampling.max_new_tokens > 0
        if self._leg is None:
            if has_room:
                raise RequestError("bootstrap_room", "an aggregated worker serves whole requests, and no leg of a pair")
        elif not has_room and (self._leg == "decode" or has_tokens):
            raise RequestError(
                "bootstrap_room", f"a {self._leg} worker needs the room that ties its leg to the other one"
            )

    async def _input_ids_of(self, sample: Sample) -> list[int]:
        tokenizer, text, messages = self._tokenizer, sample.text, sample.messages
        if text is not None:
            return await _run_where_it_fits(lambda: tokenizer.encode(text), is_long=len(text) > _LONG_TEXT_CHARS)
        if messages is not None:
            num_chars = sum(len(str(message["content"])) for message in messages)
            return await _run_where_it_fits(
                lambda: tokenizer.encode_chat(messages, sample.chat_template_kwargs),
                is_long=num_chars > _LONG_TEXT_CHARS,
            )
        return list(sample.input_ids or ())

    async def _answers(self, sample: Sample, message: Generate) -> list[Answer]:
        """Run one prompt to its end; its answers in the order of their samples."""
        answers: dict[int, Answer] = {}
        async with aclosing(self._run(sample, message)) as events:
            async for index, event in events:
                if isinstance(event, Answer):
                    answers[index] = event
        return [answers[index] for index in range(self._num_ends(sample))]

    async def _run(self, sample: Sample, message: Generate) -> AsyncGenerator[tuple[int, Reply | Answer], None]:
        """Run one prompt: if it streams, an event for each update of a sample, and in any case an answer for each sample.

        Raises ReportedError.
        """
        options, num_ends = sample.options, self._num_ends(sample)
        outputs: list[SampleOutput] = []
        if self._leg != "prefill":
            outputs = await _run_where_it_fits(
                lambda: [SampleOutput(message, self._tokenizer) for _ in range(num_ends)],
                is_long=options.resumed_tokens > _LONG_OUTPUT_TOKENS,
            )
        async with self._engine.generate(message, num_ends=num_ends) as updates:
            async for update in updates:
                match update:
                    case Ended():
                        yield update.finished.index, await self._end(outputs, update, sample)
                    case Tokens():
                        output = outputs[update.index]
                        if output.has_stopped:
                            continue
                        if (stop := output.take(update)) is not None:
                            self._engine.stop_at(
                                sample.rid, update.index, num_tokens=stop.num_tokens, matched=stop.matched
                            )
                        if options.stream:
                            yield update.index, output.progress()
                    case Failed():
                        raise ReportedError(update.error)
                    case _:
                        assert_never(update)

    async def _end(self, outputs: Sequence[SampleOutput], ended: Ended, sample: Sample) -> Answer:
        finished, tokenizer = ended.finished, self._tokenizer
        num_prompt_logprobs = 0 if finished.prompt_logprobs is None else len(finished.prompt_logprobs.token_ids)
        num_output = len(finished.token_ids) + sample.options.resumed_tokens
        is_long = num_output + num_prompt_logprobs > _LONG_OUTPUT_TOKENS
        if self._leg == "prefill":
            # The first tokens of several samples are no text, and of one sample the decode leg tells.
            return await _run_where_it_fits(
                lambda: Answer(ended, "", logprobs_of(ended, sample.options, tokenizer)), is_long=is_long
            )
        return await _run_where_it_fits(lambda: outputs[finished.index].end(ended), is_long=is_long)

    @asynccontextmanager
    async def _deadline(self, limit_s: float | None = None, *, started: float | None = None) -> AsyncIterator[None]:
        """Bound a request's time, by default by that of all requests and from now on. Raises DeadlineExceeded."""
        limit_s = self._server.request_deadline_s if limit_s is None else limit_s
        begin = asyncio.get_running_loop().time() if started is None else started
        try:
            async with asyncio.timeout_at(begin + limit_s):
                yield
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"not done within {limit_s:g} s", leg=self._leg, stage=self._leg or "generate"
            ) from error


async def _run_where_it_fits(function: Callable[[], Result], *, is_long: bool) -> Result:
    """Call a function, in a thread if it would keep the event loop from its other requests."""
    return await asyncio.to_thread(function) if is_long else function()
