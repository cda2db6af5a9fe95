"""Fills a model's parameters from safetensors files, or with random numbers; knows no model.

A model describes itself as a `WeightTable`. Of a tensor of which a rank holds a part, only that is read; of a tensor that
others hold, only the header. A matrix `NAME` of float8 numbers has its scales, one for each block, in the tensor
`NAME_scale_inv`; the model gets both if its table wants float8 numbers there, and their product if not. Everything is
checked against the files' headers before the first byte is read. Neighbours: `common.models.weight_table` (what is to be
filled), `common.models.config` (reads the rest of the folder).
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from common.errors import CheckpointError
from common.models.weight_table import Part, Shape, WeightTable

log = logging.getLogger(__name__)

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_FP8, _SCALE = "F8_E4M3", "_scale_inv"
_NAMED_IN_ERRORS = 5


def load_weights(table: WeightTable, folder: Path) -> None:
    """Copy a checkpoint folder's tensors, or the parts of them that this rank holds, into the targets' views.

    Floating types are converted to the view's dtype, with one log line that says so. Float8 matrices are multiplied by
    their scales in float32 on the view's device, one at a time, but for those that the table wants as they are. Raises
    CheckpointError, naming the tensor, if one is missing, unknown, there twice, of a wrong shape or not of a floating type,
    or if it is float8 and should not be, or is not and should: on every rank, whichever holds it.
    """
    with ExitStack() as stack:
        files = _open_files(folder, stack)
        scales = {name: name + _SCALE for name, file in files.items() if file.get_slice(name).get_dtype() == _FP8}
        expected, reads = _choose(table, files.keys(), scales, folder)
        _check_headers(expected, table.fp8_block, files, folder)
        _log_conversions(reads, scales.keys(), files, folder)
        for read in reads:
            part = files[read.name].get_slice(read.name)[read.part]
            if read.name in scales and table.fp8_block:
                stored_scale = files[scales[read.name]].get_slice(scales[read.name])
                scale = stored_scale[_blocks_of(read.part, table.fp8_block)]
                if read.scale is not None:
                    read.scale.copy_(scale)
                else:
                    part = _dequantise(part.to(read.view.device), scale, read.part, table.fp8_block)
            read.view.copy_(part.view_as(read.view))


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


@dataclass(frozen=True, slots=True)
class _Read:
    """A part of a stored tensor, and the view that it fills."""

    name: str
    part: Part
    view: torch.Tensor
    scale: torch.Tensor | None
    """What the scales of the part fill; None if they do not go to the model."""


@dataclass(frozen=True, slots=True)
class _Expected:
    """What a stored tensor must be."""

    shape: Shape
    is_fp8: bool
    """Whether it must be float8; if not it may be."""


def _open_files(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Open every file of the checkpoint; returns tensor name -> the open file that holds it."""
    files: dict[str, Any] = {}
    for path in _paths(folder):
        try:
            opened = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        for name in opened.keys():  # noqa: SIM118  (safe_open is not a mapping)
            if name in files:
                raise CheckpointError(f"{folder}: tensor {name} is in two files")
            files[name] = opened
    return files


def _paths(folder: Path) -> list[Path]:
    if (folder / _SINGLE).exists():
        return [folder / _SINGLE]
    index = folder / _INDEX
    if not index.exists():
        raise CheckpointError(f"{folder}: neither {_SINGLE} nor {_INDEX} is there")
    try:
        weight_map = msgspec.convert(msgspec.json.decode(index.read_bytes())["weight_map"], dict[str, str])
    except (OSError, msgspec.DecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: {error!r}") from error
    return [folder / name for name in sorted(set(weight_map.values()))]


def _choose(
    table: WeightTable, names: Iterable[str], scales: Mapping[str, str], folder: Path
) -> tuple[dict[str, _Expected], list[_Read]]:
    """Settle which spelling the checkpoint uses, and refuse names that are missing or too many.

    `scales` has the name of the scales of every float8 tensor; they must be there, and no others. Returns what each tensor
    must be, and what to read.
    """
    present = set(names)
    expected = {name: _Expected(target.shape, target.is_fp8) for name, target in table.targets.items()}
    fused_in: dict[str, str] = {}
    for fused_name, fused in table.fused.items():
        if fused_name in present:
            replaced = [expected.pop(name) for name in fused.places]
            expected[fused_name] = _Expected(fused.shape, any(each.is_fp8 for each in replaced))
            fused_in |= dict.fromkeys(fused.places, fused_name)
    needed = [*expected, *(scales[name] for name in expected if name in scales)]
    missing = [name for name in needed if name not in present]
    unknown = sorted(present.difference(needed, table.tolerated))
    if missing or unknown:
        problems = [f"lacks {_few(missing)}"] * bool(missing) + [f"has unknown {_few(unknown)}"] * bool(unknown)
        raise CheckpointError(f"{folder}: the checkpoint {' and '.join(problems)}")
    reads: list[_Read] = []
    for name, target in table.targets.items():
        if target.view is None or not target.view.numel():
            continue
        stored, part = name, target.part
        if name in fused_in:
            stored = fused_in[name]
            expert, row = table.fused[stored].places[name]
            part = (slice(expert, expert + 1), slice(row + part[0].start, row + part[0].stop), part[1])
        reads.append(_Read(stored, part, target.view, target.scale))
    return expected, reads


def _check_headers(
    expected: Mapping[str, _Expected], fp8_block: tuple[int, int] | None, files: Mapping[str, Any], folder: Path
) -> None:
    wrong: list[str] = []
    for name, implied in expected.items():
        header = files[name].get_slice(name)
        shape, dtype = tuple(header.get_shape()), header.get_dtype()
        if shape != implied.shape:
            wrong.append(f"{name} has shape {list(shape)} where the config implies {list(implied.shape)}")
        elif dtype == _FP8:
            wrong += _wrong_in_fp8(name, shape, fp8_block, files)
        elif implied.is_fp8:
            wrong.append(
                f"{name} has type {dtype} where quantization_config implies {_FP8}; --fp8 dequantised takes both"
            )
        elif dtype not in _FLOATS:
            wrong.append(f"{name} has type {dtype}, which is not one of {', '.join(_FLOATS)}")
    if wrong:
        more = f"; and {len(wrong) - _NAMED_IN_ERRORS} more" if len(wrong) > _NAMED_IN_ERRORS else ""
        raise CheckpointError(f"{folder}: tensor {'; '.join(wrong[:_NAMED_IN_ERRORS])}{more}")


def _log_conversions(reads: Iterable[_Read], fp8_names: Iterable[str], files: Mapping[str, Any], folder: Path) -> None:
    dtypes = {read.name: read.view.dtype for read in reads if read.scale is None}
    dequantised = dtypes.keys() & fp8_names
    converted: list[str] = []
    for name in dtypes.keys() - dequantised:
        stored = files[name].get_slice(name).get_dtype()
        if _FLOATS[stored] != dtypes[name]:
            converted.append(f"{name} from {stored}")
    if dequantised:
        log.info("%s: %d float8 matrices are dequantised", folder, len(dequantised))
    if converted:
        log.warning(
            "%s: %d tensors are converted to the model's dtype, e.g. %s", folder, len(converted), min(converted)
        )


def _wrong_in_fp8(
    name: str, shape: tuple[int, ...], block: tuple[int, int] | None, files: Mapping[str, Any]
) -> list[str]:
    """What is wrong with a float8 tensor of the right shape and its scales; one entry at most."""
    if block is None:
        return [f"{name} has type {_FP8}, but config.json has no quantization_config"]
    if len(shape) != 2:
        # Where blocks begin in a stack of matrices that were joined is for its writer to say, and nobody does.
        return [f"{name} has type {_FP8} and shape {list(shape)}; only matrices may be float8"]
    scale = name + _SCALE
    header = files[scale].get_slice(scale)
    implied = [-(-size // step) for size, step in zip(shape, block, strict=True)]
    if list(header.get_shape()) != implied:
        return [f"{scale} has shape {header.get_shape()} where weight_block_size implies {implied}"]
    if header.get_dtype() not in _FLOATS:
        return [f"{scale} has type {header.get_dtype()}, which is not one of {', '.join(_FLOATS)}"]
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
