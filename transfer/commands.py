"""What an engine asks of its end of the transfer, and what it hears from it: plain data, for the deques of a `Mailbox`.

Neighbours: `prefill_worker.worker` and `sender`, `decode_worker.worker` and `receiver`.
"""

from msgspec import Struct

from common.messages import ErrorReport, Leg
from transfer.endpoint import Mailbox
from transfer.messages import FirstToken, RoomCode

# ------------------------------------------------------------------------------------------------ prefill: sender


class OpenRoom(Struct, frozen=True):
    """The engine has a prompt whose KV will be wanted under this room."""

    room: int
    prompt_tokens: int
    prompt_digest: bytes


class PagesReady(Struct, frozen=True):
    """Pages of the prompt that will not change any more, following those that were reported before."""

    room: int
    pages: list[int]


class FinishRoom(Struct, frozen=True):
    """All pages have been reported; this is the token that the prefill sampled."""

    room: int
    first_token: FirstToken
    computed_at: float
    """When the engine knew the token, by the sender's clock; what comes after it delays the request."""
    prompt_versions: tuple[str, ...]
    """Weights that have computed the prompt, in order."""


class CancelRoom(Struct, frozen=True):
    """The prefill leg has failed or its client is gone; `code` is what the error's body calls it."""

    room: int
    error: str
    code: str = "leg_failed"


SenderCommand = OpenRoom | PagesReady | FinishRoom | CancelRoom


class RoomClosed(Struct, frozen=True):
    """No write reads the room's pages any more. `error` is None if the KV has arrived at the peer; `leg` is whose fault it is."""

    room: int
    error: str | None
    leg: Leg = "decode"
    code: str = "leg_failed"


SenderMailbox = Mailbox[SenderCommand, RoomClosed]


# ------------------------------------------------------------------------------------------------ decode: receiver


class ReceiveKv(Struct, frozen=True, kw_only=True):
    """Fetch a prompt's KV from the prefill worker at `source` (`host:port`) into these pages."""

    room: int
    source: str
    first_room: int
    """That of the request's first sample, which says what group of the prefill worker has the prompt."""
    first_page: int = 0
    pages: list[int]
    prompt_tokens: int
    prompt_digest: bytes


class ReserveKv(Struct, frozen=True):
    """The prompt's KV will be asked for when there is a seat: until then let the prefill worker keep it."""

    room: int
    source: str
    first_room: int


class CancelKv(Struct, frozen=True):
    """The request is over. If its pages were offered, say when they are quiet; if not, let the prefill worker know at least."""

    room: int
    source: str
    first_room: int
    code: RoomCode = "leg_failed"


ReceiverCommand = ReserveKv | ReceiveKv | CancelKv


class KvArrived(Struct, frozen=True, kw_only=True):
    """The prompt's KV is in the pages."""

    room: int
    first_token: FirstToken
    prompt_versions: tuple[str, ...]
    wait_seconds: float
    """From asking until all was here, the prefill's own time included."""
    write_seconds: float
    """How long at least one write was in progress."""
    exposed_seconds: float
    """How much of the transfer the request waited for: `KvDone.exposed_seconds`."""
    num_bytes: int


class KvLost(Struct, frozen=True):
    """The KV will not come. The pages are not safe yet."""

    room: int
    error: ErrorReport


class PagesQuiet(Struct, frozen=True):
    """Nobody will write into the room's pages any more. Last event of a room whose KV did not arrive."""

    room: int


ReceiverEvent = KvArrived | KvLost | PagesQuiet
ReceiverMailbox = Mailbox[ReceiverCommand, ReceiverEvent]
