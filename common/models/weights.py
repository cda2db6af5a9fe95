"""Matches stored tensors with what a model wants, and fills its parameters; knows no model and no file.

A model describes itself as a `WeightTable`, whoever has tensors by their headers. `match` compares the two before the first byte
is read or written. Of a tensor of which a rank holds a part, only that is asked for; of a tensor that others hold, nothing. A
matrix `NAME` of float8 numbers has its scales, one for each block, in the tensor `NAME_scale_inv`; the model gets both if its
table wants float8 numbers there, and their product if not. Neighbours: `common.models.weight_table` (what is to be filled),
`common.models.weight_sources` (where tensors come from).
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch

from common.errors import CheckpointError
from common.models.weight_table import Part, Shape, WeightTable

log = logging.getLogger(__name__)

DTYPES: Final = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""The types that tensors may have, as safetensors calls them."""
_FP8, _SCALE = "F8_E4M3", "_scale_inv"
_FLOATS = {name: dtype for name, dtype in DTYPES.items() if name != _FP8}
_NAMED_IN_ERRORS = 5


class Header(NamedTuple):
    """What is known of a stored tensor before it is read."""

    shape: Shape
    dtype: str
    """As safetensors calls it."""


Fetch = Callable[[str, Part], torch.Tensor]
"""Gives a part of a stored tensor, on any device."""


@dataclass(frozen=True, slots=True)
class _Read:
    """A part of a stored tensor, and the view that it fills."""

    part: Part
    view: torch.Tensor
    scale: torch.Tensor | None
    """What the scales of the part fill; None if they do not go to the model."""


class _Expected(NamedTuple):
    """What a stored tensor must be."""

    shape: Shape
    is_fp8: bool
    """Whether it must be float8; if not it may be."""


@dataclass(frozen=True, slots=True)
class Match:
    """Which stored tensors fill which views of a rank."""

    reads: Mapping[str, Sequence[_Read]]
    """By the name of the stored tensor; those of which the rank holds nothing are left out."""
    scales: Mapping[str, str]
    """Name of a float8 matrix -> name of its scales."""
    taken: frozenset[str]
    """The model's tensors that are there, by their own names if they are stored fused."""
    missing: frozenset[str]
    """Those that are not."""
    fp8_block: tuple[int, int] | None

    @torch.no_grad()
    def fill(self, name: str, fetch: Fetch) -> None:
        """Copy the rank's parts of one stored tensor into their views.

        Floating types are converted to the view's dtype. A float8 matrix is multiplied by its scales in float32 on the view's
        device, if the model does not want it as it is.
        """
        for read in self.reads.get(name, ()):
            part = fetch(name, read.part)
            if name in self.scales and self.fp8_block:
                scale = fetch(self.scales[name], _blocks_of(read.part, self.fp8_block))
                if read.scale is not None:
                    read.scale.copy_(scale)
                else:
                    part = _dequantise(part.to(read.view.device), scale, read.part, self.fp8_block)
            read.view.copy_(part.reshape(read.view.shape))

    def log_conversions(self, headers: Mapping[str, Header], where: str) -> None:
        """Say, in a line each, how many matrices are dequantised and how many tensors are converted."""
        dequantised = [name for name in self.reads if name in self.scales and self.reads[name][0].scale is None]
        converted = [
            f"{name} from {headers[name].dtype}"
            for name, reads in self.reads.items()
            if name not in self.scales and _FLOATS[headers[name].dtype] != reads[0].view.dtype
        ]
        if dequantised:
            log.info("%s: %d float8 matrices are dequantised", where, len(dequantised))
        if converted:
            log.warning(
                "%s: %d tensors are converted to the model's dtype, e.g. %s", where, len(converted), min(converted)
            )


def match(table: WeightTable, headers: Mapping[str, Header], where: str, *, is_partial: bool = False) -> Match:
    """Settle which spelling is used, and compare everything with what the table wants.

    Raises CheckpointError, naming the tensor, if one is missing, unknown, of a wrong shape or not of a floating type, or if it
    is float8 and should not be, or is not and should: on every rank, whichever holds it. With `is_partial` tensors of the model
    may be missing, but no float8 matrix without its scales. `where` begins the message, for example "FOLDER: the checkpoint".
    """
    scales = {name: name + _SCALE for name, header in headers.items() if header.dtype == _FP8}
    expected = {name: _Expected(target.shape, target.is_fp8) for name, target in table.targets.items()}
    fused_in: dict[str, str] = {}
    for fused_name, fused in table.fused.items():
        if fused_name in headers:
            replaced = [expected.pop(name) for name in fused.places]
            expected[fused_name] = _Expected(fused.shape, any(each.is_fp8 for each in replaced))
            fused_in |= dict.fromkeys(fused.places, fused_name)
    own_scales = [scales[name] for name in expected if name in scales]
    missing = [name for name in expected if name not in headers]
    lacking = [name for name in [*([] if is_partial else missing), *own_scales] if name not in headers]
    unknown = sorted(headers.keys() - expected.keys() - set(own_scales) - table.tolerated)
    if lacking or unknown:
        problems = [f"lacks {_few(lacking)}"] * bool(lacking) + [f"has unknown {_few(unknown)}"] * bool(unknown)
        raise CheckpointError(f"{where} {' and '.join(problems)}")
    _check_headers({name: expected[name] for name in expected if name in headers}, table.fp8_block, headers, where)
    reads: dict[str, list[_Read]] = {}
    for name, target in table.targets.items():
        stored = fused_in.get(name, name)
        if stored not in headers or target.view is None or not target.view.numel():
            continue
        part = target.part
        if name in fused_in:
            expert, row = table.fused[stored].places[name]
            part = (slice(expert, expert + 1), slice(row + part[0].start, row + part[0].stop), part[1])
        reads.setdefault(stored, []).append(_Read(part, target.view, target.scale))
    return Match(reads, scales, frozenset(table.targets.keys() - set(missing)), frozenset(missing), table.fp8_block)


def fill_randomly(table: WeightTable, device: torch.device) -> None:
    """Fill matrices with normal numbers of variance 1/columns; leave vectors (norms, biases) as the model made them.

    A tensor's numbers depend on its name, shape and dtype and on the type of `device`, where all views are. They are
    made for the whole tensor, one at a time, and then cut: all ranks of all workers have parts of one model. Float8
    numbers and their scales are made of float32 ones.
    """
    generator = torch.Generator(device)
    for name, target in table.targets.items():
        if target.view is not None and len(target.shape) >= 2:
            generator.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
            dtype = torch.float32 if target.is_fp8 else target.view.dtype
            tensor = torch.empty(target.shape, device=device, dtype=dtype)
            tensor.normal_(0.0, target.shape[-1] ** -0.5, generator=generator)
            if target.scale is not None and table.fp8_block:
                tensor, scale = _quantise(tensor, table.fp8_block)
                target.scale.copy_(scale[_blocks_of(target.part, table.fp8_block)])
            target.view.copy_(tensor[target.part])


def _check_headers(
    expected: Mapping[str, _Expected], fp8_block: tuple[int, int] | None, headers: Mapping[str, Header], where: str
) -> None:
    wrong: list[str] = []
    for name, implied in expected.items():
        shape, dtype = headers[name]
        if shape != implied.shape:
            wrong.append(f"{name} has shape {list(shape)} where the config implies {list(implied.shape)}")
        elif dtype == _FP8:
            wrong += _wrong_in_fp8(name, shape, fp8_block, headers)
        elif implied.is_fp8:
            wrong.append(
                f"{name} has type {dtype} where quantization_config implies {_FP8}; --fp8 dequantised takes both"
            )
        elif dtype not in _FLOATS:
            wrong.append(f"{name} has type {dtype}, which is not one of {', '.join(_FLOATS)}")
    if wrong:
        more = f"; and {len(wrong) - _NAMED_IN_ERRORS} more" if len(wrong) > _NAMED_IN_ERRORS else ""
        raise CheckpointError(f"{where}: tensor {'; '.join(wrong[:_NAMED_IN_ERRORS])}{more}")


def _wrong_in_fp8(name: str, shape: Shape, block: tuple[int, int] | None, headers: Mapping[str, Header]) -> list[str]:
    """What is wrong with a float8 tensor of the right shape and its scales; one entry at most."""
    if block is None:
        return [f"{name} has type {_FP8}, but config.json has no quantization_config"]
    if len(shape) != 2:
        # Where blocks begin in a stack of matrices that were joined is for its writer to say, and nobody does.
        return [f"{name} has type {_FP8} and shape {list(shape)}; only matrices may be float8"]
    scale = name + _SCALE
    found = headers[scale]
    implied = tuple(-(-size // step) for size, step in zip(shape, block, strict=True))
    if found.shape != implied:
        return [f"{scale} has shape {list(found.shape)} where weight_block_size implies {list(implied)}"]
    if found.dtype not in _FLOATS:
        return [f"{scale} has type {found.dtype}, which is not one of {', '.join(_FLOATS)}"]
    return []


def _blocks_of(part: Part, block: tuple[int, int]) -> Part:
    """The blocks that a part touches."""
    return tuple(slice(cut.start // size, -(-cut.stop // size)) for cut, size in zip(part, block, strict=True))


def _dequantise(weight: torch.Tensor, scale: torch.Tensor, part: Part, block: tuple[int, int]) -> torch.Tensor:
    """Multiply a part of a matrix by the scales of the blocks that it touches; returns float32 on the part's device.

    The part may begin and end inside a block.
    """
    scale_per_weight = scale.to(weight.device, torch.float32)
    for dim, (cut, step) in enumerate(zip(part, block, strict=True)):
        repeated = scale_per_weight.repeat_interleave(step, dim)
        scale_per_weight = repeated.narrow(dim, cut.start % step, cut.stop - cut.start)
    return weight.float().mul_(scale_per_weight)


def _quantise(matrix: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Float8 numbers and float32 scales for a matrix of whole blocks."""
    (rows, columns), (height, width) = matrix.shape, block
    blocks = matrix.view(rows // height, height, columns // width, width)
    scale = blocks.abs().amax(dim=(1, 3), keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    return (blocks / scale).to(torch.float8_e4m3fn).reshape(matrix.shape), scale[:, 0, :, 0]


def _few(names: list[str]) -> str:
    noun = "tensor" if len(names) == 1 else f"{len(names)} tensors:"
    more = ", ..." if len(names) > _NAMED_IN_ERRORS else ""
    return f"{noun} {', '.join(names[:_NAMED_IN_ERRORS])}{more}"
