"""What the ranks of a worker compute together: sums, gathered tokens, shared draws. With one rank, nothing.

`Collectives` is what the model and the engine see. Three groups stand behind it (`common.kernels.rank_group`): all ranks of the
worker, the ranks of one attention group, and the ranks at one place of every group, across which the groups' tokens travel.

Shape letters: T tokens of a step in this group, M attention groups, B lanes a group, N tokens of all groups, D hidden size,
K top-k, S draws, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.distributed.distributed_c10d import Store

from common.kernels.interface import Kernels, Lanes
from common.kernels.rank_group import RankGroup, open_rank_groups
from common.ranks import Rank, Ranks

_ALIGNMENT_BYTES = 16
"""Of each part of a packed row, so that any dtype can be viewed there."""


@dataclass(frozen=True, slots=True)
class Gathering:
    """How the tokens of all attention groups come together in one step."""

    per_group: int
    """B: lanes that every group brings, the most tokens of one at least."""
    num_tokens: tuple[int, ...]
    """`[M]`: how many of its lanes hold tokens, in a step that is not padded; they are brought together without gaps."""
    lanes: Lanes | None = None
    """The same on the device, in a padded step: its lanes stay where they are, and `num_tokens` means nothing."""


class Routed(NamedTuple):
    """Tokens on their way to the experts."""

    hidden: torch.Tensor
    """`[T, D]`, of all groups `[N, D]`."""
    ids: torch.Tensor
    """`[T, K]`, any integer dtype."""
    weights: torch.Tensor
    """`[T, K]` in the hidden dtype."""


class Collectives:
    """One rank's part in what all compute together. `alone()` makes that of a worker with one rank."""

    def __init__(
        self, rank: Rank, everybody: RankGroup | None, group: RankGroup | None, across: RankGroup | None
    ) -> None:
        """The three groups; None where one would have a single rank."""
        self.rank = rank
        self._everybody, self._group, self._across = everybody, group, across

    @classmethod
    def alone(cls) -> "Collectives":
        """Of a rank that is a worker of its own."""
        return cls(Rank(0, Ranks()), None, None, None)

    @classmethod
    def connect(cls, rank: Rank, store: Store, device: torch.device) -> "Collectives":
        """Meet the other ranks in `store`; blocks until all are there."""
        return cls(rank, *open_rank_groups(rank, store, device))

    # -------------------------------------------------------------------------------------------- sums

    def add_norm(
        self, kernels: Kernels, x_TD: torch.Tensor, partial: torch.Tensor | None, weight_D: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`Kernels.add_norm`, of the sum of what the ranks of the attention group have computed: the same bits on each."""
        if self._group is None or partial is None:
            return kernels.add_norm(x_TD, partial, weight_D, eps)
        return kernels.add_norm_over(x_TD, kernels.add_up(partial), self._group, weight_D, eps)

    # -------------------------------------------------------------------------------------------- tokens of all groups

    def gather(self, own: Routed, gathering: Gathering | None) -> Routed:
        """Bring the tokens of all attention groups to every rank; ids, weights and hidden states travel together."""
        if self._across is None:
            return own
        assert gathering is not None, "with several attention groups a batch says how they come together"
        gathered = self._across.gather(_pack(own, gathering.per_group))
        if gathering.lanes is None:
            gathered = _without_gaps(gathered, gathering)
        return _unpack(gathered, own)

    def scatter_sum(self, partial_ND: torch.Tensor, gathering: Gathering | None, num_tokens: int) -> torch.Tensor:
        """Add up the groups' shares of what the experts say of the gathered tokens; returns this group's own, `[T, D]`.

        What each rank of the group has then is still its part of a sum.
        """
        if self._across is None:
            return partial_ND
        assert gathering is not None
        if gathering.lanes is None:
            partial_ND = _with_gaps(partial_ND, gathering)
        return self._across.sum_rows(partial_ND)[:num_tokens]

    # -------------------------------------------------------------------------------------------- draws

    def gather_vocabulary(self, logits_SV: torch.Tensor) -> torch.Tensor:
        """Put the parts `[S, V / ranks of the group]` of the logits side by side: `[S, V]`, on each rank of the group."""
        if self._group is None:
            return logits_SV
        (rows, width), size = logits_SV.shape, self.rank.of.group_size
        gathered = self._group.gather(logits_SV)
        return gathered.view(size, rows, width).transpose(0, 1).reshape(rows, size * width)

    def share_draws(self, tokens_S: torch.Tensor) -> torch.Tensor:
        """Give the group's followers the tokens int64 `[S]` that its leader has drawn; a follower's are overwritten."""
        return tokens_S if self._group is None else self._group.share(tokens_S)

    # -------------------------------------------------------------------------------------------- sizes

    def smallest(self, number: int, device: torch.device) -> int:
        """The smallest of all ranks' numbers; waits for the device."""
        return number if self._everybody is None else self._everybody.smallest(number, device)


def _pack(own: Routed, num_lanes: int) -> torch.Tensor:
    """Bytes `[B, row]`: hidden state, weights and ids of a token side by side. Lanes without a token are unset."""
    row_bytes = sum(_padded_bytes(part) for part in _parts(own))
    packed = own.hidden.new_empty((num_lanes, row_bytes), dtype=torch.uint8)
    for view, part in zip(_views(packed, own), _parts(own), strict=True):
        view[: len(part)].copy_(part)
    return packed


def _unpack(packed: torch.Tensor, like: Routed) -> Routed:
    hidden, weights, ids = (view.contiguous() for view in _views(packed, like))
    return Routed(hidden, ids, weights)


def _parts(routed: Routed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In the order in which they stand in a packed row."""
    return routed.hidden, routed.weights, routed.ids


def _padded_bytes(part: torch.Tensor) -> int:
    return -(-part.shape[1] * part.itemsize // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _views(packed: torch.Tensor, like: Routed) -> list[torch.Tensor]:
    """The columns of packed rows as what they are."""
    views: list[torch.Tensor] = []
    start = 0
    for part in _parts(like):
        views.append(packed[:, start : start + part.shape[1] * part.itemsize].view(part.dtype))
        start += _padded_bytes(part)
    return views


def _without_gaps(gathered: torch.Tensor, gathering: Gathering) -> torch.Tensor:
    """Keep the lanes that hold tokens, group after group."""
    if all(num == gathering.per_group for num in gathering.num_tokens):
        return gathered
    groups = torch.split(gathered, gathering.per_group)
    return torch.cat([lanes[:num] for lanes, num in zip(groups, gathering.num_tokens, strict=True)])


def _with_gaps(partial_ND: torch.Tensor, gathering: Gathering) -> torch.Tensor:
    """Put the tokens back into their lanes; the others are zero."""
    if all(num == gathering.per_group for num in gathering.num_tokens):
        return partial_ND
    lanes = partial_ND.new_zeros((len(gathering.num_tokens), gathering.per_group, partial_ND.shape[1]))
    for own, tokens in zip(lanes, torch.split(partial_ND, list(gathering.num_tokens)), strict=True):
        own[: len(tokens)] = tokens
    return lanes.flatten(0, 1)
