"""A trainer's end of a weight update: rank 0 of a process group, made as trainers make it, in a thread of the test; and pickles of
flattened buckets.
"""

import asyncio
import pickle
import sys
from collections.abc import Iterable, Mapping
from dataclasses import make_dataclass
from datetime import timedelta
from types import ModuleType
from typing import Any, Final, Literal

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    GroupName,
    PrefixStore,
    _new_process_group_helper,  # type: ignore[attr-defined]
    _world,  # type: ignore[attr-defined]
)
from torch.distributed.rendezvous import rendezvous

from common.orders import JoinWeightGroup, WeightBroadcast

TIMEOUT = timedelta(seconds=60)
PLACES: Final = ("sglang.srt.weight_sync.tensor_bucket", "sglang.srt.model_executor.model_runner")
"""Modules that have had the metadata's class."""
FIELDS: Final = ("name", "shape", "dtype", "start_idx", "end_idx", "numel")


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

    def broadcast_bucket(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Send all at once, as bytes that lie end to end."""
        dist.broadcast(bytes_of(tensors.values()), src=0, group=self._group)

    def leave(self) -> None:
        """Close this end."""
        dist.destroy_process_group(self._group)
        del self._group


def bytes_of(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """The bytes of all, in one flat tensor."""
    parts = [tensor.flatten().view(torch.uint8) for tensor in tensors]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def halves(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Every other tensor, and the rest."""
    names = list(tensors)
    return {name: tensors[name] for name in names[::2]}, {name: tensors[name] for name in names[1::2]}


def invitation(
    port: int, world_size: int, *, rank_offset: int = 1, group_name: str = "g", backend: str = "gloo"
) -> dict[str, Any]:
    """What the trainer says to have a worker's ranks come to its group, as numbers `rank_offset` and so on."""
    return {
        "master_address": "127.0.0.1",
        "master_port": port,
        "rank_offset": rank_offset,
        "world_size": world_size,
        "group_name": group_name,
        "backend": backend,
    }


def announcement(tensors: Mapping[str, torch.Tensor], **fields: Any) -> dict[str, Any]:
    """What the trainer says of tensors that it is about to broadcast."""
    return {
        "names": list(tensors),
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
        "group_name": "g",
        **fields,
    }


def broadcast_of(tensors: Mapping[str, torch.Tensor], *, is_bucket: bool = False) -> WeightBroadcast:
    """The same, as a worker's engine is told."""
    told = announcement(tensors)
    return WeightBroadcast(
        group="g",
        names=tuple(told["names"]),
        dtypes=tuple(told["dtypes"]),
        shapes=tuple(map(tuple, told["shapes"])),
        is_bucket=is_bucket,
    )


def joining(
    port: int, world_size: int = 2, *, backend: Literal["gloo", "nccl"] = "gloo", deadline_s: float = 60.0
) -> JoinWeightGroup:
    """Have an engine's ranks join a trainer's group, as numbers 1 and so on."""
    return JoinWeightGroup(
        serial=1,
        group="g",
        address="127.0.0.1",
        port=port,
        rank_offset=1,
        world_size=world_size,
        backend=backend,
        deadline_s=deadline_s,
    )


def metadata_class(
    monkeypatch: pytest.MonkeyPatch, place: str = PLACES[0], name: str = "FlattenedTensorMetadata"
) -> type:
    """A class of a trainer's, which for the time of the test is where a pickle says."""
    kind = make_dataclass(name, FIELDS)
    kind.__module__ = place
    module = ModuleType(place)
    setattr(module, name, kind)
    monkeypatch.setitem(sys.modules, "sglang", ModuleType("sglang"))
    monkeypatch.setitem(sys.modules, place, module)
    return kind


def described(tensors: Mapping[str, torch.Tensor], *, as_bytes: bool) -> list[dict[str, Any]]:
    """What a trainer says of the tensors of a bucket, which is of bytes or of their common dtype."""
    said: list[dict[str, Any]] = []
    end = 0
    for name, tensor in tensors.items():
        numel = tensor.numel() * (tensor.element_size() if as_bytes else 1)
        said.append(dict(zip(FIELDS, (name, tensor.shape, tensor.dtype, end, end + numel, numel), strict=True)))
        end += numel
    return said


def pickled_bucket(kind: type, flat: object, said: list[dict[str, Any]], protocol: int = 4) -> bytes:
    """A bucket, as a trainer pickles it."""
    return pickle.dumps({"flattened_tensor": flat, "metadata": [kind(**each) for each in said]}, protocol)
