"""Orders of a worker's frontend to the leaders of its engine: pauses, weights, memory, profiles.

Each is carried out by all ranks of the attention group, and answered by one `Done` with the same serial. Part of the unions in
`common.messages`; sender: `common.server`, receiver: `common.engine`.
"""

from typing import Literal

from msgspec import Struct


class Pause(Struct, frozen=True, tag=True):
    """Plan no more steps, and keep all requests as they are; done when no step is in flight any more."""

    serial: int


class Continue(Struct, frozen=True, tag=True):
    """Plan steps again."""

    serial: int


class WeightFiles(Struct, frozen=True, tag=True):
    """Tensors in safetensors files, by the names of a checkpoint: in a checkpoint's folder, or in one file."""

    path: str


class WeightBroadcast(Struct, frozen=True, tag=True, kw_only=True):
    """Tensors that rank 0 of a process group broadcasts, one after the other; `dtypes` as torch calls them."""

    group: str
    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


class PickledWeights(Struct, frozen=True, tag=True):
    """Named tensors as trainers pickle them: one file, or one for each rank."""

    paths: tuple[str, ...]


WeightSource = WeightFiles | WeightBroadcast | PickledWeights


class CheckWeights(Struct, frozen=True, tag=True):
    """Compare a source's names, shapes and types with the model's; nothing is written. `Done.num_left`: what it does not have."""

    serial: int
    source: WeightSource


class LoadWeights(Struct, frozen=True, tag=True):
    """Check a source again, and take its tensors; the group must be paused. `Done.num_left`: what cannot be trusted."""

    serial: int
    source: WeightSource
    weight_version: str


class SetWeightVersion(Struct, frozen=True, tag=True):
    """Call the present weights by another name."""

    serial: int
    weight_version: str


class JoinWeightGroup(Struct, frozen=True, tag=True, kw_only=True):
    """Join a torch process group; each rank as number `rank_offset` plus its own. Blocks until all members are there."""

    serial: int
    group: str
    address: str
    port: int
    rank_offset: int
    world_size: int
    backend: Literal["nccl", "gloo"]


class LeaveWeightGroup(Struct, frozen=True, tag=True):
    """Leave a process group."""

    serial: int
    group: str


MemoryKind = Literal["weights", "kv_cache"]


class ReleaseMemory(Struct, frozen=True, tag=True):
    """Give the device's memory back; the group must be paused. Weights wait in host memory; KV pages must have no owner."""

    serial: int
    kinds: tuple[MemoryKind, ...]


class ResumeMemory(Struct, frozen=True, tag=True):
    """Take the memory again."""

    serial: int
    kinds: tuple[MemoryKind, ...]


class StartProfile(Struct, frozen=True, tag=True):
    """Record what the ranks do, until `StopProfile`, into files in `folder`."""

    serial: int
    folder: str


class StopProfile(Struct, frozen=True, tag=True):
    """End the recording; done when the files are written."""

    serial: int


Order = (
    Pause
    | Continue
    | CheckWeights
    | LoadWeights
    | SetWeightVersion
    | JoinWeightGroup
    | LeaveWeightGroup
    | ReleaseMemory
    | ResumeMemory
    | StartProfile
    | StopProfile
)


class Done(Struct, frozen=True, tag=True, kw_only=True):
    """An order has been carried out by all ranks of the group, or `error` says what came in between."""

    serial: int
    error: str | None = None
    num_left: int = 0
    """Tensors of the model: see the order."""
