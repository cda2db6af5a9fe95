"""Event streams to the client: the events of all samples as they come, and rows in each sample's last one.

Until the first event is there nothing is sent, so that an early failure still has its status. A later one becomes an
event, and then the stream ends without `[DONE]`. It knows no dialect: whoever calls it brings a writer of events.
Neighbours: `generate_api` and `openai_api` (call it), `resume` (where the events come from).
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import aclosing
from typing import Protocol

from aiohttp import web

from common.messages import ErrorReport, ReportedError
from common.protocol.generate import Sample
from common.protocol.replies import SSE_DONE, Reply
from common.server.bodies import Body
from common.server.http import EventStream, together
from router.combine import Answer
from router.intake import Times
from router.resume import Resumed

_log = logging.getLogger(__name__)


class EventWriter(Protocol):
    """Writes events in the client's dialect. `index` counts the samples of all prompts."""

    def progress(self, index: int, event: Reply) -> bytes:
        """Write what tells of a sample that goes on; the event's text and ids are cumulative."""

    def last(self, index: int, sample: Sample, answer: Answer, e2e_latency_s: float) -> Body:
        """Write what tells of a sample's end."""

    def error(self, report: ErrorReport) -> bytes:
        """Write what ends a stream that failed."""


async def send_stream(
    request: web.Request,
    samples: Sequence[Sample],
    prompts: Resumed,
    writer: EventWriter,
    times: Times,
) -> tuple[web.StreamResponse, int]:
    """Run all samples and write their events; returns the response and the status that tells how it went.

    Raises ReportedError if a sample fails before the first event of any.
    """
    loop = asyncio.get_running_loop()
    client = EventStream(request)
    # What an event says depends on those before it, so they are sent in the order in which they were written.
    turn = asyncio.Lock()

    async def relay(sample: Sample, first_index: int) -> None:
        async with aclosing(prompts.stream(sample, deadline=times.deadline)) as events:
            async for number, content in events:
                index = first_index + number
                async with turn:
                    if isinstance(content, Answer):
                        await client.send_body(writer.last(index, sample, content, loop.time() - times.started))
                    elif event := writer.progress(index, content):
                        await client.send(event)

    try:
        await together([relay(sample, index) for sample, index in zip(samples, first_indices(samples), strict=True)])
    except ReportedError as error:
        if not client.response.prepared:
            raise
        _log.warning("stream %s failed with %d: %s", error.report.rid, error.report.status, error)
        await client.end(writer.error(error.report))
        return client.response, error.report.status
    await client.end(SSE_DONE)
    return client.response, 200


def first_indices(samples: Sequence[Sample]) -> list[int]:
    """Number the samples of all prompts through, those of one prompt together; gives each prompt's first number."""
    indices = [0]
    for sample in samples:
        indices.append(indices[-1] + sample.options.sampling.n)
    return indices[:-1]
