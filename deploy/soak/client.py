"""One request in one of many shapes, sent to `/generate`, and all that came back, as it came.

It decides nothing about what came: whatever may go wrong on the wire is a field of `Received`. Neighbours: `cases` (what
is asked), `judge` (whether the answer is right), `load` (when what is sent).
"""

from typing import Any, Literal

from msgspec import Struct

from common.errors import TandemError
from common.messages import ErrorReport
from deploy.answers import Answer, Progress, WireReply, accept_of, as_event, decode_object, decode_replies
from deploy.client import TandemClient
from deploy.connection import Connection, DeadlinePassedError, ServerError
from deploy.soak.cases import Case


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


class Received(Struct, frozen=True, kw_only=True):
    """All that a request's client saw. Without `error`, `breach` and `is_hung` it is a whole answer."""

    replies: dict[int, WireReply] = {}
    progress: list[tuple[int, list[int]]] = []
    """A stream's events before each sample's last: which sample, and its tokens so far."""
    error: ErrorReport | None = None
    breach: str = ""
    """Neither an answer nor an error: a broken connection, a body that cannot be read."""
    is_hung: bool = False


async def send(connection: Connection, job: Job) -> Received:
    """Send the request once and take in its answer. The connection's deadline is what makes it count as hung."""
    replies: dict[int, WireReply] = {}
    progress: list[tuple[int, list[int]]] = []
    error, breach, is_hung = None, "", False
    try:
        if job.form == "stream":
            async for data in connection.events("/generate", job.body):
                event = as_event(decode_object(Answer(data, "application/json")))
                if isinstance(event, Progress):
                    progress.append((event.index, event.output_ids))
                else:
                    replies[event.index] = event
        else:
            accept = accept_of("msgpack" if job.form == "msgpack" else "int32")
            answer = await connection.call("POST", "/generate", job.body, accept=accept)
            replies.update(enumerate(decode_replies(answer, is_list=len(job.expected) > 1)))
    except ServerError as refused:
        error = refused.report
    except DeadlinePassedError:
        is_hung = True
    except TandemError as broken:
        breach = str(broken)
    return Received(replies=replies, progress=progress, error=error, breach=breach, is_hung=is_hung)


async def abort(client: TandemClient, job: Job) -> bool:
    """Ask for the request's end; False if not even that was answered in time. How, the request itself shows."""
    try:
        await client.abort(job.rid)
    except DeadlinePassedError:
        return False
    except TandemError:
        return True
    return True
