"""Where new weights come from, each ready to be checked and then taken: files, a trainer's broadcasts, tensors in memory.

All do the same two things in a rank, against the model's own `WeightTable`: `check` compares names, shapes and types, and writes
nothing; `load` takes the tensors. Neighbours: `common.models.weight_files`, `common.models.weights` (the comparison and the
filling), `common.engine.orders` (the user).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from common.errors import CheckpointError
from common.models.weight_table import Part, WeightTable
from common.models.weights import DTYPES, Header, match

_WHERE = "the update"
_NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}
"""safetensors' name for each of torch's names of a type."""

Receive = Callable[[Header], torch.Tensor]
"""Waits for the next tensor, which is of this shape and type."""


class Weights(Protocol):
    """Tensors that a model may take."""

    def check(self, table: WeightTable) -> int:
        """Compare names, shapes and types with the table; returns how many of the model's tensors are missing.

        Raises CheckpointError for what does not fit.
        """

    def load(self, table: WeightTable) -> frozenset[str]:
        """Check once more, and copy what the rank holds into the table's views; returns the model's tensors that were there.

        Raises CheckpointError, OSError or RuntimeError; then any of the views may have been written.
        """


class BroadcastWeights:
    """Tensors that come one after the other, in the order of `headers`, and are nowhere else; `begin` opens their way."""

    def __init__(self, headers: Mapping[str, Header], begin: Callable[[], Receive]) -> None:
        self._headers = headers
        self._begin = begin

    def check(self, table: WeightTable) -> int:
        """Compare what was announced."""
        return len(match(table, self._headers, _WHERE, is_partial=True).missing)

    def load(self, table: WeightTable) -> frozenset[str]:
        """Take each tensor as it comes; a float8 matrix waits for its scales, or they for it, and nothing else is kept."""
        found = match(table, self._headers, _WHERE, is_partial=True)
        matrix_of = {scale: name for name, scale in found.scales.items()}
        waiting: dict[str, torch.Tensor] = {}

        def fetch(name: str, part: Part) -> torch.Tensor:
            return waiting[name][part]

        receive = self._begin()
        for arrived, header in self._headers.items():
            waiting[arrived] = receive(header)
            name = matrix_of.get(arrived, arrived)
            parts = [name, found.scales[name]] if name in found.scales else [name]
            if waiting.keys() >= set(parts):
                found.fill(name, fetch)
                for part in parts:
                    del waiting[part]
        return found.taken


class TensorWeights:
    """Tensors that are in this process already."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
        self._headers = {name: _header(tensors[name].shape, dtype) for name, dtype in dtypes.items()}

    def check(self, table: WeightTable) -> int:
        """Compare the tensors."""
        return len(match(table, self._headers, _WHERE, is_partial=True).missing)

    def load(self, table: WeightTable) -> frozenset[str]:
        """Copy them."""
        found = match(table, self._headers, _WHERE, is_partial=True)
        for name in found.reads:
            found.fill(name, lambda stored, part: self._tensors[stored][part])
        return found.taken


def announced(names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]]) -> dict[str, Header]:
    """Headers of tensors that somebody says will come; types as torch calls them. Raises CheckpointError."""
    if not len(names) == len(dtypes) == len(shapes):
        raise CheckpointError(f"{_WHERE} has {len(names)} names, {len(dtypes)} dtypes and {len(shapes)} shapes")
    if twice := sorted({name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()):
        raise CheckpointError(f"{_WHERE} has tensor {twice[0]} twice")
    short = [dtype.removeprefix("torch.") for dtype in dtypes]
    for name, dtype in zip(names, short, strict=True):
        if dtype not in _NAMES:
            raise CheckpointError(f"{_WHERE}: tensor {name} has type {dtype}, which is not one of {', '.join(_NAMES)}")
    return {name: _header(shape, dtype) for name, dtype, shape in zip(names, short, shapes, strict=True)}


def _header(shape: Sequence[int], dtype: str) -> Header:
    return Header(tuple(shape), _NAMES.get(dtype, dtype))
