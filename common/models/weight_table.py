"""How a model describes itself to whoever fills it: for each tensor of a checkpoint, the part of a parameter that it fills.

A product that the model fuses is three names with three slices of one parameter. A rank that holds a part of a tensor says where
in it the part begins. It knows no file and no model. Neighbours: `common.models.weights` (reads the files), `common.ranks` (says
which rank holds what).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from common.ranks import Span

Shape = tuple[int, ...]
Part = tuple[slice, ...]
"""A box in a tensor: a slice for each dimension, all with start and stop."""


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor of a checkpoint, and what this rank holds of it."""

    shape: Shape
    """Of the whole tensor."""
    view: torch.Tensor | None = None
    """What the rank's part fills, of as many dimensions as the tensor; None if the rank holds nothing of it."""
    origin: Shape = ()
    """Where in the tensor the part begins; dimensions that are left out begin at 0."""
    is_fp8: bool = False
    """Whether the tensor must be of float8 numbers, which fill the view as they are. Of other targets they are multiplied out."""
    scale: torch.Tensor | None = None
    """float32, of a view of float8 numbers: what the scales of its blocks fill. The part begins and ends between blocks."""

    def __post_init__(self) -> None:
        """A view that sticks out of the tensor would be filled with something else, in silence."""
        if self.view is not None:
            assert self.view.dim() == len(self.shape) >= len(self.origin)
            assert all(cut.start >= 0 and cut.stop <= size for cut, size in zip(self.part, self.shape, strict=True))
            assert self.is_fp8 == (self.view.dtype == torch.float8_e4m3fn) == (self.scale is not None)

    @property
    def part(self) -> Part:
        """What is held, in the tensor's own rows and columns; only for a target with a view."""
        assert self.view is not None
        origin = (*self.origin, *[0] * (self.view.dim() - len(self.origin)))
        return tuple(slice(start, start + size) for start, size in zip(origin, self.view.shape, strict=True))


def whole(view: torch.Tensor) -> Target:
    """A tensor that fills a view, all of it."""
    return Target(tuple(view.shape), view)


def rows_of(
    names: Sequence[str],
    parameter: torch.Tensor,
    sizes: Sequence[int],
    spans: Sequence[Span] | None = None,
    scale: torch.Tensor | None = None,
) -> dict[str, Target]:
    """Tensors that stand one below the other in a parameter: `sizes` rows each, of which the rank holds `spans`, or all.

    Rows of the parameter that are left over are in no target. Works for vectors too. `scale` is that of a float8 parameter.
    """
    targets: dict[str, Target] = {}
    first_row = 0
    for name, size, span in zip(names, sizes, spans or [Span(0, size) for size in sizes], strict=True):
        view, own_scale = parameter.narrow(0, first_row, len(span)), None
        if scale is not None:
            block = len(parameter) // len(scale)
            own_scale = scale.narrow(0, first_row // block, len(span) // block)
        shape = (size, *parameter.shape[1:])
        targets[name] = Target(shape, view, (span.start,), is_fp8=scale is not None, scale=own_scale)
        first_row += len(span)
    return targets


def columns_of(parameter: torch.Tensor, size: int, span: Span, scale: torch.Tensor | None = None) -> Target:
    """A matrix of `size` columns, of which a parameter is those of `span`; `scale` is that of a float8 parameter."""
    assert parameter.shape[1] == len(span)
    shape = (parameter.shape[0], size)
    return Target(shape, parameter, (0, span.start), is_fp8=scale is not None, scale=scale)


@dataclass(frozen=True, slots=True)
class Fused:
    """One tensor `[experts, rows, columns]` that may stand in a checkpoint in place of several matrices."""

    shape: tuple[int, int, int]
    places: Mapping[str, tuple[int, int]]
    """Name of a matrix that it replaces -> the expert and the row at which that matrix begins in it."""


@dataclass(frozen=True, slots=True)
class WeightTable:
    """Where each tensor of a checkpoint goes. Views are of parameters, on their device and in their dtype."""

    targets: Mapping[str, Target]
    """All tensors of the checkpoint, whether this rank holds some of them or not. All are required."""
    fused: Mapping[str, Fused] = field(default_factory=dict)
    """Names that replace groups of `targets` if the checkpoint has them."""
    tolerated: frozenset[str] = frozenset()
    """Names that may be there and are not read."""
    fp8_block: tuple[int, int] | None = None
    """Rows and columns of a block with one scale; None if the checkpoint may hold no float8 numbers."""
