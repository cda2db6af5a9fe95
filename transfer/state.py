"""The states of a room at both ends of a transfer, as tables (R12). One `advance` each way; terminal is terminal.

sender     OFFERED (own engine has the prompt) ─┐
                                                ├─> SENDING ─> DRAINING ─> CLOSED
           ASKED (the peer has sent its pages) ─┘
receiver   REQUESTED ─> ARRIVED            the KV is here
               └─> ABORTING ─> CLOSED      given up: the peer may still write until it says that it will not
"""

from enum import Enum, auto
from typing import TypeVar


class SenderState(Enum):
    """A room at the prefill side."""

    OFFERED = auto()
    ASKED = auto()
    SENDING = auto()
    DRAINING = auto()
    """Given up or failed, while writes that were posted are still in progress."""
    CLOSED = auto()


class ReceiverState(Enum):
    """A room at the decode side."""

    REQUESTED = auto()
    ARRIVED = auto()
    ABORTING = auto()
    CLOSED = auto()


_LEGAL: dict[Enum, frozenset[Enum]] = {
    SenderState.OFFERED: frozenset({SenderState.SENDING, SenderState.CLOSED}),
    SenderState.ASKED: frozenset({SenderState.SENDING, SenderState.CLOSED}),
    SenderState.SENDING: frozenset({SenderState.DRAINING, SenderState.CLOSED}),
    SenderState.DRAINING: frozenset({SenderState.CLOSED}),
    SenderState.CLOSED: frozenset(),
    ReceiverState.REQUESTED: frozenset({ReceiverState.ARRIVED, ReceiverState.ABORTING, ReceiverState.CLOSED}),
    ReceiverState.ABORTING: frozenset({ReceiverState.CLOSED}),
    ReceiverState.ARRIVED: frozenset(),
    ReceiverState.CLOSED: frozenset(),
}

State = TypeVar("State", SenderState, ReceiverState)


def advance(current: State, target: State) -> State:
    """The state after a legal move; an illegal one is a defect."""
    assert target in _LEGAL[current], f"{current} -> {target} is not a legal move"
    return target
