"""What runs in a rank's process beside the loop, on a thread of its own: its end of the transfer.

While the KV pool is given back there is none: it is stopped before the pool goes, and started again, as after a restart, when
steps may run again. Neighbours: `common.engine.loop` and `common.engine.follower`, `transfer.endpoint` (the real one).
"""

from collections.abc import Callable
from typing import Final, Protocol, TypeVar

from common.errors import TransferError
from common.orders import Order, ReleaseMemory, WarmUp

_STOP_S: Final = 10.0
"""Longest wait for its end; nothing is under way by then."""


class Background(Protocol):
    """It may be started again once it has stopped."""

    def start(self) -> None:
        """Begin, unless it runs. Raises UsageError for what the operator can mend."""

    def check(self) -> None:
        """Raise what has ended the thread, if anything has."""

    def stop(self, timeout_s: float) -> bool:
        """End, if it runs; says whether nothing of it is left."""


class NoBackground:
    """That of a rank that transfers nothing."""

    def start(self) -> None:
        """There is no thread."""

    def check(self) -> None:
        """Nothing can have failed."""

    def stop(self, timeout_s: float) -> bool:
        """There is no thread."""
        return True


class _Outcome(Protocol):
    @property
    def error(self) -> str | None:
        """Why an order was not carried out, if it was not."""


Outcome = TypeVar("Outcome", bound=_Outcome)


def carry_out_beside(background: Background, order: Order, carry_out: Callable[[Order], Outcome]) -> Outcome:
    """Carry an order out, with what it means for `background`.

    Raises TransferError if what runs there does not end, and UsageError if it cannot begin again.
    """
    if isinstance(order, ReleaseMemory) and "kv_cache" in order.kinds and not background.stop(_STOP_S):
        raise TransferError(f"the transfer has not ended within {_STOP_S:g} s")
    outcome = carry_out(order)
    if isinstance(order, WarmUp) and outcome.error is None:
        background.start()
    return outcome
