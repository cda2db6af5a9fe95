"""Small checkpoints of every shape that the tests serve."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from deploy.demo_model import write_demo_model

_SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "mlp_only_layers": [],
    "moe_intermediate_size": 24,
    "max_position_embeddings": 1024,
}

SHAPES: dict[str, dict[str, Any]] = {
    # Experts in every layer, groups of two query heads.
    "plain": _SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2, "norm_topk_prob": True, "seed": 1},
    # Experts in layers 1 and 5: the even ones are dense by step, layer 3 by name. Tied embeddings, biases, yarn.
    "mixed": _SMALL
    | {
        "num_hidden_layers": 6,
        "mlp_only_layers": [3],
        "decoder_sparse_step": 2,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "norm_topk_prob": False,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 256,
        },
        "seed": 2,
    },
    # More experts than a byte can name.
    "wide": _SMALL
    | {"hidden_size": 64, "num_experts": 300, "num_experts_per_tok": 8, "moe_intermediate_size": 8, "seed": 3},
}

ON_GPU: dict[str, Any] = _SMALL | {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "moe_intermediate_size": 64,
    "initializer_range": 0.1,
    "seed": 4,
}
"""A shape that the fused kernels take."""
WHOLE_BLOCKS: dict[str, Any] = ON_GPU | {"moe_intermediate_size": 256, "num_hidden_layers": 2, "seed": 5}
"""Another, whose experts are of whole float8 blocks of 128 x 128, also those of two ranks."""


def make_checkpoint(folder: Path, shape: str) -> Path:
    """Write the checkpoint of that shape into `folder` and return it."""
    write_demo_model(folder, **SHAPES[shape])
    return folder


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a checkpoint of one file."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **fields: Any) -> None:
    """Change fields of config.json; `...` removes one."""
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def write_fp8(
    source: Path, quantised: Path, dequantised: Path, block: tuple[int, int], scale_dtype: torch.dtype = torch.float32
) -> None:
    """Write a float32 checkpoint twice: with float8 matrices and a scale for each block, and what those numbers mean.

    The matrices are those that the Qwen team's own FP8 checkpoints have so: all but the routers, embeddings and head.
    """
    for folder in (quantised, dequantised):
        shutil.copytree(source, folder)
    stored: dict[str, torch.Tensor] = {}
    meant: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            stored[name], stored[name + "_scale_inv"], meant[name] = _quantise(tensor, block, scale_dtype)
        else:
            stored[name] = meant[name] = tensor
    save_file(stored, quantised / "model.safetensors")
    save_file(meant, dequantised / "model.safetensors")
    kept = [name.removesuffix(".weight") for name in stored if name.endswith(".weight") and stored[name] is meant[name]]
    edit_config(
        quantised,
        quantization_config={
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "modules_to_not_convert": kept,
            "quant_method": "fp8",
            "weight_block_size": list(block),
        },
    )


def _quantise(
    matrix: torch.Tensor, block: tuple[int, int], scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the float8 matrix, its scales and the float32 matrix that the two mean."""
    rows, columns = matrix.shape
    stored = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    meant = torch.empty(rows, columns)
    scales: list[list[torch.Tensor]] = []
    for top in range(0, rows, block[0]):
        scales.append([])
        for left in range(0, columns, block[1]):
            place = (slice(top, top + block[0]), slice(left, left + block[1]))
            scale = (matrix[place].abs().max() / 448).to(scale_dtype)
            stored[place] = (matrix[place] / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
            meant[place] = stored[place].float() * scale.float()
            scales[-1].append(scale)
    return stored, torch.stack([torch.stack(line) for line in scales]), meant
