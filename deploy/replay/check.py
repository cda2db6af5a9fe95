"""Is every row there, and is it a possible row? The user's check of a reply, in numpy alone.

It shares no code with the server on purpose: a mistake in the server's own check would be repeated here. A row is one
(token, layer) pair: the K experts that a token chose in one MoE layer. Each bad row is counted once, in the first of
these that fits: all zero (was never written), out of range, duplicated (one expert twice). A row that should be there
and is not is missing. P+G tokens have P+G-1 rows a layer, of which the first s are not asked for.

Shape letters: R positions, L entries of the layer axis, M MoE layers, K top-k. Neighbours: `deploy.answers`
makes arrays of replies; `deploy.replay.judge` calls this; `deploy.replay.reference` knows which rows would be right.
"""

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from deploy.answers import Ids


class RowCounts(Struct, frozen=True, kw_only=True):
    """(token, layer) rows of one reply, or of many added up."""

    rows: int = 0
    all_zero: int = 0
    out_of_range: int = 0
    duplicated: int = 0
    missing: int = 0
    surplus: int = 0

    @property
    def bad(self) -> int:
        """Rows that are wrong, are not there, or should not be."""
        return self.all_zero + self.out_of_range + self.duplicated + self.missing + self.surplus

    def __add__(self, other: "RowCounts") -> "RowCounts":
        return RowCounts(**{name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__})


def check_rows(ids: Ids, is_moe: npt.NDArray[np.bool_], *, num_expected: int, num_experts: int | None) -> RowCounts:
    """Count the rows of one reply, `ids` `[R, L, K]` with `is_moe` `[L]`; `num_expected` positions should be there.

    An id in a dense layer, which has no experts and so must be zero, is out of range. Without `num_experts` only a
    negative id is known to be.
    """
    ids_RMK = ids[:, is_moe].astype(np.int64)
    num_rows, num_layers, top_k = ids_RMK.shape
    # With top-1, a single 0 is just the first expert.
    zero_RM = (ids_RMK == 0).all(axis=-1) & (top_k > 1)
    too_high_RMK = ids_RMK >= num_experts if num_experts is not None else np.zeros_like(ids_RMK, bool)
    outside_RM = ((ids_RMK < 0) | too_high_RMK).any(axis=-1)
    sorted_RMK = np.sort(ids_RMK, axis=-1)
    twice_RM = (sorted_RMK[..., 1:] == sorted_RMK[..., :-1]).any(axis=-1)
    dense = int((ids[:, ~is_moe] != 0).any(axis=-1).sum())
    return RowCounts(
        rows=num_rows * num_layers,
        all_zero=int(zero_RM.sum()),
        out_of_range=int((outside_RM & ~zero_RM).sum()) + dense,
        duplicated=int((twice_RM & ~zero_RM & ~outside_RM).sum()),
        missing=max(0, num_expected - num_rows) * num_layers,
        surplus=max(0, num_rows - num_expected) * num_layers,
    )
