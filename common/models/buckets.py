"""Tensors that travel end to end in one flat tensor, which SGLang's trainers call a flattened bucket.

One that was pickled says where each of its tensors lies, and is not believed before it has been looked at. One that is broadcast
is bytes, of the tensors that were announced and no others. Neighbours: `common.models.pickled` and `common.engine.weight_groups`,
where they come from.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated

import msgspec
import torch
from msgspec import Meta, Struct

from common.errors import CheckpointError
from common.models.weights import DTYPES, Header

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]

_WHERE = "the update"


class Piece(Struct, frozen=True, kw_only=True):
    """Where a tensor lies. Indices count elements of the flat tensor: bytes, if it is of uint8, as any dtypes may be in one."""

    name: str
    shape: tuple[Count, ...]
    dtype: torch.dtype
    start_idx: Count
    end_idx: Count
    numel: Count
    """From start to end."""


def unpacked(flat: object, metadata: Sequence[object]) -> dict[str, torch.Tensor]:
    """Views of a flat tensor, by name; `metadata` is what somebody says of each. Raises CheckpointError, with tensor and field."""
    if type(flat) is not torch.Tensor or flat.dim() != 1 or not flat.is_contiguous():
        raise CheckpointError(f"{_WHERE}: flattened_tensor must be a tensor of one dimension without gaps")
    tensors: dict[str, torch.Tensor] = {}
    end = 0
    for index, said in enumerate(metadata):
        piece = _piece(index, said)
        problem = "is there twice" if piece.name in tensors else _problem(piece, flat, end)
        if problem is not None:
            raise CheckpointError(f"{_WHERE}: tensor {piece.name}: {problem}")
        end = piece.end_idx
        tensors[piece.name] = _view(flat[piece.start_idx : end], piece.dtype, piece.shape)
    return tensors


def num_bytes(header: Header) -> int:
    """What a tensor takes in a bucket of bytes; nothing lies between two of them."""
    return math.prod(header.shape) * DTYPES[header.dtype].itemsize


def cut(flat: torch.Tensor, headers: Iterable[Header]) -> Iterator[torch.Tensor]:
    """Views of a flat tensor of bytes, one after the other; it holds them all."""
    start = 0
    for header in headers:
        end = start + num_bytes(header)
        yield _view(flat[start:end], DTYPES[header.dtype], header.shape)
        start = end


def _piece(index: int, said: object) -> Piece:
    try:
        return msgspec.convert(said, Piece)
    except msgspec.ValidationError as error:
        name = said.get("name") if isinstance(said, dict) else None
        tensor = f"tensor {name}" if isinstance(name, str) else f"tensor {index} of metadata"
        raise CheckpointError(f"{_WHERE}: {tensor}: {error}") from error


def _problem(piece: Piece, flat: torch.Tensor, end: int) -> str | None:
    """What is wrong with a piece that follows one that ends at `end`."""
    has_bytes, takes_bytes = piece.numel * flat.element_size(), math.prod(piece.shape) * piece.dtype.itemsize
    if piece.start_idx < end:
        return f"start_idx is {piece.start_idx}, and the tensor before it ends at {end}"
    if piece.end_idx > len(flat):
        return f"end_idx is {piece.end_idx}, and flattened_tensor has {len(flat)} elements"
    if piece.numel != piece.end_idx - piece.start_idx:
        return f"numel is {piece.numel}, from start_idx {piece.start_idx} to end_idx {piece.end_idx}"
    if flat.dtype not in (torch.uint8, piece.dtype):
        return f"dtype is {piece.dtype}, and flattened_tensor is of {flat.dtype}"
    if has_bytes != takes_bytes:
        return f"shape {list(piece.shape)} of {piece.dtype} takes {takes_bytes} bytes, and numel is of {has_bytes}"
    return None


def _view(flat: torch.Tensor, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    if flat.storage_offset() * flat.element_size() % dtype.itemsize:
        flat = flat.clone()  # numbers begin at multiples of their size
    return flat.view(dtype).reshape(tuple(shape))
