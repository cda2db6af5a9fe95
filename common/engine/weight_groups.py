"""A torch process group in which a trainer broadcasts weights: the trainer is rank 0, this rank one of the others.

A trainer makes its end as `torch.distributed.init_process_group` would, under a name of its own:

    store = PrefixStore(name, TCPStore at address:port);  _new_process_group_helper(..., group_name=name)

Here the backend alone is made, in the place where that helper puts it in the store. So it needs no default group and registers
nothing in torch's globals: the worker's own groups (`common.kernels.rank_group`) are beside it, and several ranks may share a
process.
Neighbour: `common.engine.orders` (who joins, and who receives).
"""

import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from common.errors import UsageError
from common.models.buckets import cut, num_bytes
from common.models.weight_sources import Receive
from common.models.weights import DTYPES, Header
from common.orders import JoinWeightGroup

_KNOCK_S: Final = 0.1
_NCCL_PATIENCE: Final = 2.0
"""Beyond the deadline. NCCL's own watchdog ends the process; ours, which it must not overtake, ends the wait alone."""


class WeightGroup:
    """This rank's end; `join` makes it."""

    def __init__(self, backend: Any, device: torch.device, deadline_s: float) -> None:
        self._backend = backend
        self._device = device
        self._deadline_s = deadline_s

    @classmethod
    def join(cls, order: JoinWeightGroup, rank: int, device: torch.device) -> "WeightGroup":
        """Meet all members; blocks until they are there. `rank` is this one's number among the worker's ranks.

        Raises UsageError if the backend cannot work here, OSError if nobody listens at the address in time, and RuntimeError
        (torch's own) if a member does not come in time.
        """
        if order.backend == "nccl" and device.type != "cuda":
            raise UsageError(f"backend nccl needs a GPU, and this worker runs on {device.type}")
        ends_at = time.monotonic() + order.deadline_s
        number = order.rank_offset + rank
        _wait_listening(order.address, order.port, ends_at)
        store = dist.TCPStore(  # type: ignore[attr-defined]
            order.address, order.port, order.world_size, is_master=False, timeout=timedelta(seconds=order.deadline_s)
        )
        left = timedelta(seconds=max(0.001, ends_at - time.monotonic()))
        store.set_timeout(left)
        kind = "cpu" if order.backend == "gloo" else "cuda"
        place = PrefixStore(f"{kind}/", PrefixStore(f"{order.group}/", PrefixStore(order.group, store)))
        backend: Any
        if order.backend == "gloo":
            backend = dist.ProcessGroupGloo(place, number, order.world_size, left)
        else:
            options: Any = dist.ProcessGroupNCCL.Options()
            options._timeout = timedelta(seconds=_NCCL_PATIENCE * order.deadline_s)
            backend = dist.ProcessGroupNCCL(place, number, order.world_size, options)
        return cls(backend, torch.device("cpu") if order.backend == "gloo" else device, order.deadline_s)

    def receiver(self) -> Receive:
        """Begin an update, all of whose tensors must come within the deadline.

        Returns what waits for the next one, and raises RuntimeError (torch's own) if the trainer is gone, or late.
        """
        return partial(self._receive, time.monotonic() + self._deadline_s)

    def bucket_receiver(self, headers: Sequence[Header]) -> Receive:
        """Begin an update whose tensors lie end to end in one broadcast of bytes, and wait for it; nothing is sent for none.

        Returns what gives the next one. Raises RuntimeError (torch's own) if the trainer is gone, or late.
        """
        flat = torch.empty(sum(map(num_bytes, headers)), dtype=torch.uint8, device=self._device)
        if headers:
            self._fill(flat, time.monotonic() + self._deadline_s)
        tensors = cut(flat, headers)
        return lambda _: next(tensors)

    def _receive(self, ends_at: float, header: Header) -> torch.Tensor:
        tensor = torch.empty(header.shape, dtype=DTYPES[header.dtype], device=self._device)
        # Backends need not know float8 numbers; bytes are bytes.
        self._fill(tensor.view(torch.uint8) if tensor.dtype is torch.float8_e4m3fn else tensor, ends_at)
        return tensor

    def _fill(self, tensor: torch.Tensor, ends_at: float) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        left_s = max(0.001, ends_at - time.monotonic())
        self._backend.broadcast([tensor], options).wait(timedelta(seconds=left_s))

    def leave(self) -> None:
        """Leave; whoever waits in the group for this rank fails."""
        self._backend.abort()


def _wait_listening(address: str, port: int, ends_at: float) -> None:
    """Wait until the trainer listens. torch's own store rests for longer and longer between tries, and beyond its deadline."""
    while True:
        left_s = ends_at - time.monotonic()
        try:
            socket.create_connection((address, port), timeout=max(_KNOCK_S, left_s)).close()
        except OSError as error:
            if left_s <= _KNOCK_S:
                raise OSError(f"nobody listens at {address}:{port}: {error}") from error
            time.sleep(_KNOCK_S)
        else:
            return
