"""Rows in and out of bytes: blocks as arrays, and the forms in which a reply carries them.

    "auto"    [rows, MoE layers, K]      in the smallest dtype: what travels between our own processes too
    "int32"   [rows, hidden layers, K]   int32, dense layers zero: trainers index it by global layer number

It knows no JSON and no HTTP. Neighbours: `spec` (dtypes), `verify` (checks what this only reshapes), `router.merge`,
`common.server` (puts `row_fields` into a reply).
"""

import base64
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from common.errors import RowsMismatch
from common.messages import RowBlock, RowHeader
from common.routed_experts.spec import NUMPY_DTYPES, rows_of, smallest_dtype

Rows = npt.NDArray[np.unsignedinteger]
RowForm = Literal["int32", "auto"]

# One base64 call holds the interpreter lock to its end, so large replies are encoded in slices of about this size
# (R16).
_SLICE_BYTES = 144 * 2**10
# A header comes from another process. Beyond these it is no model's, and a few bytes of rows would become very many.
_MAX_TOP_K: Final = 256
_MAX_HIDDEN_LAYERS: Final = 1024


def view(block: RowBlock) -> Rows:
    """See a block's bytes as its ids, `[rows, L, K]`, without a copy; valid as long as the block's data is.

    Raises RowsMismatch if no model has such rows, or if the data is not as long as the header says.
    """
    header, data = block
    _check_header(header)
    if len(data) != header.num_bytes:
        raise RowsMismatch(
            f"rows [{header.start}, {header.stop}) of shape {list(header.shape)} {header.dtype} "
            f"should be {header.num_bytes} bytes, but are {len(data)}"
        )
    return rows_of(np.frombuffer(data, dtype=np.uint8), header)


def _check_header(header: RowHeader) -> None:
    """Check that the numbers can be those of a model and of some of its positions."""
    layer_ids, num_experts = header.layer_ids, header.num_experts
    if not 0 <= header.start <= header.stop:
        raise RowsMismatch(f"there are no rows [{header.start}, {header.stop})")
    if not (0 < num_experts <= 2**16 and header.dtype == smallest_dtype(num_experts)):
        raise RowsMismatch(f"the ids of {num_experts} experts are no {header.dtype}")
    if not 0 < header.top_k <= min(num_experts, _MAX_TOP_K):
        raise RowsMismatch(f"a row cannot have {header.top_k} of {num_experts} experts")
    is_ordered = all(left < right for left, right in pairwise(layer_ids))
    if not (layer_ids and is_ordered and layer_ids[0] >= 0 and layer_ids[-1] < header.num_hidden_layers):
        raise RowsMismatch(
            f"{len(layer_ids)} MoE layers are not ordered numbers out of {header.num_hidden_layers} layers"
        )
    if header.num_hidden_layers > _MAX_HIDDEN_LAYERS:
        raise RowsMismatch(f"{header.num_hidden_layers} layers are more than {_MAX_HIDDEN_LAYERS}")


def block_of(header: RowHeader, rows: Rows) -> RowBlock:
    """Make a block of an array `[rows, L, K]` of the header's dtype; the block borrows the array's memory if it can."""
    assert rows.shape == header.shape, (rows.shape, header.shape)
    # A memoryview with a zero in its shape cannot be cast to bytes.
    return RowBlock(header, np.ascontiguousarray(rows).data.cast("B") if rows.size else b"")


def describe(header: RowHeader, form: RowForm) -> dict[str, object]:
    """Make the reply fields that say what `routed_experts` is, in the given form."""
    rows, _, top_k = header.shape
    layer_ids = header.layer_ids if form == "auto" else tuple(range(header.num_hidden_layers))
    return {
        "routed_experts_start_len": header.start,
        "routed_experts_shape": (rows, len(layer_ids), top_k),
        "routed_experts_dtype": header.dtype if form == "auto" else "int32",
        "routed_experts_layer_ids": layer_ids,
        "routed_experts_moe_layer_ids": header.layer_ids,
    }


def row_fields(block: RowBlock, form: RowForm, *, binary: bool) -> dict[str, object]:
    """Make all the `routed_experts` fields of a reply: base64 in `form`, or, if `binary`, raw bytes in the "auto" form.

    Raises RowsMismatch if the data is not as long as the header says.
    """
    view(block)
    if binary:
        return {"routed_experts": block.data, **describe(block.header, "auto")}
    return {"routed_experts": encode_base64(block, form), **describe(block.header, form)}


def rows_from_reply(meta_info: Mapping[str, object]) -> npt.NDArray[np.integer]:
    """Read the rows of a reply as a client does, `[rows, layers, K]` of the dtype that the reply names."""
    data, shape = meta_info["routed_experts"], meta_info["routed_experts_shape"]
    raw = base64.b64decode(data, validate=True) if isinstance(data, str) else data
    assert isinstance(raw, bytes | memoryview)
    assert isinstance(shape, list | tuple)
    return np.frombuffer(raw, dtype=np.dtype(str(meta_info["routed_experts_dtype"])).newbyteorder("<")).reshape(shape)


def base64_slices(block: RowBlock, form: RowForm, *, first: int = 0) -> Iterator[bytes]:
    """Encode a block as padded base64 without newlines, in slices to be written one after the other, from the `first` on.

    Each slice costs well under a millisecond, so a thread that walks through them leaves the interpreter to others. All
    but the last are of equally many rows, and so the same in every longer block that begins with these rows.
    """
    rows = view(block)
    header = block.header
    slice_rows = _slice_rows(header, form)
    for lo in range(first * slice_rows, len(rows), slice_rows):
        part = rows[lo : lo + slice_rows]
        yield base64.b64encode((_spread(part, header) if form == "int32" else part).data)


def num_full_slices(header: RowHeader, form: RowForm) -> int:
    """Count the slices of `base64_slices` that further rows would not change."""
    return header.shape[0] // _slice_rows(header, form)


def base64_length(header: RowHeader, form: RowForm) -> int:
    """Count the characters that `base64_slices` will give in all."""
    return (header.shape[0] * _row_bytes(header, form) + 2) // 3 * 4


def encode_base64(block: RowBlock, form: RowForm) -> str:
    """Encode a whole block as padded base64 without newlines; "" for zero rows."""
    return b"".join(base64_slices(block, form)).decode("ascii")


def _slice_rows(header: RowHeader, form: RowForm) -> int:
    # A multiple of three rows is a multiple of three bytes, so that only the last slice is padded.
    return max(1, _SLICE_BYTES // max(1, 3 * _row_bytes(header, form))) * 3


def _row_bytes(header: RowHeader, form: RowForm) -> int:
    if form == "int32":
        return header.num_hidden_layers * header.top_k * 4
    return len(header.layer_ids) * header.top_k * NUMPY_DTYPES[header.dtype].itemsize


def _spread(rows: Rows, header: RowHeader) -> npt.NDArray[np.int32]:
    """Place `[n, L, K]` rows at their global layer numbers: `[n, hidden layers, K]`, dense layers zero."""
    layer_ids = header.layer_ids
    spread = np.zeros((len(rows), header.num_hidden_layers, header.top_k), dtype="<i4")
    # Layers without a gap between them, nearly always, take a fifth of the time in one slice.
    has_gaps = len(layer_ids) == 0 or layer_ids != tuple(range(layer_ids[0], layer_ids[-1] + 1))
    spread[:, list(layer_ids) if has_gaps else slice(layer_ids[0], layer_ids[-1] + 1)] = rows
    return spread
