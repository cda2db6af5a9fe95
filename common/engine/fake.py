"""A device as badly behaved as a GPU may be, on a CPU: it makes overlap races visible where every launch is synchronous.

Copies to the host land only when they are waited for, from whatever the tensor holds then; and each launch leaves the capture
buffer full of 255, as if the next launch had begun to overwrite it. A step that did not own its copies (R3) shows bad rows.
"""

from collections.abc import Mapping

import torch

from common.engine.device import Array, CpuDevice, HostCopies
from common.engine.engine import Engine
from common.engine.step import Launched
from common.scheduling.step_plan import StepPlan


class _LateCopies:
    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def wait(self) -> dict[str, Array]:
        return {name: tensor.clone().numpy() for name, tensor in self._tensors.items()}


class RacingDevice(CpuDevice):
    """A CPU whose copies to the host read their source as late as they may."""

    def copy_to_host(self, tensors: Mapping[str, torch.Tensor]) -> HostCopies:
        """Remember the tensors, copy nothing yet."""
        return _LateCopies(tensors)


class RacingEngine(Engine):
    """An engine whose capture buffer is overwritten right after each launch."""

    def launch(self, plan: StepPlan) -> Launched:
        """Launch, then spoil what the launched step must not rely on."""
        launched = super().launch(plan)
        self._capturer.buffer.fill_(255)
        return launched
