"""A group of ranks that compute together: NCCL on GPUs, gloo elsewhere, and a shorter way for few tokens.

A step of few tokens adds up small tensors twice a layer, and NCCL's own protocol takes longer than reading the other GPUs' memory
(17 to 26 us against 6 us for one token on two H200s). So there each rank also has memory that the others can read. Which way is
taken depends on sizes that are the same on all ranks.

Everything is queued on the current stream, and can be captured in CUDA graphs.
"""

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch.distributed.distributed_c10d import AllgatherOptions, PrefixStore, Store  # type: ignore[attr-defined]

from common.kernels.interface import PeerArea
from common.ranks import Rank

log = logging.getLogger(__name__)

_TIMEOUT: Final = timedelta(minutes=30)
"""Longer than any compiling takes; whether a rank is stuck is seen much earlier by the worker's frontend."""
_MOST_BYTES: Final = 2 * 2**20
"""Of what is read from the others' memory; beyond, NCCL is as fast."""
_MOST_SIGNALS: Final = 256
"""Of the tokens of one sum, one from each rank."""


class RankGroup:
    """This rank's end of a group of at least two."""

    def __init__(self, backend: Any, size: int, index: int, reader: "PeerReader | None" = None) -> None:
        """`backend` is one of torch's process groups, in which this is rank `index`."""
        self._backend = backend
        self._size = size
        self._index = index
        self._reader = reader

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        """Add up all ranks' tensors, maybe in place; the same bits on each."""
        partial = partial.contiguous()
        if self._reader is not None and self._reader.adds(partial):
            return self._reader.sum(partial)
        _finish(self._backend.allreduce([partial], _options(dist.AllreduceOptions)))
        return partial

    def area(self, partial: torch.Tensor) -> PeerArea | None:
        """Where all ranks can read each other's `[T, D]` parts of one sum; None if these are too large, or the GPUs cannot.

        All ranks ask in the same order, and an even number of times in each forward pass: two areas serve in turn.
        """
        return None if self._reader is None else self._reader.area(partial, self._index)

    def sum_rows(self, partial: torch.Tensor) -> torch.Tensor:
        """Add up all ranks' matrices; returns this rank's share of the rows, one of as many equal shares as there are ranks."""
        partial = partial.contiguous()
        num_rows = len(partial) // self._size
        if self._reader is not None and self._reader.adds(partial):
            return self._reader.sum(partial)[self._index * num_rows : (self._index + 1) * num_rows]
        own = partial.new_empty((num_rows, partial.shape[1]))
        _finish(self._backend._reduce_scatter_base(own, partial, _options(dist.ReduceScatterOptions)))
        return own

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """All ranks' matrices one below the other, in the ranks' order; they are of one shape."""
        rows = rows.contiguous()
        if self._reader is not None and self._reader.copies(rows):
            return self._reader.gather(rows)
        gathered = rows.new_empty((self._size * len(rows), rows.shape[1]))
        _finish(self._backend._allgather_base(gathered, rows, _options(AllgatherOptions)))
        return gathered

    def share(self, tensor: torch.Tensor) -> torch.Tensor:
        """The first rank's tensor, in place of the others'."""
        _finish(self._backend.broadcast([tensor], _options(dist.BroadcastOptions)))
        return tensor

    def smallest(self, number: int, device: torch.device) -> int:
        """The smallest of all ranks' numbers; waits for the device."""
        numbers = torch.tensor([number], dtype=torch.int64, device=device)
        options = _options(dist.AllreduceOptions)
        options.reduceOp = dist.ReduceOp.MIN
        _finish(self._backend.allreduce([numbers], options))
        return int(numbers.item())


def open_rank_groups(
    rank: Rank, store: Store, device: torch.device
) -> tuple[RankGroup | None, RankGroup | None, RankGroup | None]:
    """Meet the other ranks in `store`: all of them, those of the own attention group, and those at the same place of every group.

    Blocks until they are there; None for a group of one. On GPUs a process can be one rank only, since torch keeps NCCL's groups in
    globals; gloo's are objects.
    """
    if device.type == "cuda":
        return _open_nccl(rank, store, device)
    size, dp = rank.of.group_size, rank.of.dp

    def open_one(name: str, index: int, count: int) -> RankGroup | None:
        if count == 1:
            return None
        options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        # All ranks of a worker are on this host, whatever its name may resolve to.
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = _TIMEOUT
        return RankGroup(dist.ProcessGroupGloo(PrefixStore(name, store), index, count, options), count, index)

    return (
        open_one("all", rank.index, rank.of.tp),
        open_one(f"group-{rank.group}", rank.place, size),
        open_one(f"across-{rank.place}", rank.group, dp),
    )


def _open_nccl(
    rank: Rank, store: Store, device: torch.device
) -> tuple[RankGroup | None, RankGroup | None, RankGroup | None]:
    tp, size = rank.of.tp, rank.of.group_size
    dist.init_process_group(
        "nccl",
        store=PrefixStore("nccl", store),
        rank=rank.index,
        world_size=tp,
        timeout=_TIMEOUT,
        device_id=device,
    )

    def open_one(members: list[list[int]], index: int, *, reads: bool = True) -> RankGroup | None:
        """Every rank opens all groups of a kind, in one order, and keeps its own."""
        count = len(members[0])
        if count == 1:
            return None
        opened = [dist.new_group(ranks) for ranks in members]
        own = next(group for group, ranks in zip(opened, members, strict=True) if rank.index in ranks)
        return RankGroup(own, count, index, PeerReader.open(own, count, device) if reads else None)

    groups = [list(range(first, first + size)) for first in range(0, tp, size)]
    across = [list(range(place, tp, size)) for place in range(size)]
    return (
        open_one([list(range(tp))], rank.index, reads=False),
        open_one(groups, rank.place),
        open_one(across, rank.group),
    )


class PeerReader:
    """Memory of this GPU that the others read, and theirs."""

    def __init__(self, group: Any, size: int, device: torch.device) -> None:
        self._name: str = group.group_name
        self._size = size
        self._sums, self._rows = (
            symmetric_memory.empty(_MOST_BYTES, dtype=torch.uint8, device=device) for _ in range(2)
        )
        symmetric_memory.rendezvous(self._sums, self._name)
        self._handle = symmetric_memory.rendezvous(self._rows, self._name)
        self._areas = symmetric_memory.empty(2 * _MOST_BYTES // size, dtype=torch.uint8, device=device)
        areas = symmetric_memory.rendezvous(self._areas, self._name)
        begins, self._signals = (
            torch.tensor(addresses, dtype=torch.int64, device=device)
            for addresses in (areas.buffer_ptrs, areas.signal_pad_ptrs)
        )
        self._addresses = [begins, begins + _MOST_BYTES // size]
        self._turn = 0

    @classmethod
    def open(cls, group: Any, size: int, device: torch.device) -> "PeerReader | None":
        """Share memory with the other ranks; None if these GPUs cannot."""
        try:
            return cls(group, size, device)
        except RuntimeError as error:
            log.warning("the ranks' GPUs cannot read each other's memory; small steps are slower: %s", error)
            return None

    def adds(self, tensor: torch.Tensor) -> bool:
        """Whether a sum can be had this way."""
        return tensor.dtype in (torch.bfloat16, torch.float32) and self._fits(tensor)

    def copies(self, tensor: torch.Tensor) -> bool:
        """Whether all ranks' tensors can be had this way."""
        return self._fits(tensor)

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        """Each rank reads all the others' and adds them in the ranks' order."""
        own = self._sums[: partial.nbytes].view(partial.dtype)
        summed: torch.Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(own, partial.view(-1), "sum", self._name)
        return summed.view(partial.shape)

    def area(self, partial: torch.Tensor, index: int) -> PeerArea | None:
        """See `RankGroup.area`.

        Who is about to write one area has met the others over the other one since they read this.
        """
        if not self._fits(partial) or len(partial) * self._size > _MOST_SIGNALS:
            return None
        begin = self._turn * (_MOST_BYTES // self._size)
        own = self._areas[begin : begin + partial.nbytes].view(partial.dtype).view(partial.shape)
        addresses, self._turn = self._addresses[self._turn], 1 - self._turn
        return PeerArea(own, addresses, self._signals, index)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Each rank copies all the others'."""
        self._rows[: rows.nbytes].view(rows.dtype).copy_(rows.view(-1))
        self._handle.barrier(channel=0)
        gathered = torch.cat([self._handle.get_buffer(index, rows.shape, rows.dtype) for index in range(self._size)])
        # Nobody may write the next rows before all have read these.
        self._handle.barrier(channel=1)
        return gathered

    def _fits(self, tensor: torch.Tensor) -> bool:
        return tensor.nbytes * self._size <= _MOST_BYTES and tensor.nbytes % 16 == 0 and tensor.nbytes > 0


def _options(kind: Callable[[], Any]) -> Any:
    """NCCL's work goes onto the current stream itself, not onto one of its own that the current one must wait for."""
    options = kind()
    options.asyncOp = False
    return options


def _finish(work: Any) -> None:
    """Wait for gloo's threads; NCCL has queued its work by now."""
    if work is not None:
        work.wait()
