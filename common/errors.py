"""Every error that Tandem raises on purpose, in one tree.

    TandemError
    ├── UsageError            the operator's mistake: one clear line and exit code 2
    │   └── CheckpointError   a model folder that cannot be served as it is
    ├── RequestError          400  the client's mistake: names the field
    ├── RequestFailed         a request that was accepted and cannot be answered
    │   ├── RowsError         500  routed-expert rows that may not leave
    │   │   ├── MissingRows        unwritten, or not covered by any block
    │   │   ├── BadRows            out of range, or an expert twice in one row
    │   │   └── RowsMismatch       blocks that do not belong to one sample
    │   ├── LegFailed         502  a worker's leg failed: names leg and stage
    │   │   └── Retracted          its worker has put it back: it is to start again
    │   ├── NoHealthyPair     503  nowhere to send it
    │   ├── MixedVersions     503  the weights changed under a request that may not mix them
    │   └── DeadlineExceeded  504  names the stage that ran out of time
    └── TransferError         a KV transfer that cannot go on; its request fails with LegFailed

It knows no HTTP: `status` is only the number that the protocol prints. Neighbour: `common.messages.ErrorReport`, the form in
which an error crosses a process.
"""

from collections.abc import Iterable
from typing import ClassVar, Final

MEMORY_RELEASED: Final = "memory_released"
"""Code (503) of what a worker refuses while its device's memory is given back: nobody is to blame."""


class TandemError(Exception):
    """Base of all errors raised on purpose."""


class UsageError(TandemError, ValueError):
    """A flag, file or device that the operator named cannot be used; the process prints one line and exits with 2."""


class CheckpointError(UsageError):
    """A checkpoint folder lacks something, has too much, or has a wrong shape; the message names the tensor or file."""


class RequestError(TandemError, ValueError):
    """The request is wrong; nothing was allocated for it.

    `field` is the name in the request's body, as the client wrote it.
    """

    status: ClassVar[int] = 400
    code: ClassVar[str] = "invalid_request"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class RequestFailed(TandemError):
    """An accepted request that ends without an answer."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"

    def __init__(self, message: str, *, leg: str | None = None, stage: str | None = None) -> None:
        super().__init__(message)
        self.leg = leg
        self.stage = stage


class RowsError(RequestFailed):
    """Routed-expert rows that may not leave; never downgraded to a warning."""

    code: ClassVar[str] = "routed_experts"


class MissingRows(RowsError):
    """Rows that were never written by the present owner of their slots, or that no block covers."""

    code: ClassVar[str] = "routed_experts_missing"


class BadRows(RowsError):
    """A row with an expert id outside [0, E), or with one expert twice."""

    code: ClassVar[str] = "routed_experts_bad"


class RowsMismatch(RowsError):
    """Blocks whose ranges do not touch, or whose dtype, shape, layers or expert count differ."""

    code: ClassVar[str] = "routed_experts_mismatch"


class LegFailed(RequestFailed):
    """One worker's part of a request failed."""

    status: ClassVar[int] = 502
    code: ClassVar[str] = "leg_failed"


class Retracted(LegFailed):
    """A worker has ended its leg so that the request goes on later; nobody is to blame, and it is tried again."""

    code: ClassVar[str] = "retracted"


class NoHealthyPair(RequestFailed):
    """There is no prefill worker or no decode worker to send the request to."""

    status: ClassVar[int] = 503
    code: ClassVar[str] = "no_healthy_pair"


class MixedVersions(RequestFailed):
    """The weights have changed since a request began, and it may not mix versions; nobody's fault, and it may be tried again."""

    status: ClassVar[int] = 503
    code: ClassVar[str] = "mixed_versions"

    def __init__(self, versions: Iterable[str]) -> None:
        named = ", ".join(repr(version) for version in dict.fromkeys(versions))
        super().__init__(f"the request may not mix weights of several versions: {named}", stage="versions")


class DeadlineExceeded(RequestFailed):
    """A wait ran past its deadline."""

    status: ClassVar[int] = 504
    code: ClassVar[str] = "deadline_exceeded"


class TransferError(TandemError):
    """A KV transfer that cannot go on: a refused handshake, a failed write, a lost peer."""
