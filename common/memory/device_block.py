"""Device memory that is given back for a while, and taken again: the tensors in it, and all their views, stay valid.

It knows nothing of what the tensors are for. Neighbour: `common.engine.rank_memory`.
"""

import torch


class DeviceBlock:
    """The memory behind a tensor. No work that touches it may be queued on the device when it is changed."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._storage = tensor.untyped_storage()
        self._device = tensor.device
        self._num_bytes = self._storage.nbytes()
        self._kept: torch.Tensor | None = None

    @property
    def is_released(self) -> bool:
        """Whether there is no memory now."""
        return self._storage.nbytes() < self._num_bytes

    def keep(self) -> None:
        """Copy the content to host memory, for `resume`. Raises RuntimeError (torch's own) if there is not enough."""
        if not self.is_released:
            self._kept = self._bytes().to("cpu", copy=True)

    def drop(self) -> None:
        """Forget what `keep` has copied."""
        self._kept = None

    def release(self) -> None:
        """Give the memory back."""
        self._storage.resize_(0)

    def resume(self) -> None:
        """Take memory again: with the content that was kept, else zeros. Raises RuntimeError if there is not enough."""
        if not self.is_released:
            return
        self._storage.resize_(self._num_bytes)
        if self._kept is None:
            self._bytes().zero_()
        else:
            self._bytes().copy_(self._kept)
        self._kept = None

    def _bytes(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8, device=self._device).set_(self._storage)


def blocks_of(tensors: list[torch.Tensor]) -> list[DeviceBlock]:
    """The memory behind these tensors, once each."""
    by_address = {
        tensor.untyped_storage().data_ptr(): tensor for tensor in tensors if tensor.untyped_storage().nbytes()
    }
    return [DeviceBlock(tensor) for tensor in by_address.values()]
