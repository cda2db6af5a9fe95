"""Sends the samples to `/generate`, so many at a time, and keeps each reply with its latency.

Replies are asked for as msgpack, in which the rows are plain bytes, unless the run is about the default form. A
request that fails is an outcome like any other, with the server's own words; the rest of the run goes on.

It knows the reply's fields, but nothing of what is right in them: `deploy.replay.check` judges that.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import aiohttp
import msgspec
from msgspec import Struct

from common.server.http import bearer
from deploy.replay.workload import Sample

MSGPACK = "application/msgpack"

ReplyForm = Literal["msgpack", "int32"]
"""msgpack with compact rows, or JSON with int32 rows as base64, which is what a client gets that asks for nothing."""


class FinishReason(Struct, frozen=True):
    """Why a reply ended; the fields beside the type differ."""

    type: str
    message: str = ""


class MetaInfo(Struct, frozen=True, kw_only=True):
    """The part of a reply's meta_info that is looked at."""

    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    routed_experts: bytes | None = None
    routed_experts_start_len: int = 0
    routed_experts_shape: tuple[int, int, int] | None = None
    routed_experts_dtype: str | None = None
    routed_experts_layer_ids: list[int] | None = None
    routed_experts_moe_layer_ids: list[int] | None = None


class Reply(Struct, frozen=True):
    """One sample's reply."""

    text: str
    output_ids: list[int]
    meta_info: MetaInfo


class Outcome(Struct, frozen=True, kw_only=True):
    """What became of one sample: a reply, or why there is none."""

    sample: Sample
    reply: Reply | None
    failure: str | None
    latency_s: float


class RequestSettings(Struct, frozen=True, kw_only=True):
    """What all requests of a run have in common."""

    url: str
    concurrency: int
    temperature: float
    rows: bool
    deadline_s: float
    form: ReplyForm = "msgpack"
    api_key: str = ""


class Run(Struct, frozen=True):
    """All outcomes, in the samples' order, and the time from the first request to the last reply."""

    outcomes: list[Outcome]
    wall_s: float


async def send_all(samples: Sequence[Sample], settings: RequestSettings, on_done: Callable[[], object]) -> Run:
    """Send every sample, at most `concurrency` at once; `on_done` is called after each."""
    outcomes: dict[int, Outcome] = {}
    todo = iter(enumerate(samples))

    async def work(session: aiohttp.ClientSession) -> None:
        # All share one iterator: whoever is free takes the next sample.
        for index, sample in todo:
            outcomes[index] = await _send(session, sample, settings)
            on_done()

    timeout = aiohttp.ClientTimeout(total=settings.deadline_s)
    began = time.perf_counter()
    async with (
        aiohttp.ClientSession(
            timeout=timeout, connector=aiohttp.TCPConnector(limit=0), headers=bearer(settings.api_key)
        ) as session,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(min(settings.concurrency, len(samples))):
            group.create_task(work(session))
    return Run([outcomes[index] for index in range(len(samples))], time.perf_counter() - began)


async def fetch_num_experts(url: str, api_key: str = "") -> int | None:
    """Ask the server how many experts its model has; None if it does not say."""
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30), headers=bearer(api_key)) as session,
            session.get(f"{url}/server_info") as response,
        ):
            info = await response.json() if response.status == 200 else None
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return None
    return _find_int(info, "num_experts")


async def _send(session: aiohttp.ClientSession, sample: Sample, settings: RequestSettings) -> Outcome:
    reply: Reply | None = None
    failure: str | None = None
    began = time.perf_counter()
    accept = MSGPACK if settings.form == "msgpack" else "application/json"
    try:
        async with session.post(
            f"{settings.url}/generate", json=_body(sample, settings), headers={"Accept": accept}
        ) as response:
            content = await response.read()
            status, content_type = response.status, response.content_type
        if status == 200:
            reply = decode_reply(content, content_type)
            if reply.meta_info.finish_reason.type == "abort":
                failure = f"aborted: {reply.meta_info.finish_reason.message}"
        else:
            failure = f"{status}: {_error_message(content, content_type)}"
    except msgspec.DecodeError as error:
        failure = f"the reply cannot be read: {error}"
    except TimeoutError:
        failure = f"no reply within {settings.deadline_s:g} s"
    except aiohttp.ClientError as error:
        failure = f"{type(error).__name__}: {error}"
    return Outcome(sample=sample, reply=reply, failure=failure, latency_s=time.perf_counter() - began)


def decode_reply(content: bytes, content_type: str) -> Reply:
    """Read a reply in either form; in JSON the rows are base64, which msgspec undoes for a field of bytes."""
    decode = msgspec.msgpack.decode if content_type == MSGPACK else msgspec.json.decode
    return decode(content, type=Reply)


def _find_int(info: object, key: str) -> int | None:
    """The first number of that name at any depth: a router's account holds those of its workers."""
    if isinstance(info, dict):
        if isinstance(info.get(key), int):
            return int(info[key])
        info = list(info.values())
    found = (_find_int(part, key) for part in info) if isinstance(info, list) else ()
    return next((number for number in found if number is not None), None)


def _body(sample: Sample, settings: RequestSettings) -> dict[str, Any]:
    sampling: dict[str, Any] = {"max_new_tokens": sample.max_new_tokens, "temperature": settings.temperature}
    if settings.temperature > 0:
        # So that a run can be repeated.
        sampling["sampling_seed"] = sample.line
    body: dict[str, Any] = {"sampling_params": sampling}
    body |= {"text": sample.text} if sample.input_ids is None else {"input_ids": sample.input_ids}
    if settings.rows:
        body |= {
            "return_routed_experts": True,
            "routed_experts_dtype": "auto" if settings.form == "msgpack" else "int32",
        }
    return body


def _error_message(content: bytes, content_type: str) -> str:
    try:
        decode = msgspec.msgpack.decode if content_type == MSGPACK else msgspec.json.decode
        return str(decode(content)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return content[:300].decode(errors="replace")
