"""What a stream tells of a prompt's samples, whichever workers it comes from.

Neighbours: `pair` and `alone` (make these), `attempts`, `resume` and `streaming` (pass them on).
"""

from typing import NamedTuple

from common.protocol.replies import Reply
from router.combine import Answer


class SampleEvent(NamedTuple):
    """What a stream tells of one sample of its prompt, the `number`th from 0: its text so far, or its end."""

    number: int
    content: Reply | Answer


def progress_event(event: Reply, rid: str) -> SampleEvent:
    """Make the event of a sample that goes on of a leg's, with the client's rid in the place of the leg's."""
    index, meta = event.pop("index", 0), event["meta_info"]
    assert isinstance(index, int)
    assert isinstance(meta, dict)
    meta["id"] = rid
    return SampleEvent(index, event)
