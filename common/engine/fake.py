"""A device as badly behaved as a GPU may be, on a CPU: it makes overlap races visible where every launch is synchronous.

Copies to the host land only when they are waited for, from whatever the tensor holds then; and each launch leaves the capture
buffer full of 255, as if the next launch had begun to overwrite it. A step that did not own its copies (R3) shows bad rows.
What a step uploads is read where it is staged, as if the copy came at the last moment. That memory is full of 255 as soon as
the step has settled, and the landed arrays are when the next step begins: whoever holds on to either computes nonsense.
"""

from collections.abc import Mapping

import torch

from common.engine.device import Arena, Array, CpuDevice, HostCopies, StepStaging, same_elements
from common.engine.engine import Engine
from common.engine.step import Launched
from common.scheduling.step_plan import StepPlan


class _RacingStaging:
    """One step's memory; `free` is where it goes when the step has settled."""

    def __init__(self, free: "list[_RacingStaging]") -> None:
        self._free = free
        self._uploads = Arena(pinned=False)
        self._landings = Arena(pinned=False)
        self._sources: Mapping[str, torch.Tensor] = {}

    def begin(self) -> None:
        """Belong to a new step."""
        self._landings.spoil()
        self._landings.reset()

    def upload(self, array: Array) -> torch.Tensor:
        """The staged array itself: the latest possible copy."""
        return torch.from_numpy(self._uploads.put(array))

    def upload_into(self, array: Array, target: torch.Tensor) -> None:
        """At once; nobody could tell when a tensor that stays is written."""
        target.copy_(same_elements(array, target))

    def copy_to_host(self, tensors: Mapping[str, torch.Tensor]) -> HostCopies:
        """Remember the tensors, copy nothing yet."""
        self._sources = tensors
        return self

    def wait(self) -> dict[str, Array]:
        """Copy now, and spoil what was uploaded."""
        landed = {name: self._landings.put(tensor.numpy()) for name, tensor in self._sources.items()}
        self._sources = {}
        self._uploads.spoil()
        self._uploads.reset()
        self._free.append(self)
        return landed


class RacingDevice(CpuDevice):
    """A CPU whose copies read their source as late as they may, and whose staging is worth nothing after its time."""

    def __init__(self) -> None:
        super().__init__()
        self._free: list[_RacingStaging] = []

    def begin_step(self) -> StepStaging:
        """Take the staging that was given back last, as `CudaDevice` does."""
        staging = self._free.pop() if self._free else _RacingStaging(self._free)
        staging.begin()
        return staging


class RacingEngine(Engine):
    """An engine whose capture buffer is overwritten right after each launch."""

    def launch(self, plan: StepPlan) -> Launched:
        """Launch, then spoil what the launched step must not rely on."""
        launched = super().launch(plan)
        self._capturer.buffer.fill_(255)
        return launched
