"""The seam to the hardware: how arrays get onto the device, and how results come back without making it wait.

`CpuDevice` and `CudaDevice` are the real ones; `common.engine.fake.RacingDevice` behaves as badly as a GPU may, on a CPU.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from common.config import EngineOptions
from common.errors import UsageError

Array = npt.NDArray[Any]


class HostCopies(Protocol):
    """Copies on their way to the host."""

    def wait(self) -> dict[str, Array]:
        """Block until they have landed, and so has all work launched before them; called once, by settle."""


class Device(Protocol):
    """One accelerator, or the CPU."""

    torch_device: torch.device

    def upload(self, array: Array) -> torch.Tensor:
        """Queue a copy of `array` onto the device, in stream order; the array may be dropped at once."""

    def copy_to_host(self, tensors: Mapping[str, torch.Tensor]) -> HostCopies:
        """Queue copies to the host behind the work launched so far, without holding up what is launched next.

        The tensors must not be written again: hand over owned ones.
        """

    def pool_budget_bytes(self, memory_fraction: float) -> int | None:
        """What the KV pool may take so that this process stays within its fraction of the memory; None: take the default."""


class _Landed:
    """Copies that need no waiting."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def wait(self) -> dict[str, Array]:
        return {name: tensor.numpy() for name, tensor in self._tensors.items()}


class CpuDevice:
    """The CPU: a launch has finished when it returns."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")

    def upload(self, array: Array) -> torch.Tensor:
        """Copy, so that the caller may reuse the array."""
        return torch.from_numpy(array.copy())

    def copy_to_host(self, tensors: Mapping[str, torch.Tensor]) -> HostCopies:
        """Nothing to wait for."""
        return _Landed(tensors)

    def pool_budget_bytes(self, memory_fraction: float) -> int | None:
        """The CPU's pool has a fixed default instead."""
        return None


class _CudaCopies:
    def __init__(self, host: dict[str, torch.Tensor], done: torch.cuda.Event) -> None:
        self._host = host
        self._done = done

    def wait(self) -> dict[str, Array]:
        self._done.synchronize()
        return {name: tensor.numpy() for name, tensor in self._host.items()}


class CudaDevice:
    """One GPU. Pinned memory comes from torch's caching allocator, which reuses a block only after the copies that read it."""

    def __init__(self, index: int = 0) -> None:
        self.torch_device = torch.device("cuda", index)
        torch.cuda.set_device(self.torch_device)
        # cuDNN's attention builds a plan for every new context length, 24 ms each where the others take 0.08 ms.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self._copy_stream = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]

    def upload(self, array: Array) -> torch.Tensor:
        """Through pinned memory, so that the host does not wait."""
        return torch.from_numpy(array).pin_memory().to(self.torch_device, non_blocking=True)

    def copy_to_host(self, tensors: Mapping[str, torch.Tensor]) -> HostCopies:
        """On a side stream that waits for the forward stream; never the other way round."""
        launched = torch.cuda.Event()  # type: ignore[no-untyped-call]
        launched.record()
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        host: dict[str, torch.Tensor] = {}
        with torch.cuda.stream(self._copy_stream):
            self._copy_stream.wait_event(launched)
            for name, tensor in tensors.items():
                landing = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                landing.copy_(tensor, non_blocking=True)
                tensor.record_stream(self._copy_stream)
                host[name] = landing
            done.record(self._copy_stream)
        return _CudaCopies(host, done)

    def pool_budget_bytes(self, memory_fraction: float) -> int | None:
        """Called with the weights loaded; what the fraction leaves over is for activations."""
        torch.cuda.empty_cache()
        free_bytes, total_bytes = torch.cuda.mem_get_info(self.torch_device)
        return int(free_bytes - (1 - memory_fraction) * total_bytes)


def open_device(options: EngineOptions) -> Device:
    """Open the device that the options name. Raises UsageError if it is not there."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: there is no usable GPU on this machine")
    if options.device == "cpu" or not torch.cuda.is_available():
        torch.set_num_threads(options.cpu_threads or max(1, torch.get_num_threads() // 2))
        return CpuDevice()
    return CudaDevice()


def as_int64(values: Sequence[int] | Array) -> npt.NDArray[np.int64]:
    """Indices on their way to a device."""
    return np.asarray(values, dtype=np.int64)
