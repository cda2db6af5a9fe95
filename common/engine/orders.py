"""What the frontend's orders mean in one rank: weights are checked and taken, process groups joined and left, memory given
back and taken again, profiles recorded.

Leader and followers carry out the same orders in the same sequence, each on its own part of the model. While a rank carries one
out it has no step in flight. A rank whose weights were only taken in part does not trust any of its tensors, until each has been
taken again. Neighbours: `common.engine.engine` (the leader, which gathers the verdicts), `common.engine.follower`,
`common.models.weight_sources` (where weights come from).
"""

import logging
from functools import partial
from pathlib import Path
from typing import assert_never

import torch
from msgspec import Struct

from common.engine.forward_pass import ForwardPass
from common.engine.profiles import RankProfiler
from common.engine.rank_memory import RankMemory
from common.engine.weight_groups import WeightGroup
from common.errors import UsageError
from common.models.pickled import read_pickled
from common.models.weight_files import FileWeights
from common.models.weight_sources import BroadcastWeights, TensorWeights, Weights, announced
from common.models.weight_table import WeightTable
from common.orders import (
    AwaitIdle,
    CheckWeights,
    Continue,
    JoinWeightGroup,
    LeaveWeightGroup,
    LoadWeights,
    Order,
    Pause,
    PickledWeights,
    ReleaseMemory,
    ResumeMemory,
    SetWeightVersion,
    StartProfile,
    StopProfile,
    WarmUp,
    WeightBroadcast,
    WeightFiles,
    WeightSource,
)
from common.ranks import Rank

log = logging.getLogger(__name__)


class Verdict(Struct, frozen=True, tag=True, kw_only=True):
    """How a rank has carried out an order; `error` says what came in between, `num_left` counts tensors: see the order."""

    rank: int
    error: str | None = None
    num_left: int = 0


class RankOrders:
    """Carries orders out in one rank."""

    def __init__(self, forward: ForwardPass, rank: Rank, device: torch.device) -> None:
        self.memory = RankMemory(forward, device)
        self.profiler = RankProfiler(rank, device)
        self._forward = forward
        self._rank = rank
        self._device = device
        self._groups: dict[str, WeightGroup] = {}
        self._unsure: set[str] = set()
        """Tensors that may be half old and half new."""
        self._opened: tuple[WeightSource, Weights] | None = None
        """What the order before has checked: a pickle's shared memory may be opened only once."""

    def carry_out(self, order: Order) -> Verdict:
        """Do it; all that was queued on the device must have been done.

        A failure to warm up is raised if there are other ranks: nobody knows where in it they are then.
        """
        opened, self._opened = self._opened, None
        try:
            num_left = self._carry_out(order, opened)
        except (UsageError, OSError, RuntimeError) as error:
            if isinstance(order, WarmUp) and self._rank.of.tp > 1:
                raise
            log.warning("%s has failed: %s", type(order).__name__, error)
            message = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
            return Verdict(rank=self._rank.index, error=message, num_left=len(self._unsure))
        return Verdict(rank=self._rank.index, num_left=num_left)

    def _carry_out(self, order: Order, opened: tuple[WeightSource, Weights] | None) -> int:
        match order:
            case Pause() | Continue() | SetWeightVersion() | AwaitIdle():
                pass  # the leader's loop does all of it
            case CheckWeights(source=source):
                weights = self._open(source)
                num_missing = weights.check(self._weight_table())
                self._opened = (source, weights)
                return num_missing
            case LoadWeights(source=source):
                is_open = opened is not None and opened[0] == source
                self._load(source, opened[1] if opened is not None and is_open else None)
                return len(self._unsure)
            case JoinWeightGroup():
                self._leave(order.group)
                self._groups[order.group] = WeightGroup.join(order, self._rank.index, self._device)
            case LeaveWeightGroup(group=group):
                if not self._leave(group):
                    raise UsageError(f"there is no group {group!r}")
            case ReleaseMemory(kinds=kinds):
                self.memory.release(kinds)
            case ResumeMemory(kinds=kinds):
                self.memory.resume(kinds)
            case WarmUp():
                self.memory.warm_up()
            case StartProfile():
                self.profiler.start(order)
            case StopProfile():
                self.profiler.stop()
            case _:
                assert_never(order)
        return 0

    def _weight_table(self) -> WeightTable:
        """Raises UsageError while there are no weights to change."""
        if "weights" in self.memory.released:
            raise UsageError("the weights' memory is released; resume it first")
        return self._forward.weight_table()

    def _load(self, source: WeightSource, weights: Weights | None) -> None:
        table = self._weight_table()
        # Until all is done this rank may have some of the tensors, or another one may have what this one has not.
        unsure, self._unsure = self._unsure, set(table.targets)
        try:
            taken = (weights or self._open(source)).load(table)
        except RuntimeError:
            if isinstance(source, WeightBroadcast):
                self._leave(source.group)  # nobody knows what comes next in it
            raise
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._unsure = unsure - taken

    def _open(self, source: WeightSource) -> Weights:
        match source:
            case WeightFiles():
                return FileWeights(Path(source.path))
            case WeightBroadcast():
                group = self._groups.get(source.group)
                if group is None:
                    raise UsageError(f"there is no group {source.group!r}")
                headers = announced(source.names, source.dtypes, source.shapes)
                in_bucket = partial(group.bucket_receiver, tuple(headers.values()))
                return BroadcastWeights(headers, in_bucket if source.is_bucket else group.receiver)
            case PickledWeights(paths=paths, is_bucket=is_bucket):
                if len(paths) not in (1, self._rank.of.tp):
                    raise UsageError(
                        f"there are tensors for {len(paths)} ranks, and this worker has {self._rank.of.tp}"
                    )
                path = Path(paths[self._rank.index % len(paths)])
                return TensorWeights(read_pickled(path, is_bucket=is_bucket))

    def _leave(self, name: str) -> bool:
        group = self._groups.pop(name, None)
        if group is not None:
            group.leave()
        return group is not None
