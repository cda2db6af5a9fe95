"""The ids that tie things together across processes, and nothing else."""

import secrets
import uuid
from typing import NewType

Room = NewType("Room", int)
"""Ties the prefill leg and the decode leg of one sample together: 63-bit, one per sample and attempt."""

PeerId = NewType("PeerId", str)
"""One worker process at one end of a transfer; fresh at every start, so a restarted worker is another peer."""

MAX_ROOM = 2**63 - 1


def new_room(group: int = 0, groups: int = 1) -> Room:
    """Draw a room in `[1, 2**63)` with `room % groups == group`, by which a prefill worker of so many groups places it.

    0 is left out so that it can never pass for a missing one.
    """
    least = group or groups
    return Room(least + groups * secrets.randbelow((MAX_ROOM - least) // groups + 1))


def new_peer_id(role: str) -> PeerId:
    """Name this process for its peers, for example `prefill-0f3c...`."""
    return PeerId(f"{role}-{uuid.uuid4().hex}")


def new_rid() -> str:
    """Name a request whose client gave it no name; all are 32 characters, so none is another's prefix."""
    return uuid.uuid4().hex


def new_seed() -> int:
    """Draw a sampling seed in `[0, 2**63)` for a request that brought none."""
    return secrets.randbelow(2**63)
