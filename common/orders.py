"""Orders of a worker's frontend to the leaders of its engine: pauses, weights, memory, profiles.

Each is carried out by all ranks of the attention group when none of them has a step in flight, one order after the other, and
answered by one `Done` with the same serial. The engine does nothing else meanwhile. So before an order that may take long, or
that waits for other processes, all groups must be paused or idle: one that steps would wait for the others. Part of the unions in
`common.messages`; sender: `common.server`, receiver: `common.engine`.
"""

from typing import Literal

from msgspec import Struct

PauseMode = Literal["abort", "retract", "in_place"]
"""What a pause does to open requests: end them with what they have, send them elsewhere later, or keep them as they are."""


class Pause(Struct, frozen=True, tag=True):
    """Plan no more steps, and keep all requests as they are; done when no step is in flight any more."""

    serial: int


class Continue(Struct, frozen=True, tag=True):
    """Plan steps again."""

    serial: int


class WeightFiles(Struct, frozen=True, tag=True):
    """Tensors in safetensors files, by the names of a checkpoint: in a folder, which has all of them, or in one file."""

    path: str


class WeightBroadcast(Struct, frozen=True, tag=True, kw_only=True):
    """Tensors that rank 0 of a process group broadcasts, one after the other; `dtypes` as torch calls them."""

    group: str
    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    is_bucket: bool = False
    """Whether all come in one broadcast, as bytes that lie end to end."""


class PickledWeights(Struct, frozen=True, tag=True):
    """Named tensors as trainers pickle them: one file, or one for each rank."""

    paths: tuple[str, ...]
    is_bucket: bool = False
    """Whether each has one flat tensor with all of them in it."""


WeightSource = WeightFiles | WeightBroadcast | PickledWeights


class CheckWeights(Struct, frozen=True, tag=True):
    """Compare a source's names, shapes and types with the model's; nothing is written. `Done.num_left`: what it does not have."""

    serial: int
    source: WeightSource


class LoadWeights(Struct, frozen=True, tag=True):
    """Check a source again, and take its tensors. After a failure any tensor may be half old and half new.

    `Done.num_left`: how many cannot be trusted; while there are some, no step is planned.
    """

    serial: int
    source: WeightSource
    weight_version: str


class SetWeightVersion(Struct, frozen=True, tag=True):
    """Call the present weights by another name."""

    serial: int
    weight_version: str


class JoinWeightGroup(Struct, frozen=True, tag=True, kw_only=True):
    """Join a torch process group, whose number 0 is the trainer; each rank as number `rank_offset` plus its own.

    Blocks until all members are there. One of the same name is left before.
    """

    serial: int
    group: str
    address: str
    port: int
    rank_offset: int
    world_size: int
    backend: Literal["nccl", "gloo"]
    deadline_s: float
    """For joining, and later for each update that comes this way."""


class LeaveWeightGroup(Struct, frozen=True, tag=True):
    """Leave a process group."""

    serial: int
    group: str


MemoryKind = Literal["weights", "kv_cache"]


class AwaitIdle(Struct, frozen=True, tag=True):
    """Done when no request is open and no KV page has an owner but the prefix cache; an error if that is not so in time.

    Other orders are carried out meanwhile.
    """

    serial: int
    deadline_s: float


class ReleaseMemory(Struct, frozen=True, tag=True):
    """Give the device's memory back; refused unless the group is idle. Weights wait in host memory; what KV pages held is lost.

    With any kind, what was captured for steps goes too, and with the KV pool the way to other workers. From then on no step is
    planned, until `WarmUp`.
    """

    serial: int
    kinds: tuple[MemoryKind, ...]


class ResumeMemory(Struct, frozen=True, tag=True):
    """Take the memory again, at another address; if there is not enough, `Done.error` says so, and it may be tried again."""

    serial: int
    kinds: tuple[MemoryKind, ...]


class WarmUp(Struct, frozen=True, tag=True):
    """All memory is back: capture again what steps need, and open the way to other workers. All groups must do so at once."""

    serial: int


ProfileActivity = Literal["CPU", "GPU"]


class StartProfile(Struct, frozen=True, tag=True, kw_only=True):
    """Record what the ranks do, until `StopProfile` or for `num_steps` steps, each into a file of its own.

    That is `FOLDER/KIND-RANK.trace.json.gz`, with a number behind the rank's name if it is there already.
    """

    serial: int
    folder: str
    kind: str
    """Of the worker."""
    activities: tuple[ProfileActivity, ...]
    num_steps: int | None = None


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
    | AwaitIdle
    | ReleaseMemory
    | ResumeMemory
    | WarmUp
    | StartProfile
    | StopProfile
)


class Done(Struct, frozen=True, tag=True, kw_only=True):
    """An order has been carried out by all ranks of the group, or `error` says what came in between."""

    serial: int
    error: str | None = None
    num_left: int = 0
    """Tensors of the model: see the order."""
