"""POST /v1/completions and /v1/chat/completions: OpenAI's dialect around the same pairs.

Rows go into `sglext` beside the choices, those of the first one, or with `return_meta_info` into every choice's own
`meta_info`; in a stream into the last chunk, or into each choice's last. Chat prompts travel to the legs as messages: the
router has no tokenizer. Neighbours: `common.protocol.openai` and `openai_replies` (the translation), `streaming`.
"""

import asyncio
import logging
from typing import Protocol

import msgspec
from aiohttp import web
from msgspec.structs import replace

from common.errors import TandemError
from common.messages import ErrorReport
from common.protocol.generate import Sample
from common.protocol.openai import (
    CHAT_RENAMES,
    COMPLETION_RENAMES,
    OpenAICall,
    Renames,
    openai_error,
    parse_chat,
    parse_completion,
)
from common.protocol.openai_replies import Progress, choice, delta_choices, envelope, final_choice, now, usage
from common.protocol.replies import Reply, encode_json, encode_msgpack, sse_event, version_fields, wants_msgpack
from common.server.admission import Admission
from common.server.bodies import Body, BodyWriter, send_body
from common.server.http import error_response, together
from router.combine import Answer
from router.intake import Times
from router.replies import sample_meta
from router.resume import Resumed
from router.routing_key import keyed
from router.streaming import send_stream

_log = logging.getLogger(__name__)


class _Parse(Protocol):
    def __call__(self, body: bytes, /, *, allow_mixed_versions: bool) -> OpenAICall:
        """Read a body."""


class OpenAIApi:
    """The two generating routes of OpenAI's API."""

    def __init__(self, prompts: Resumed, admission: Admission, *, allow_mixed_versions: bool) -> None:
        self._prompts = prompts
        self._admission = admission
        self._allow_mixed_versions = allow_mixed_versions

    async def completions(self, request: web.Request, times: Times) -> tuple[web.StreamResponse, int]:
        """POST /v1/completions."""
        return await self._answered(request, times, parse_completion, COMPLETION_RENAMES)

    async def chat(self, request: web.Request, times: Times) -> tuple[web.StreamResponse, int]:
        """POST /v1/chat/completions."""
        return await self._answered(request, times, parse_chat, CHAT_RENAMES)

    async def _answered(
        self, request: web.Request, times: Times, parse: _Parse, renames: Renames
    ) -> tuple[web.StreamResponse, int]:
        """Answer, errors too: OpenAI's error object has more than ours."""
        try:
            call = parse(await request.read(), allow_mixed_versions=self._allow_mixed_versions)
            call = replace(call, generate=keyed(call.generate, request.headers))
            as_msgpack = wants_msgpack(request.headers.get("Accept"), stream=call.generate.stream)
            with self._admission.admit(call.generate.num_answers):
                if call.generate.stream:
                    writer = _Chunks(call, renames)
                    samples = call.generate.samples
                    return await send_stream(request, samples, self._prompts, writer, times)
                return await self._send_whole(request, call, times, as_msgpack=as_msgpack), 200
        except TandemError as error:
            report = ErrorReport.of(error)
            _log.warning("request %s failed with %d: %s", report.rid, report.status, report.message)
            response = error_response(report)
            response.body = encode_json(openai_error(report, renames))
            return response, report.status

    async def _send_whole(
        self, request: web.Request, call: OpenAICall, times: Times, *, as_msgpack: bool
    ) -> web.StreamResponse:
        samples = call.generate.samples
        # Of several prompts' rows only the first one's leave, unless every choice has its own.
        num_with_rows = len(samples) if call.return_meta_info else 1
        running = [
            self._prompts.answer(sample, deadline=times.deadline, as_base64=not as_msgpack and index < num_with_rows)
            for index, sample in enumerate(samples)
        ]
        answers = await together(running)
        latency_s = asyncio.get_running_loop().time() - times.started
        writer = BodyWriter(binary=as_msgpack)
        flat = [(sample, answer) for sample, mine in zip(samples, answers, strict=True) for answer in mine]
        choices = [_choice(call, index, answer) for index, (_, answer) in enumerate(flat)]
        if call.return_meta_info:
            for one, (sample, answer) in zip(choices, flat, strict=True):
                one["meta_info"] = sample_meta(sample, answer, latency_s, writer)
        reply = envelope(call, choices, now(), is_chunk=False)
        reply["usage"] = usage(
            prompt_tokens=sum(mine[0].prompt_tokens for mine in answers),
            completion_tokens=sum(len(answer.output_ids) for _, answer in flat),
            cached_tokens=sum(mine[0].cached_tokens for mine in answers),
        )
        if not call.return_meta_info:
            reply |= _extension(*flat[0], writer)
        encoded = encode_msgpack(reply) if as_msgpack else encode_json(reply)
        return await send_body(request, writer.body(encoded), binary=as_msgpack)


class _Chunks:
    """The chunks of one stream; `streaming` calls this, one event at a time."""

    def __init__(self, call: OpenAICall, renames: Renames) -> None:
        self._call = call
        self._renames = renames
        self._created = now()
        self._progress = [Progress() for _ in range(call.generate.num_answers)]
        self._num_running = call.generate.num_answers
        self._first: tuple[Sample, Answer] | None = None
        self._prompt_tokens: dict[str, tuple[int, int]] = {}
        self._completion_tokens = 0

    def progress(self, index: int, event: Reply) -> bytes:
        """Write what is new of a choice that goes on; nothing if it is nothing."""
        told = msgspec.convert(event, _Event)
        return b"".join(
            self._chunk([one])
            for one in delta_choices(
                self._call,
                index,
                self._progress[index],
                told.text,
                told.meta_info.output_token_logprobs,
                told.meta_info.output_top_logprobs,
            )
        )

    def last(self, index: int, sample: Sample, answer: Answer, e2e_latency_s: float) -> Body:
        """Write the rest of a choice, and after the last one what belongs to them all."""
        call, writer = self._call, BodyWriter()
        logprobs = answer.logprobs
        deltas = delta_choices(
            call,
            index,
            self._progress[index],
            answer.text,
            logprobs.output_token_logprobs,
            logprobs.output_top_logprobs,
        )
        chunks = [self._chunk([one]) for one in deltas]
        self._count(index, sample, answer)
        end = final_choice(call, index, answer.finish_reason)
        if call.return_meta_info:
            end["meta_info"] = sample_meta(sample, answer, e2e_latency_s, writer)
        is_over = self._num_running == 0
        extension: Reply = {}
        if is_over and self._first is not None:
            extension = _extension(*self._first, writer)
        if is_over and call.include_usage:
            chunks += [self._chunk([end]), self._chunk([], {"usage": self._usage(), **extension})]
        else:
            chunks.append(self._chunk([end], extension))
        return writer.body(b"".join(chunks))

    def error(self, report: ErrorReport) -> bytes:
        """Write the event that ends a stream that failed."""
        return sse_event(openai_error(report, self._renames))

    def _count(self, index: int, sample: Sample, answer: Answer) -> None:
        self._num_running -= 1
        self._prompt_tokens[sample.rid] = (answer.prompt_tokens, answer.cached_tokens)
        self._completion_tokens += len(answer.output_ids)
        # Kept for its rows, which may be many.
        if index == 0 and not self._call.return_meta_info:
            self._first = (sample, answer)

    def _usage(self) -> Reply:
        return usage(
            prompt_tokens=sum(prompt_tokens for prompt_tokens, _ in self._prompt_tokens.values()),
            completion_tokens=self._completion_tokens,
            cached_tokens=sum(cached_tokens for _, cached_tokens in self._prompt_tokens.values()),
        )

    def _chunk(self, choices: list[Reply], more: Reply | None = None) -> bytes:
        chunk = envelope(self._call, choices, self._created, is_chunk=True)
        if self._call.include_usage:
            chunk["usage"] = None
        return sse_event({**chunk, **more} if more else chunk)


class _EventMeta(msgspec.Struct, frozen=True):
    output_token_logprobs: list[tuple[float | None, int, str | None]] | None = None
    output_top_logprobs: list[list[tuple[float | None, int, str | None]] | None] | None = None


class _Event(msgspec.Struct, frozen=True):
    """What a chunk needs of a leg's event."""

    text: str
    meta_info: _EventMeta


def _choice(call: OpenAICall, index: int, answer: Answer) -> Reply:
    logprobs = answer.logprobs
    return choice(
        call,
        index,
        answer.text,
        answer.finish_reason,
        logprobs.output_token_logprobs,
        logprobs.output_top_logprobs,
    )


def _extension(sample: Sample, answer: Answer, writer: BodyWriter) -> Reply:
    """Make `sglext`, if there are rows."""
    if answer.rows is None:
        return {}
    rows = writer.rows(answer.rows, sample.options.routed_experts_dtype, answer.lead)
    return {"sglext": {**rows, **version_fields(answer.weight_versions, answer.weight_version)}}
