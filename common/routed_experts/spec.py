"""What one row of routed experts is for a model: its layers, its width and the smallest dtype that holds its ids.

It knows no request, no slot and no torch. Neighbours: `capture` and `host_cache` (size their arrays by it), `codec`
(reads and writes rows), `common.messages.RowHeader` (the same facts for one block on the wire).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.messages import RowDtype, RowHeader
from common.versions import Spans

NUMPY_DTYPES: dict[RowDtype, np.dtype[np.unsignedinteger]] = {"uint8": np.dtype("<u1"), "uint16": np.dtype("<u2")}


def smallest_dtype(num_experts: int) -> RowDtype:
    """Name the smallest unsigned type that holds the ids `[0, num_experts)`."""
    assert 0 < num_experts <= 2**16, f"{num_experts} experts fit no row dtype"
    return "uint8" if num_experts <= 2**8 else "uint16"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSpec:
    """A model's rows: `[L, K]` ids in `[0, num_experts)`, one entry a MoE layer; `layer_ids` are global numbers."""

    num_experts: int
    top_k: int
    layer_ids: tuple[int, ...]
    num_hidden_layers: int

    @property
    def num_layers(self) -> int:
        """L, the number of MoE layers; dense ones have no rows."""
        return len(self.layer_ids)

    @property
    def dtype(self) -> RowDtype:
        """The smallest dtype that holds every expert id."""
        return smallest_dtype(self.num_experts)

    @property
    def numpy_dtype(self) -> np.dtype[np.unsignedinteger]:
        """`dtype` for numpy, little-endian."""
        return NUMPY_DTYPES[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row on the wire and in the host cache."""
        return self.num_layers * self.top_k * self.numpy_dtype.itemsize

    def header(self, *, start: int, stop: int, weight_versions: Spans) -> RowHeader:
        """Describe the rows of positions `[start, stop)`, which weights of these versions have computed."""
        return RowHeader(
            start=start,
            stop=stop,
            dtype=self.dtype,
            num_experts=self.num_experts,
            top_k=self.top_k,
            layer_ids=self.layer_ids,
            num_hidden_layers=self.num_hidden_layers,
            weight_versions=weight_versions,
        )


def rows_of(buffer: npt.NDArray[np.uint8], header: RowHeader) -> npt.NDArray[np.unsignedinteger]:
    """See flat bytes as the `[rows, L, K]` ids that `header` describes; the length must fit."""
    return buffer.view(NUMPY_DTYPES[header.dtype]).reshape(header.shape)
