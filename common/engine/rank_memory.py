"""What a rank has on its device, given back to whoever needs the device meanwhile, and taken again.

    release -> drop what was captured -> copy weights to the host -> free
    resume  -> allocate, copy back                   (each kind by itself, as often as it takes)
    warm_up -> allocate what attention works in, compute and capture again what steps need

What was captured holds addresses, so it goes with any kind. Tensors stay what they are, only without memory. Neighbours:
`common.engine.orders` (calls this), `common.engine.forward_pass` (has what is released), `common.memory.device_block`.
"""

from collections.abc import Iterable

import torch

from common.engine.forward_pass import ForwardPass
from common.errors import UsageError
from common.memory.device_block import blocks_of
from common.orders import MemoryKind


class RankMemory:
    """One rank's device memory. No step may be in flight."""

    def __init__(self, forward: ForwardPass, device: torch.device) -> None:
        self._forward = forward
        self._device = device
        self._blocks = {"weights": blocks_of(forward.weights), "kv_cache": blocks_of([forward.kv_pool.pages])}
        self._workspaces = blocks_of(forward.workspaces)
        self.is_warm = True
        """Whether steps may run."""

    @property
    def released(self) -> list[MemoryKind]:
        """The kinds of which some memory is given back."""
        kinds: tuple[MemoryKind, ...] = ("weights", "kv_cache")
        return [kind for kind in kinds if any(block.is_released for block in self._blocks[kind])]

    def release(self, kinds: Iterable[MemoryKind]) -> None:
        """Give memory back; does nothing for what is given back already.

        Raises RuntimeError (torch's own) if the host has no room for the weights: then nothing but what was captured is gone.
        """
        self.is_warm = False
        self._forward.cool_down()
        kept = self._blocks["weights"] if "weights" in kinds else []
        try:
            for block in kept:
                block.keep()
        except RuntimeError:
            for block in kept:
                if not block.is_released:
                    block.drop()
            raise
        for block in [*self._workspaces, *(block for kind in kinds for block in self._blocks[kind])]:
            block.release()
        self._return_unused()

    def resume(self, kinds: Iterable[MemoryKind]) -> None:
        """Take memory again; raises RuntimeError (torch's own) if there is not enough, and may be called again."""
        for kind in kinds:
            for block in self._blocks[kind]:
                block.resume()

    def warm_up(self) -> None:
        """Be ready for steps again. All ranks do so together; raises UsageError if memory is still given back."""
        if self.is_warm:
            return
        if released := self.released:
            raise UsageError(f"released: {', '.join(released)}")
        for block in self._workspaces:
            block.resume()
        self._forward.warm_up()
        self.is_warm = True

    def _return_unused(self) -> None:
        """Let others have what torch keeps for later."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
