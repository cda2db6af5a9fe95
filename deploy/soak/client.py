"""One request in one of many shapes, sent to `/generate`, and all that came back, as it came.

It decides nothing about what came: whatever may go wrong on the wire is a field of `Received`. Neighbours: `cases` (what
is asked), `judge` (whether the answer is right), `load` (when what is sent).
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Literal

import aiohttp
import msgspec
from msgspec import Struct

from deploy.replay.client import MSGPACK, FinishReason, Reply
from deploy.soak.cases import Case

DONE = b"[DONE]"


class Job(Struct, frozen=True, kw_only=True):
    """What to ask for: one prompt or a list of them, n samples each. `start` is `routed_experts_start_len`."""

    rid: str
    cases: list[Case]
    is_list: bool
    n: int
    form: Literal["json", "msgpack", "stream"]
    dtype: Literal["int32", "auto"]
    start: int

    @property
    def expected(self) -> list[Case]:
        """The right answers, in the order of the reply."""
        return [case for case in self.cases for _ in range(self.n)]

    @property
    def body(self) -> dict[str, Any]:
        """The request's body."""
        sampling = [
            {"n": self.n, "max_new_tokens": len(case.output_ids), "temperature": 0, "ignore_eos": True}
            for case in self.cases
        ]
        prompts = [case.prompt for case in self.cases]
        rids = [f"{self.rid}-{index}" for index in range(len(self.cases))]
        return {
            "rid": rids if self.is_list else self.rid,
            "input_ids": prompts if self.is_list else prompts[0],
            "sampling_params": sampling if self.is_list else sampling[0],
            "stream": self.form == "stream",
            "return_routed_experts": True,
            "routed_experts_dtype": self.dtype,
            "routed_experts_start_len": self.start,
        }


class ErrorFields(Struct, frozen=True, kw_only=True):
    """The contract's error: what every failure has to say."""

    message: str
    code: str = ""
    leg: str | None = None
    stage: str | None = None


class Received(Struct, frozen=True, kw_only=True):
    """All that a request's client saw. Without `error`, `breach` and `is_hung` it is a whole answer."""

    replies: dict[int, Reply] = {}
    progress: list[tuple[int, list[int]]] = []
    """A stream's events before each sample's last: which sample, and its tokens so far."""
    error: ErrorFields | None = None
    breach: str = ""
    """Neither an answer nor an error: a broken connection, a body that cannot be read."""
    is_hung: bool = False


class _ErrorBody(Struct, frozen=True):
    error: ErrorFields


class _EventMeta(Struct, frozen=True):
    finish_reason: FinishReason | None = None


class _Event(Struct, frozen=True):
    """The part of an event that tells what kind it is."""

    index: int = 0
    output_ids: list[int] = []
    meta_info: _EventMeta = _EventMeta()
    error: ErrorFields | None = None


async def send(session: aiohttp.ClientSession, url: str, job: Job) -> Received:
    """Send the request and take in its answer. The session's timeout is what makes it count as hung."""
    replies: dict[int, Reply] = {}
    progress: list[tuple[int, list[int]]] = []
    error, breach, is_hung = None, "", False
    accept = MSGPACK if job.form == "msgpack" else "application/json"
    try:
        async with session.post(f"{url}/generate", json=job.body, headers={"Accept": accept}) as response:
            if response.status != 200:
                content = await response.read()
                try:
                    error = msgspec.json.decode(content, type=_ErrorBody).error
                except msgspec.DecodeError:
                    breach = f"status {response.status} with {content[:200]!r}"
            elif job.form == "stream":
                error = await _read_stream(response, replies, progress)
            else:
                whole = _decode_whole(await response.read(), response.content_type, len(job.expected) > 1)
                replies.update(enumerate(whole))
    except TimeoutError:
        is_hung = True
    except (aiohttp.ClientError, OSError) as broken:
        breach = f"{type(broken).__name__}: {broken}"
    except (msgspec.DecodeError, UnfinishedStreamError) as unreadable:
        breach = str(unreadable)
    return Received(replies=replies, progress=progress, error=error, breach=breach, is_hung=is_hung)


async def abort(session: aiohttp.ClientSession, url: str, job: Job) -> bool:
    """Ask for the request's end; False if not even that was answered in time. How, the request itself shows."""
    try:
        async with session.post(f"{url}/abort_request", json={"rid": job.rid}) as response:
            await response.read()
    except TimeoutError:
        return False
    except aiohttp.ClientError:
        return True
    return True


class UnfinishedStreamError(Exception):
    """The stream ended with neither `[DONE]` nor an error."""


def _decode_whole(content: bytes, content_type: str, is_list: bool) -> list[Reply]:
    decode = msgspec.msgpack.decode if content_type == MSGPACK else msgspec.json.decode
    return decode(content, type=list[Reply]) if is_list else [decode(content, type=Reply)]


async def _read_stream(
    response: aiohttp.ClientResponse, replies: dict[int, Reply], progress: list[tuple[int, list[int]]]
) -> ErrorFields | None:
    """Take in all events; returns the error that ended the stream, None if `[DONE]` did."""
    async for data in _events(response):
        if data == DONE:
            return None
        event = msgspec.json.decode(data, type=_Event)
        if event.error is not None:
            return event.error
        if event.meta_info.finish_reason is None:
            progress.append((event.index, event.output_ids))
        else:
            replies[event.index] = msgspec.json.decode(data, type=Reply)
    raise UnfinishedStreamError("the stream ended with neither [DONE] nor an error")


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    rest = b""
    async for chunk in response.content.iter_any():
        *events, rest = (rest + chunk).split(b"\n\n")
        for event in events:
            yield event.removeprefix(b"data: ")
            # A burst of events must not keep the loop from its other clients.
            await asyncio.sleep(0)
