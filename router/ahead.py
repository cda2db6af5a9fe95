"""What is done with a leg's rows as soon as they are here, while the other leg still runs.

    prefill   reply, verify -> slice slice slice ...
    decode    .............................. reply, verify -> merge -> slice -> client

All rows are verified when they arrive, and nothing but an `Arrived` is combined (R5). Where rows leave as base64, that of
the prefill leg's, which are nearly all, is begun with: the first slices of what the merge will give, as many as there is
time for. Whoever writes the body makes the others. Neighbours: `pair` (calls this), `combine`, `common.server.bodies`.
"""

import asyncio
import weakref
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

from common.errors import RowsError
from common.messages import Leg, RowBlock
from common.protocol.legs import LegReply
from common.routed_experts.codec import RowForm, base64_length, base64_slices, num_full_slices, view
from common.routed_experts.verify import verify
from common.server.bodies import in_trips

# Verifying more than this would keep the event loop from its other requests for too long (R16).
_LARGE_ROWS_BYTES = 2**20
# All prompts together may have this much base64 waiting for their decode legs: some 16 prompts of 32k tokens.
_MAX_LEAD_BYTES = 2**30


class Arrived(NamedTuple):
    """A leg's reply, and its rows if they were asked for; their bytes have been checked."""

    reply: LegReply
    rows: RowBlock | None


async def arrive(leg: Leg | None, reply: LegReply, *, wants_rows: bool, verify_rows: bool) -> Arrived:
    """Check the rows of a reply, in a thread if they are many. Raises RowsError, which names the leg."""
    rows = reply.rows if wants_rows else None
    if rows is None:
        return Arrived(reply, None)
    check: Callable[[RowBlock], object] = verify if verify_rows else view
    try:
        if len(rows.data) > _LARGE_ROWS_BYTES:
            await asyncio.to_thread(check, rows)
        else:
            check(rows)
    except RowsError as error:
        error.leg, error.stage = leg, "verify"
        raise
    return Arrived(reply, rows)


class Lead(list[bytes]):
    """The first slices of a block's base64. A class of its own because a plain list cannot tell when it is gone."""


class LeadEncoder:
    """Encodes ahead for all prompts, within a bound on what lies in memory."""

    def __init__(self, max_bytes: int = _MAX_LEAD_BYTES) -> None:
        self._free_bytes = max_bytes

    async def encode(self, leg: asyncio.Task[list[Arrived]], form: RowForm, is_over: asyncio.Event) -> Lead:
        """Encode the full slices of a leg's rows once it has ended, until `is_over`. Raises what the leg has raised.

        The lead counts against the bound until nobody holds it any more.
        """
        await asyncio.wait([leg])
        lead, block = Lead(), leg.result()[0].rows
        num_slices = 0 if block is None else num_full_slices(block.header, form)
        if block is None or num_slices == 0 or is_over.is_set():
            return lead
        num_bytes = base64_length(block.header, form)
        if num_bytes > self._free_bytes:
            return lead
        self._free_bytes -= num_bytes
        weakref.finalize(lead, self._give_back, num_bytes)
        async for batch in in_trips(islice(base64_slices(block, form), num_slices)):
            lead += batch
            if is_over.is_set():
                break
        return lead

    def _give_back(self, num_bytes: int) -> None:
        self._free_bytes += num_bytes
