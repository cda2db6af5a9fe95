"""Checkpoints with float8 matrices and a scale for each block: the weights are what the numbers mean, to the last bit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.config import ModelOptions
from common.errors import CheckpointError
from common.kernels.torch_kernels import TorchKernels
from common.models.config import load_model_config
from common.models.qwen3_moe import Qwen3Moe
from common.models.registry import build_model
from tests.support.checkpoints import SHAPES, edit_config, edit_tensors, write_fp8
from tests.support.in_process_pair import InProcessPair, options_of
from tests.support.judge import Judge, Tally
from tests.support.prompts import random_prompts
from tests.support.single_engine import SingleEngine

BLOCKS = {"plain": (16, 16), "mixed": (8, 16), "wide": (32, 20)}
"""Small, so that small matrices have several; 24 is no multiple of 16, nor 64 of 20."""
EXPERT = "model.layers.0.mlp.experts.3.gate_proj.weight"
SCALE = EXPERT + "_scale_inv"

Twins = Callable[..., tuple[Path, Path]]


@pytest.fixture
def twins_of(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> Twins:
    """Write a shape's checkpoint in float8, and another of what its numbers mean."""

    def make(shape: str, scale_dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
        twins = (tmp_path / "quantised", tmp_path / "dequantised")
        write_fp8(checkpoint_of(shape), *twins, BLOCKS[shape], scale_dtype)
        return twins

    return make


@pytest.fixture
def folder(twins_of: Twins) -> Path:
    """A float8 checkpoint, to be spoiled."""
    return twins_of("plain")[0]


def load(folder: Path, **options: Any) -> Qwen3Moe:
    config, options_of_model = load_model_config(folder), ModelOptions(model=str(folder), **options)
    model = build_model(config, options_of_model, torch.device("cpu"), TorchKernels())
    assert isinstance(model, Qwen3Moe)
    return model


def differing(ours: Qwen3Moe, theirs: Qwen3Moe) -> list[str]:
    """Names of the parameters that are not equal bit for bit."""
    pairs = zip(ours.named_parameters(), theirs.named_parameters(), strict=True)
    return [name for (name, our), (_, their) in pairs if our.dtype != their.dtype or not torch.equal(our, their)]


# ------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_weights_are_what_the_numbers_mean(twins_of: Twins, shape: str, scale_dtype: torch.dtype):
    quantised, dequantised = twins_of(shape, scale_dtype)
    assert differing(load(quantised), load(dequantised)) == []


def test_product_is_rounded_once_to_the_models_dtype(twins_of: Twins):
    quantised, dequantised = twins_of("plain", torch.bfloat16)
    assert differing(load(quantised, dtype="bfloat16"), load(dequantised, dtype="bfloat16")) == []
    edit_config(quantised, dtype="bfloat16")
    assert {parameter.dtype for parameter in load(quantised).parameters()} == {torch.bfloat16}


def test_blocks_larger_than_the_matrices(checkpoint_of: Callable[[str], Path], tmp_path: Path):
    write_fp8(checkpoint_of("plain"), tmp_path / "quantised", tmp_path / "dequantised", (128, 128))
    assert differing(load(tmp_path / "quantised"), load(tmp_path / "dequantised")) == []


def test_scales_of_one_expert_off_by_one_block_are_seen(twins_of: Twins):
    quantised, dequantised = twins_of("plain")
    edit_tensors(quantised, lambda tensors: tensors.update({SCALE: tensors[SCALE].roll(1, 1)}))
    assert differing(load(quantised), load(dequantised)) == ["layers.0.mlp.gate_up_E2ID"]


@pytest.mark.parametrize("apart", ["scales in a file of their own", "by turns"])
def test_scales_in_another_file_than_their_weights(twins_of: Twins, apart: str):
    quantised, dequantised = twins_of("plain")
    tensors = load_file(quantised / "model.safetensors")
    (quantised / "model.safetensors").unlink()
    by_turns = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(sorted(tensors))}
    by_kind = {name: f"model-{name.endswith('_scale_inv'):d}.safetensors" for name in tensors}
    weight_map = by_turns if apart == "by turns" else by_kind
    assert weight_map[SCALE] != weight_map[EXPERT]
    for file in set(weight_map.values()):
        save_file({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, quantised / file)
    (quantised / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert differing(load(quantised), load(dequantised)) == []


# ------------------------------------------------------------------------------------------------ refusals


def test_missing_scale_is_named(folder: Path):
    edit_tensors(folder, lambda tensors: tensors.pop(SCALE))
    with pytest.raises(CheckpointError, match=rf"lacks tensor {SCALE}$"):
        load(folder)


def test_scale_without_its_weight_is_named(folder: Path):
    edit_tensors(folder, lambda tensors: tensors.pop(EXPERT))
    with pytest.raises(CheckpointError, match=rf"lacks tensor {EXPERT} and has unknown tensor {SCALE}$"):
        load(folder)


def test_scale_beside_a_weight_that_needs_none_is_named(folder: Path):
    edit_tensors(folder, lambda tensors: tensors.update({EXPERT: tensors[EXPERT].float()}))
    with pytest.raises(CheckpointError, match=rf"has unknown tensor {SCALE}$"):
        load(folder)


@pytest.mark.parametrize("shape", [(3, 2), (1, 3), (6,), ()])
def test_scale_of_a_wrong_shape_is_named_with_both(folder: Path, shape: tuple[int, ...]):
    edit_tensors(folder, lambda tensors: tensors.update({SCALE: torch.ones(shape)}))
    found = ", ".join(map(str, shape))
    with pytest.raises(CheckpointError, match=rf"tensor {SCALE} has shape \[{found}\] where .* implies \[2, 3\]$"):
        load(folder)


def test_another_block_size_than_the_scales_have_is_refused(folder: Path):
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 8]})
    with pytest.raises(CheckpointError, match=r"_scale_inv has shape \[\d, \d\] where .* implies \[\d, \d\].* more$"):
        load(folder)


def test_scale_of_a_type_that_is_no_float_is_named(folder: Path):
    edit_tensors(folder, lambda tensors: tensors.update({SCALE: torch.ones(2, 3, dtype=torch.uint8)}))
    with pytest.raises(CheckpointError, match=rf"tensor {SCALE} has type U8"):
        load(folder)


def test_weight_of_a_wrong_shape_is_named(folder: Path):
    edit_tensors(folder, lambda tensors: tensors.update({EXPERT: tensors[EXPERT][:23]}))
    with pytest.raises(CheckpointError, match=rf"tensor {EXPERT} has shape \[23, 48\] .* \[24, 48\]$"):
        load(folder)


def test_float8_without_quantization_config_is_refused(folder: Path):
    edit_config(folder, quantization_config=None)
    with pytest.raises(CheckpointError, match=r"_proj\.weight has type F8_E4M3, but .* no quantization_config"):
        load(folder)


def test_other_float8_type_is_refused(folder: Path):
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EXPERT] = tensors[EXPERT].float().to(torch.float8_e5m2)
        del tensors[SCALE]

    edit_tensors(folder, edit)
    with pytest.raises(CheckpointError, match=rf"tensor {EXPERT} has type F8_E5M2"):
        load(folder)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.experts.down_proj"])
def test_float8_that_is_no_matrix_is_refused(folder: Path, name: str):
    """In a stack of experts nothing says whether a block may cross from one to the next."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        if name not in tensors:
            parts = [f"model.layers.0.mlp.experts.{expert}.down_proj.weight" for expert in range(16)]
            tensors[name] = torch.stack([tensors.pop(part).float() for part in parts])
            tensors[name + "_scale_inv"] = torch.stack([tensors.pop(part + "_scale_inv") for part in parts])
        tensors.setdefault(name + "_scale_inv", torch.ones(3))
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    edit_tensors(folder, edit)
    with pytest.raises(CheckpointError, match=rf"tensor {name} has type F8_E4M3 and shape .*only matrices"):
        load(folder)


# ------------------------------------------------------------------------------------------------ the whole engine


def judged_pair(checkpoint: Path, judge: Judge) -> Tally:
    """Serve random prompts from `checkpoint` with a pair, and compare rows and greedy tokens with the judge's model."""
    pair = InProcessPair(checkpoint, chunk_tokens=64)
    tally = Tally()
    for answer in pair.run([(prompt, options_of(8)) for prompt in random_prompts(5, 24)]):
        assert answer.rows is not None
        judge.add(tally, answer.prompt, answer.output_ids, answer.rows)
    pair.check_pages()
    return tally


@pytest.mark.parametrize("shape", list(SHAPES))
def test_pair_against_transformers_over_the_dequantised_weights(twins_of: Twins, shape: str):
    quantised, dequantised = twins_of(shape)
    judged_pair(quantised, Judge(dequantised)).assert_clean()


def test_single_engine_against_transformers_over_the_dequantised_weights(twins_of: Twins):
    quantised, dequantised = twins_of("plain", torch.bfloat16)
    judge, tally, engine = Judge(dequantised), Tally(), SingleEngine(quantised)
    for prompt in random_prompts(6, 8):
        answer = engine.run(prompt, options_of(12))
        judge.add(tally, prompt, answer.output_ids, answer.rows)
    tally.assert_clean()


@pytest.mark.parametrize("spoiled", ["not quantised", "scales off by one block"])
def test_judge_sees_other_weights(twins_of: Twins, checkpoint_of: Callable[[str], Path], tmp_path: Path, spoiled: str):
    quantised, dequantised = twins_of("plain")
    other = checkpoint_of("plain")
    if spoiled != "not quantised":
        other = shutil.copytree(quantised, tmp_path / "other")
        edit_tensors(
            other,
            lambda tensors: tensors.update(
                {name: scale.roll(1, 1) for name, scale in tensors.items() if name.endswith("_scale_inv")}
            ),
        )
    assert judged_pair(other, Judge(dequantised)).wrong > 12
