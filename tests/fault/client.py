"""A client of /generate that tells how its request ended, whatever became of it; it waits for as long as it takes."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import aiohttp

from tests.fault.runner import Outcome
from tests.support.asking import last_event

ABORTED = "aborted by request "


class Asked:
    """A request on its way; `ended` is its outcome.

    `check` says in what a whole answer differs from the reference, "" if in nothing.
    """

    def __init__(
        self,
        url: str,
        body: dict[str, Any],
        check: Callable[[dict[str, Any]], str],
        *,
        has_another_pair: bool = False,
    ) -> None:
        self.url = url
        self.rid = body.get("rid", "")
        self._has_begun = asyncio.Event()
        self._is_told = False
        self.is_stream = bool(body.get("stream"))
        self._body = body
        self._check = check
        self._has_another_pair = has_another_pair
        self.ended = asyncio.create_task(self._run())

    async def told(self) -> None:
        """Wait until something of its answer has come: what strikes from now on cannot be hidden from the client."""
        await self._has_begun.wait()
        self._is_told = True

    def leave(self) -> None:
        """Let the client go."""
        self.ended.cancel()

    async def outcome(self) -> Outcome:
        """Wait for the end."""
        try:
            return await self.ended
        except asyncio.CancelledError:
            if not self.ended.cancelled():
                raise
            return Outcome(end="left")

    async def _run(self) -> Outcome:
        timeout = aiohttp.ClientTimeout(total=None)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.post(f"{self.url}/generate", json=self._body) as response,
            ):
                text = ""
                async for chunk in response.content.iter_any():
                    self._has_begun.set()
                    text += chunk.decode()
                status, is_json = response.status, response.content_type == "application/json"
        except (aiohttp.ClientError, OSError) as error:
            return Outcome(end="lost", message=repr(error))
        return self._judged(status, json.loads(text) if is_json else last_event(text), is_told=not is_json)

    def _judged(self, status: int, reply: dict[str, Any], *, is_told: bool) -> Outcome:
        if "error" in reply:
            error = reply["error"]
            return Outcome(
                end="error",
                leg=error.get("leg"),
                stage=error.get("stage"),
                status=status,
                message=error["message"],
                is_told=is_told,
                has_another_pair=self._has_another_pair,
            )
        reason = reply["meta_info"]["finish_reason"]
        is_aborted = reason["type"] == "abort"
        return Outcome(
            end="aborted" if is_aborted else "answer",
            wrong=self._check(reply),
            stage=reason["message"].removeprefix(ABORTED) if is_aborted else None,
            status=status,
            is_told=self._is_told,
            has_another_pair=self._has_another_pair,
        )
