"""Event streams to the client: the events of all samples as they come, and rows in each sample's last one.

Until the first event is there nothing is sent, so that an early failure still has its status. A later one becomes an
event, and then the stream ends without `[DONE]`. Neighbours: `app` (calls it), `pair` (where the events come from),
`replies` (the last event).
"""

import asyncio
import logging
from contextlib import aclosing

from aiohttp import web

from common.messages import ReportedError
from common.protocol.generate import GenerateCall, Sample
from common.protocol.replies import SSE_DONE, Reply, error_fields, sse_event
from common.server.http import EventStream, together
from router.combine import Answer
from router.pair import Pairs
from router.replies import answer_reply

_log = logging.getLogger(__name__)

# Base64 and JSON of more rows than this are made in a thread.
_LARGE_ROWS_BYTES = 256 * 2**10


async def send_stream(
    request: web.Request, call: GenerateCall, pairs: Pairs, *, started: float, deadline: float
) -> tuple[web.StreamResponse, int]:
    """Run all samples and write their events; returns the response and the status that tells how it went.

    Raises ReportedError if a sample fails before the first event of any.
    """
    client = EventStream(request)

    async def relay(sample: Sample, index: int | None) -> None:
        async with aclosing(pairs.stream(sample, deadline=deadline)) as events:
            async for event in events:
                if isinstance(event, Answer):
                    await client.send(await _last_event(sample, event, index, started))
                else:
                    await client.send(sse_event(_indexed(event, index)))

    try:
        await together([relay(sample, i if call.is_list else None) for i, sample in enumerate(call.samples)])
    except ReportedError as error:
        if not client.response.prepared:
            raise
        _log.warning("stream %s failed with %d: %s", error.report.rid, error.report.status, error)
        await client.end(sse_event(error_fields(error.report)))
        return client.response, error.report.status
    await client.end(SSE_DONE)
    return client.response, 200


async def _last_event(sample: Sample, answer: Answer, index: int | None, started: float) -> bytes:
    latency_s = asyncio.get_running_loop().time() - started

    def run() -> bytes:
        return sse_event(_indexed(answer_reply(sample, answer, latency_s), index))

    if answer.rows is not None and len(answer.rows.data) > _LARGE_ROWS_BYTES:
        return await asyncio.to_thread(run)
    return run()


def _indexed(event: Reply, index: int | None) -> Reply:
    """Add the sample's place in the list, if there is a list."""
    return event if index is None else {**event, "index": index}
