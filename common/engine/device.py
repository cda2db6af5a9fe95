"""The seam to the hardware: how arrays get onto the device, and how results come back without making it wait.

A step makes all its copies through one `StepStaging`. What stages them on the host belongs to the step until it has settled,
and so until every one of its copies has happened; only then does another step get it (R3).

`CpuDevice` and `CudaDevice` are the real ones; `common.engine.fake.RacingDevice` behaves as badly as a GPU may, on a CPU.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from common.config import EngineOptions
from common.errors import UsageError
from common.ranks import Rank

Array = npt.NDArray[Any]


class HostCopies(Protocol):
    """Copies on their way to the host."""

    def wait(self) -> dict[str, Array]:
        """Block until they have landed, and so has all work launched before them; called once, by settle.

        The step's staging is free for another step by then, so the arrays are good until the next `begin_step` and no longer.
        """


class StepStaging(Protocol):
    """The way onto the device and back for one step. Copies happen in stream order, and the host waits for none of them."""

    def upload(self, array: Array) -> torch.Tensor:
        """Queue a copy of `array` into a new tensor of its shape and dtype; the array may be changed or dropped at once.

        The tensor is the step's own: it is good until the step has settled.
        """

    def upload_into(self, array: Array, target: torch.Tensor) -> None:
        """Queue a copy of `array` into a contiguous device tensor of the same dtype and number of elements."""

    def copy_to_host(self, tensors: Mapping[str, torch.Tensor]) -> HostCopies:
        """Queue copies to the host behind the work launched so far, without holding up what is launched next.

        The step's last call here. The tensors must not be written again: hand over owned ones.
        """


class Device(Protocol):
    """One accelerator, or the CPU."""

    torch_device: torch.device

    def begin_step(self) -> StepStaging:
        """Take the staging of one step, which has it until its `HostCopies` have been waited for."""

    def upload(self, array: Array) -> torch.Tensor:
        """Queue a copy of `array` onto the device, outside of any step; the array may be dropped at once."""

    def synchronize(self) -> None:
        """Wait until all that was queued has been done; raises what is wrong with the device, if anything is."""

    def pool_budget_bytes(self, memory_fraction: float) -> int | None:
        """What the KV pool may take so that this process stays within its fraction of the memory; None: take the default."""


_LARGEST_SHARE_OF_FREE = 0.95


class _Landed:
    """Copies that need no waiting."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def wait(self) -> dict[str, Array]:
        return {name: tensor.numpy() for name, tensor in self._tensors.items()}


class _CpuStaging:
    """Plain copies onto the device, and none back."""

    def upload(self, array: Array) -> torch.Tensor:
        return torch.from_numpy(array.copy())

    def upload_into(self, array: Array, target: torch.Tensor) -> None:
        target.copy_(same_elements(array, target))

    def copy_to_host(self, tensors: Mapping[str, torch.Tensor]) -> HostCopies:
        return _Landed(tensors)


class CpuDevice:
    """The CPU: a launch has finished when it returns."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")

    def begin_step(self) -> StepStaging:
        """Nothing is kept between steps."""
        return _CpuStaging()

    def upload(self, array: Array) -> torch.Tensor:
        """Copy, so that the caller may reuse the array."""
        return torch.from_numpy(array.copy())

    def synchronize(self) -> None:
        """Nothing is ever pending."""

    def pool_budget_bytes(self, memory_fraction: float) -> int | None:
        """The CPU's pool has a fixed default instead."""
        return None


class Arena:
    """Host memory that is handed out piece by piece and taken back all at once; it grows to what a step needs and stays so."""

    ALIGNMENT_BYTES = 256
    FIRST_BYTES = 1 << 16

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._memory = self._allocate(self.FIRST_BYTES)
        self._used_bytes = 0
        self._outgrown: list[Array] = []

    def take(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Hand out `[num_bytes]`, aligned and uninitialised; good until `reset`."""
        if self._used_bytes + num_bytes > len(self._memory):
            # Copies from the old memory may be pending. With twice the room and more, the next step fits into the new one.
            self._outgrown.append(self._memory)
            self._memory = self._allocate(1 << (len(self._memory) + num_bytes - 1).bit_length())
            self._used_bytes = 0
        begin = self._used_bytes
        self._used_bytes += -(-num_bytes // self.ALIGNMENT_BYTES) * self.ALIGNMENT_BYTES
        return self._memory[begin : begin + num_bytes]

    def put(self, array: Array) -> Array:
        """Copy an array into a piece of its own."""
        piece = self.take(array.nbytes).view(array.dtype).reshape(array.shape)
        piece[...] = array
        return piece

    def reset(self) -> None:
        """Take all pieces back; no copy from or into them may be pending."""
        self._used_bytes = 0
        self._outgrown.clear()

    def spoil(self) -> None:
        """Overwrite all pieces, so that whoever still reads one sees nonsense; for tests."""
        for memory in (self._memory, *self._outgrown):
            memory.fill(255)

    def _allocate(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._pinned).numpy()


class _CudaStaging:
    """One step's pinned memory and events. `free` is where it goes when the step has settled."""

    def __init__(self, device: torch.device, copy_stream: torch.cuda.Stream, free: "list[_CudaStaging]") -> None:
        self._device = device
        self._copy_stream = copy_stream
        self._free = free
        self._uploads = Arena(pinned=True)
        self._landings = Arena(pinned=True)
        self._launched = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._sources: list[torch.Tensor] = []
        self._landed: dict[str, torch.Tensor] = {}

    def upload(self, array: Array) -> torch.Tensor:
        return torch.from_numpy(self._uploads.put(array)).to(self._device, non_blocking=True)

    def upload_into(self, array: Array, target: torch.Tensor) -> None:
        target.copy_(same_elements(self._uploads.put(array), target), non_blocking=True)

    def copy_to_host(self, tensors: Mapping[str, torch.Tensor]) -> HostCopies:
        self._launched.record()
        with torch.cuda.stream(self._copy_stream):
            self._copy_stream.wait_event(self._launched)
            for name, tensor in tensors.items():
                piece = torch.from_numpy(self._landings.take(tensor.nbytes))
                self._landed[name] = piece.view(tensor.dtype).view(tensor.shape)
                self._landed[name].copy_(tensor, non_blocking=True)
            self._done.record(self._copy_stream)
        # Kept until they have been read: so the allocator need not be told of the second stream.
        self._sources += tensors.values()
        return self

    def wait(self) -> dict[str, Array]:
        assert self._sources, "a step settles once"
        # What was uploaded is behind this event too: the copies to the host come after the step's whole work.
        self._done.synchronize()
        landed = {name: tensor.numpy() for name, tensor in self._landed.items()}
        self._sources.clear()
        self._landed.clear()
        self._uploads.reset()
        self._landings.reset()
        self._free.append(self)
        return landed


class CudaDevice:
    """One GPU. It has as many stagings as there have been steps in flight at once; once they have grown, none allocates."""

    def __init__(self, index: int = 0) -> None:
        self.torch_device = torch.device("cuda", index)
        torch.cuda.set_device(self.torch_device)
        # cuDNN's attention builds a plan for every new context length, 24 ms each where the others take 0.08 ms.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self._copy_stream = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        self._free: list[_CudaStaging] = []

    def begin_step(self) -> StepStaging:
        """Copies to the host run on a side stream that waits for the forward stream; never the other way round."""
        return self._free.pop() if self._free else _CudaStaging(self.torch_device, self._copy_stream, self._free)

    def upload(self, array: Array) -> torch.Tensor:
        """Through pinned memory of torch's caching allocator, which reuses it only after the copy."""
        return torch.from_numpy(array).pin_memory().to(self.torch_device, non_blocking=True)

    def synchronize(self) -> None:
        """All streams: the forward stream and the one of the copies."""
        torch.cuda.synchronize(self.torch_device)

    def pool_budget_bytes(self, memory_fraction: float) -> int | None:
        """Called with the weights loaded; what the fraction leaves over is for activations.

        What others hold on this GPU does not count against the fraction, so that one of two that share it can be restarted alone.
        """
        torch.cuda.empty_cache()
        free_bytes, total_bytes = torch.cuda.mem_get_info(self.torch_device)
        own_bytes = torch.cuda.memory_reserved(self.torch_device)
        return int(min(memory_fraction * total_bytes - own_bytes, _LARGEST_SHARE_OF_FREE * free_bytes))


def open_device(options: EngineOptions, rank: Rank = Rank()) -> Device:
    """Open the device that the options name for a rank: the GPU of its number. Raises UsageError if it is not there."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if options.device == "cuda" and num_gpus == 0:
        raise UsageError("--device cuda: there is no usable GPU on this machine")
    if options.device == "cpu" or num_gpus == 0:
        torch.set_num_threads(options.cpu_threads or max(1, torch.get_num_threads() // 2 // rank.of.tp))
        return CpuDevice()
    if rank.of.tp > num_gpus:
        raise UsageError(f"--tp {rank.of.tp}: there are {num_gpus} usable GPUs on this machine")
    return CudaDevice(rank.index)


def as_int64(values: Sequence[int] | Array) -> npt.NDArray[np.int64]:
    """Indices on their way to a device."""
    return np.asarray(values, dtype=np.int64)


def same_elements(array: Array, target: torch.Tensor) -> torch.Tensor:
    """A view of `array` in the shape of `target`, which must have its dtype and its number of elements."""
    source = torch.from_numpy(array)
    assert source.dtype == target.dtype, f"{source.dtype} does not go into {target.dtype}"
    assert source.numel() == target.numel(), f"{source.numel()} elements do not fill {target.numel()}"
    return source.view(target.shape)
