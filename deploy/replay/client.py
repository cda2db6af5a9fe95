"""Sends the samples to `/generate`, so many at a time, and keeps each reply with its latency.

Replies are asked for as msgpack, in which the rows are plain bytes, unless the run is about the default form. A
request that fails is an outcome like any other, with the server's own words; the rest of the run goes on, and nothing is
tried again.

It knows nothing of what is right in a reply: `deploy.replay.check` judges that. Neighbour: `deploy.connection` (sends).
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct

from common.errors import TandemError
from deploy.answers import ReplyForm, WireReply, accept_of, decode_object, decode_replies
from deploy.connection import NO_RETRIES, Connection, DeadlinePassedError
from deploy.replay.workload import Sample

_INFO_DEADLINE_S = 30.0


class Outcome(Struct, frozen=True, kw_only=True):
    """What became of one sample: a reply, or why there is none."""

    sample: Sample
    reply: WireReply | None
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

    async def work(connection: Connection) -> None:
        # All share one iterator: whoever is free takes the next sample.
        for index, sample in todo:
            outcomes[index] = await _send(connection, sample, settings)
            on_done()

    began = time.perf_counter()
    async with (
        Connection(
            settings.url, api_key=settings.api_key, deadline_s=settings.deadline_s, retries=NO_RETRIES
        ) as connection,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(min(settings.concurrency, len(samples))):
            group.create_task(work(connection))
    return Run([outcomes[index] for index in range(len(samples))], time.perf_counter() - began)


async def fetch_num_experts(url: str, api_key: str = "") -> int | None:
    """Ask the server how many experts its model has; None if it does not say."""
    try:
        async with Connection(url, api_key=api_key, deadline_s=_INFO_DEADLINE_S, retries=NO_RETRIES) as connection:
            info = decode_object(await connection.call("GET", "/server_info"))
    except TandemError:
        return None
    return _find_int(info, "num_experts")


async def _send(connection: Connection, sample: Sample, settings: RequestSettings) -> Outcome:
    reply: WireReply | None = None
    failure: str | None = None
    began = time.perf_counter()
    try:
        body, accept = _body(sample, settings), accept_of(settings.form)
        [reply] = decode_replies(await connection.call("POST", "/generate", body, accept=accept))
        if reply.meta_info.finish_reason.type == "abort":
            failure = f"aborted: {reply.meta_info.finish_reason.message}"
    except DeadlinePassedError:
        failure = f"no reply within {settings.deadline_s:g} s"
    except TandemError as error:
        failure = str(error)
    return Outcome(sample=sample, reply=reply, failure=failure, latency_s=time.perf_counter() - began)


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
