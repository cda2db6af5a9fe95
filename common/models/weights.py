"""Fills a model's parameters from safetensors files, or with random numbers; knows no model.

A model describes itself as a `WeightTable`: for each tensor of a checkpoint, the view of a parameter that it fills. So
a product that the model fuses is three names with three slices of one parameter. A matrix `NAME` of float8 numbers has
its scales, one for each block, in the tensor `NAME_scale_inv`; the product of both is what the model gets. Everything
is checked against the files' headers before the first byte is read. Neighbour: `common.models.config` reads the rest of
the folder.
"""

import logging
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from common.errors import CheckpointError

log = logging.getLogger(__name__)

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_FP8, _SCALE = "F8_E4M3", "_scale_inv"
_NAMED_IN_ERRORS = 5
_DUMMY_SEED = 20_25


@dataclass(frozen=True, slots=True)
class Fused:
    """One tensor that may stand in a checkpoint in place of several others."""

    target: torch.Tensor
    replaces: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WeightTable:
    """Where each tensor of a checkpoint goes. Targets are views of parameters, on their device and in their dtype."""

    targets: Mapping[str, torch.Tensor]
    """Checkpoint name -> the view that it fills, of the same shape. All are required."""
    fused: Mapping[str, Fused] = field(default_factory=dict)
    """Names that replace groups of `targets` if the checkpoint has them."""
    tolerated: frozenset[str] = frozenset()
    """Names that may be there and are not read."""
    fp8_block: tuple[int, int] | None = None
    """Rows and columns of a block with one scale; None if the checkpoint may hold no float8 numbers."""


def load_weights(table: WeightTable, folder: Path) -> None:
    """Copy a checkpoint folder's tensors into the targets.

    Floating types are converted to the target's dtype, with one log line that says so. Float8 matrices are multiplied by
    their scales in float32 on the target's device, one at a time. Raises CheckpointError, naming the tensor, if one is
    missing, unknown, there twice, of a wrong shape or not of a floating type, or if it is float8 and should not be.
    """
    with ExitStack() as stack:
        files = _open_files(folder, stack)
        scales = {name: name + _SCALE for name, file in files.items() if file.get_slice(name).get_dtype() == _FP8}
        targets = _choose(table, files.keys(), scales, folder)
        _check_headers(targets, table.fp8_block, files, folder)
        if scales:
            log.info("%s: %d float8 matrices are dequantised", folder, len(scales))
        for name, target in targets.items():
            tensor = files[name].get_tensor(name)
            if name in scales and table.fp8_block:
                scale = files[scales[name]].get_tensor(scales[name])
                tensor = _dequantise(tensor.to(target.device), scale.to(target.device), table.fp8_block)
            target.copy_(tensor)


def fill_randomly(parameters: Iterable[torch.Tensor]) -> None:
    """Fill matrices with normal numbers of variance 1/columns; leave vectors (norms, biases) as the model made them.

    Two processes get equal weights if their devices are of one type and their parameters come in the same order. The
    numbers are made on the device, in place, so that no second copy of the model exists.
    """
    for index, parameter in enumerate(parameters):
        if parameter.dim() >= 2:
            generator = torch.Generator(parameter.device).manual_seed(_DUMMY_SEED + index)
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)


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
) -> dict[str, torch.Tensor]:
    """Settle which spelling the checkpoint uses, and refuse names that are missing or too many.

    `scales` has the name of the scales of every float8 tensor; they must be there, and no others.
    """
    targets, present = dict(table.targets), set(names)
    for fused_name, fused in table.fused.items():
        if fused_name in present:
            targets[fused_name] = fused.target
            for name in fused.replaces:
                del targets[name]
    needed = [*targets, *(scales[name] for name in targets if name in scales)]
    missing = [name for name in needed if name not in present]
    unknown = sorted(present.difference(needed, table.tolerated))
    if missing or unknown:
        problems = [f"lacks {_few(missing)}"] * bool(missing) + [f"has unknown {_few(unknown)}"] * bool(unknown)
        raise CheckpointError(f"{folder}: the checkpoint {' and '.join(problems)}")
    return targets


def _check_headers(
    targets: Mapping[str, torch.Tensor], fp8_block: tuple[int, int] | None, files: Mapping[str, Any], folder: Path
) -> None:
    converted: list[str] = []
    wrong: list[str] = []
    for name, target in targets.items():
        header = files[name].get_slice(name)
        shape, dtype = tuple(header.get_shape()), header.get_dtype()
        if shape != tuple(target.shape):
            wrong.append(f"{name} has shape {list(shape)} where the config implies {list(target.shape)}")
        elif dtype == _FP8:
            wrong += _wrong_in_fp8(name, shape, fp8_block, files)
        elif dtype not in _FLOATS:
            wrong.append(f"{name} has type {dtype}, which is not one of {', '.join(_FLOATS)}")
        elif _FLOATS[dtype] != target.dtype:
            converted.append(f"{name} from {dtype}")
    if wrong:
        more = f"; and {len(wrong) - _NAMED_IN_ERRORS} more" if len(wrong) > _NAMED_IN_ERRORS else ""
        raise CheckpointError(f"{folder}: tensor {'; '.join(wrong[:_NAMED_IN_ERRORS])}{more}")
    if converted:
        log.warning("%s: %d tensors are converted to the model's dtype, first %s", folder, len(converted), converted[0])


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


def _dequantise(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Multiply each block of a matrix by its scale; the last blocks may be cut off. Returns float32."""
    rows, columns = weight.shape
    scale_per_weight = scale.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return weight.float().mul_(scale_per_weight)


def _few(names: list[str]) -> str:
    noun = "tensor" if len(names) == 1 else f"{len(names)} tensors:"
    more = ", ..." if len(names) > _NAMED_IN_ERRORS else ""
    return f"{noun} {', '.join(names[:_NAMED_IN_ERRORS])}{more}"
