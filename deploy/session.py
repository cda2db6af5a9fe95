"""A conversation: each turn sends all tokens so far and gets the rows of the new positions alone.

What is held is one sequence: `token_ids`, and a row for each position but the last token's, which has not entered a forward
pass. Neighbours: `deploy.client` (sends), `deploy.replies` (reads strictly, and joins pieces).
"""

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from common.ids import new_rid
from common.versions import Spans
from deploy.answers import Ids, MalformedRowsError
from deploy.replies import Reply, RowKind, join_versions


class Generates(Protocol):
    """Who sends; `deploy.client.TandemClient` is the real one."""

    async def generate(self, *, input_ids: Sequence[int], start_len: int, **asked: Any) -> Reply:
        """Generate one sample, with the rows from `start_len` on."""

    async def resume(self, partial: Reply, prompt_ids: Sequence[int], **asked: Any) -> Reply:
        """Go on behind a reply that somebody ended, and give the whole."""


class Session:
    """One conversation; its turns are taken one after the other.

    `session_id` goes along as `x-session-id`, by which a router can send all turns to the workers that have their prefix.
    A turn that fails leaves everything as it was.
    """

    def __init__(self, client: Generates, session_id: str | None = None) -> None:
        self.session_id = session_id or new_rid()
        self.token_ids: list[int] = []
        self.weight_versions: Spans = ()
        """Of the rows that are held; a later turn may have computed their positions anew, by other weights."""
        self.layer_ids: tuple[int, ...] = ()
        self.bytes_received = 0
        """The lengths of all replies."""
        self._client = client
        self._lock = asyncio.Lock()
        self._blocks: list[Ids] = []
        self._row_kind: RowKind | None = None
        self._last: tuple[list[int], dict[str, Any], Reply] | None = None

    @property
    def num_rows(self) -> int:
        """Rows that are held: P+G-1."""
        return max(0, len(self.token_ids) - 1)

    @property
    def rows(self) -> Ids:
        """The rows of all positions, `[P+G-1, L, K]`. Raises ValueError before the first turn has been answered."""
        if len(self._blocks) > 1:
            self._blocks = [np.concatenate(self._blocks)]
        if not self._blocks:
            raise ValueError("no turn has been answered yet")
        return self._blocks[0]

    async def turn(
        self, new_input_ids: Sequence[int], *, sampling_params: dict[str, Any] | None = None, **fields: Any
    ) -> Reply:
        """Send the tokens so far and the new ones, and take in the answer; its rows begin at those that are held.

        `fields` are further ones of `generate`. An answer that somebody ended counts as far as it goes: `resume`
        goes on with it, another turn behind it. One without any token leaves everything as it was.
        """
        async with self._lock:
            prompt = [*self.token_ids, *new_input_ids]
            asked = {**fields, "sampling_params": sampling_params, "session_id": self.session_id, "rows": True}
            reply = await self._client.generate(input_ids=prompt, start_len=self.num_rows, **asked)
            self._take(prompt, asked, reply, held=self.num_rows)
            return reply

    async def resume(self) -> Reply:
        """Go on with the last turn, which somebody ended; gives the turn's reply as if nobody had."""
        async with self._lock:
            if self._last is None:
                raise ValueError("no turn has been answered yet")
            prompt, asked, partial = self._last
            reply = await self._client.resume(partial, prompt, **asked)
            self._take(prompt, asked, reply, held=self.num_rows)
            self.bytes_received -= partial.num_bytes
            return reply

    def _take(self, prompt: list[int], asked: dict[str, Any], reply: Reply, *, held: int) -> None:
        """Keep what a reply has beyond the `held` positions."""
        if reply.rows is not None:
            if self._row_kind not in (None, reply.row_kind):
                raise MalformedRowsError(
                    f"rows of two kinds (layers, top-k, dtype): {self._row_kind}, {reply.row_kind}"
                )
            self._row_kind = reply.row_kind
            self._blocks.append(reply.rows[held - reply.start :])
            self.token_ids = [*prompt, *reply.output_ids]
            self.layer_ids = reply.layer_ids
            self.weight_versions = join_versions(self.weight_versions, reply.weight_versions, held)
        self.bytes_received += reply.num_bytes
        self._last = prompt, asked, reply
