"""A client of the router, or of an aggregated worker: asks for rows and gives them as numpy arrays.

    async with TandemClient("http://127.0.0.1:8000") as client:
        reply = await client.generate(input_ids=[5, 7, 9], sampling_params={"max_new_tokens": 8})
        reply.rows  # [P+G-1, MoE layers, K]

What is tried again is said at `deploy.connection.Retries`. It needs no torch: `torch.from_numpy` makes tensors of rows. Neighbours:
`deploy.replies` (what a reply is), `deploy.session` (conversations), `deploy.connection` (HTTP).
"""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec

from common.orders import PauseMode
from deploy.answers import Answer, MalformedReplyError, Progress, ReplyForm, accept_of, as_event, decode_object
from deploy.connection import Connection
from deploy.replies import Ask, Reply, join_replies, make_ask, read_reply, rest_of
from deploy.session import Session


class TandemClient(Connection):
    """Talks to one router; an async context manager, for one event loop. `deadline_s` is of each call, retries included.

    Every call raises ServerError, NoAnswerError, DeadlinePassedError or MalformedReplyError.
    """

    # -------------------------------------------------------------------------------------------- generation

    async def generate(
        self,
        *,
        input_ids: Sequence[int] | None = None,
        text: str | None = None,
        sampling_params: dict[str, Any] | None = None,
        rows: bool = True,
        start_len: int = 0,
        form: ReplyForm = "msgpack",
        session_id: str = "",
        **fields: Any,
    ) -> Reply:
        """Generate one sample; `start_len` leaves out the rows of the first positions, `fields` go into the body.

        `form` msgpack has the rows of MoE layers in the smallest dtype, int32 (JSON) those of all layers, dense ones zero.
        """
        ask = make_ask(
            input_ids=input_ids,
            text=text,
            sampling_params=sampling_params,
            rows=rows,
            start_len=start_len,
            form=form,
            **fields,
        )
        if ask.n != 1:
            raise ValueError("generate gives one sample; samples gives n")
        [reply] = await self._ask(ask, form, session_id)
        return reply

    async def samples(self, *, form: ReplyForm = "msgpack", session_id: str = "", **asked: Any) -> list[Reply]:
        """Generate the n samples of a prompt, which is computed once; `sampling_params` has n, the rest is as for `generate`."""
        return await self._ask(make_ask(form=form, **asked), form, session_id)

    async def stream(self, *, session_id: str = "", **asked: Any) -> AsyncIterator[Progress | Reply]:
        """Give each sample's progress as it comes, and then its reply. Closing the iterator ends the request.

        What to ask for is as for `samples`; a stream is JSON in any case, and `form` says which rows there are in it.
        """
        ask = make_ask(**asked, stream=True)
        async for content in self.events("/generate", ask.body, session_id=session_id):
            event = as_event(body := decode_object(Answer(content, "application/json")))
            yield event if isinstance(event, Progress) else read_reply(body, ask, num_bytes=len(content))

    async def resume(
        self, partial: Reply, prompt_ids: Sequence[int], *, sampling_params: dict[str, Any] | None = None, **fields: Any
    ) -> Reply:
        """Go on behind a reply that somebody ended, and give the whole: the rows that are held do not come again.

        `prompt_ids`, `sampling_params` and `fields` are those of the request that was ended. The result may be partial too.
        """
        if not partial.is_partial:
            raise ValueError(f"nothing is missing: the reply ended with {partial.finish_reason.type}")
        if not partial.output_ids:
            rest = await self.generate(
                input_ids=prompt_ids,
                sampling_params=rest_of(partial, sampling_params),
                start_len=partial.start,
                **fields,
            )
        else:
            rest = await self.generate(
                input_ids=[*prompt_ids, *partial.output_ids],
                sampling_params=rest_of(partial, sampling_params),
                start_len=partial.stop,
                resumed_tokens=len(partial.output_ids),
                **fields,
            )
        return join_replies(partial, rest)

    def session(self, session_id: str | None = None) -> Session:
        """Begin a conversation, whose replies bring the rows of new positions alone."""
        return Session(self, session_id)

    async def _ask(self, ask: Ask, form: ReplyForm, session_id: str) -> list[Reply]:
        answer = await self.call("POST", "/generate", ask.body, accept=accept_of(form), session_id=session_id)
        body = decode_object(answer)
        bodies = [body] if ask.n == 1 else body
        if not isinstance(bodies, list) or len(bodies) != ask.n:
            raise MalformedReplyError(f"the reply is no list of {ask.n} samples")
        num_bytes = len(answer.content)
        return [read_reply(one, ask, num_bytes=num_bytes, index=index) for index, one in enumerate(bodies)]

    # -------------------------------------------------------------------------------------------- control

    async def pause_generation(self, mode: PauseMode = "abort") -> Any:
        """Have all workers rest; `mode` says what becomes of the requests that run."""
        return await self._tell("/pause_generation", {"mode": mode})

    async def continue_generation(self) -> Any:
        """Have all workers go on."""
        return await self._tell("/continue_generation")

    async def update_weights_from_disk(
        self, model_path: str, weight_version: str | None = None, *, deadline_s: float | None = None, **fields: Any
    ) -> Any:
        """Have all workers load weights from a folder. Not repeated once a server has taken it."""
        fields["model_path"] = model_path
        if weight_version is not None:
            fields["weight_version"] = weight_version
        path = "/update_weights_from_disk"
        return decode_object(await self.call("POST", path, fields, is_repeatable=False, deadline_s=deadline_s))

    async def abort(self, rid: str = "", *, abort_all: bool = False) -> Any:
        """End the requests whose rid begins so, or all: each answers with what it has."""
        return await self._tell("/abort_request", {"rid": rid, "abort_all": abort_all})

    async def flush_cache(self) -> Any:
        """Have all workers forget cached prefixes; refused while requests run."""
        return await self._tell("/flush_cache")

    async def workers(self) -> list[dict[str, Any]]:
        """What the router says of each worker."""
        body = decode_object(await self.call("GET", "/workers"))
        try:
            return msgspec.convert(body["workers"], list[dict[str, Any]])
        except (msgspec.ValidationError, KeyError, TypeError) as error:
            raise MalformedReplyError(f"/workers: {error}") from error

    async def server_info(self) -> Any:
        """What the server says of itself and its workers."""
        return decode_object(await self.call("GET", "/server_info"))

    async def _tell(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return decode_object(await self.call("POST", path, body or {}))
