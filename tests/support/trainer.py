"""A trainer's end of a weight update: rank 0 of a process group, made as trainers make it, in a thread of the test."""

import asyncio
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    GroupName,
    PrefixStore,
    _new_process_group_helper,  # type: ignore[attr-defined]
    _world,  # type: ignore[attr-defined]
)
from torch.distributed.rendezvous import rendezvous

TIMEOUT = timedelta(seconds=60)


class Trainer:
    """Rank 0 of a group."""

    def __init__(self, port: int, world_size: int, name: str, backend: str = "gloo") -> None:
        """Wait for the others, as `init_process_group` would, but with a name of its own beside any default group."""
        url = f"tcp://127.0.0.1:{port}"
        store, rank, world_size = next(rendezvous(url, 0, world_size, timeout=TIMEOUT))
        store.set_timeout(TIMEOUT)
        self._group, _ = _new_process_group_helper(
            world_size, rank, [], backend, PrefixStore(name, store), group_name=GroupName(name), timeout=TIMEOUT
        )
        _world.pg_group_ranks[self._group] = {number: number for number in range(world_size)}

    @classmethod
    async def meet(cls, port: int, world_size: int, name: str = "g") -> "Trainer":
        """In a thread, since the others are asked to come meanwhile."""
        return await asyncio.to_thread(cls, port, world_size, name)

    def broadcast(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Send each in turn."""
        for tensor in tensors.values():
            dist.broadcast(tensor, src=0, group=self._group)

    def leave(self) -> None:
        """Close this end."""
        dist.destroy_process_group(self._group)
        del self._group


def announcement(tensors: Mapping[str, torch.Tensor], **fields: Any) -> dict[str, Any]:
    """What the trainer says of tensors that it is about to broadcast."""
    return {
        "names": list(tensors),
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
        "group_name": "g",
        **fields,
    }
