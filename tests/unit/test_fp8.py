"""Checkpoints with float8 matrices and a scale for each block: the weights are what the numbers mean, to the last bit.

What is loaded natively, which only GPUs' kernels ask for, is multiplied out by torch's here, expert by expert.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.config import ModelOptions
from common.errors import CheckpointError
from common.kernels.collectives import Collectives
from common.kernels.interface import ExpertMatrices
from common.kernels.torch_kernels import TorchKernels
from common.models.config import load_model_config
from common.models.qwen3_moe import Qwen3Moe
from common.models.registry import build_model
from common.models.weight_files import load_weights
from common.models.weight_table import Target, WeightTable, columns_of, rows_of
from common.ranks import Rank, Ranks, Span
from deploy.demo_model import write_demo_model
from tests.support.checkpoints import SHAPES, WHOLE_BLOCKS, edit_config, edit_tensors, write_fp8
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


def load(folder: Path, *, native: bool = False, rank: Rank = Rank(), **options: Any) -> Qwen3Moe:
    config, options_of_model = load_model_config(folder), ModelOptions(model=str(folder), **options)
    kernels, alone = TorchKernels(native_fp8=native), Collectives(rank, None, None, None)
    model = build_model(config, options_of_model, torch.device("cpu"), kernels, alone)
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


@pytest.mark.parametrize("seed", range(20))
def test_part_is_cut_from_what_the_whole_matrix_means(tmp_path: Path, seed: int):
    """Wherever the cuts are: between blocks or inside one, also the last, which the matrix may cut off."""
    rng = random.Random(seed)
    rows, columns, block = rng.randint(1, 40), rng.randint(1, 40), (rng.randint(1, 16), rng.randint(1, 16))
    weight = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-rows // block[0]), -(-columns // block[1]))
    save_file({"matrix": weight, "matrix_scale_inv": scale}, tmp_path / "model.safetensors")
    scale_per_weight = scale[torch.arange(rows)[:, None] // block[0], torch.arange(columns) // block[1]]
    meant = weight.float() * scale_per_weight
    for _ in range(10):
        above, below = sorted(rng.randint(0, rows) for _ in range(2))
        left, right = sorted(rng.randint(0, columns) for _ in range(2))
        by_rows = rows_of(["matrix"], torch.empty(below - above, columns), [rows], [Span(above, below)])["matrix"]
        by_columns = columns_of(torch.empty(rows, right - left), columns, Span(left, right))
        box = Target((rows, columns), torch.empty(below - above, right - left), (above, left))
        for target in (by_rows, by_columns, box):
            load_weights(WeightTable({"matrix": target}, fp8_block=block), tmp_path)
        for target, part in (
            (by_rows, meant[above:below]),
            (by_columns, meant[:, left:right]),
            (box, meant[above:below, left:right]),
        ):
            assert target.view is not None
            assert torch.equal(target.view, part)


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


@pytest.mark.parametrize("held", ["nothing", "a part"])
def test_rank_refuses_scales_also_where_it_reads_none(tmp_path: Path, held: str):
    target = Target((8, 8)) if held == "nothing" else Target((8, 8), torch.empty(2, 8))
    weight = torch.ones(8, 8).to(torch.float8_e4m3fn)

    def refused(fp8_block: tuple[int, int] | None, message: str, **scale: torch.Tensor) -> None:
        save_file({"matrix": weight, **scale}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            load_weights(WeightTable({"matrix": target}, fp8_block=fp8_block), tmp_path)

    refused((4, 4), "lacks tensor matrix_scale_inv")
    refused((4, 4), r"matrix_scale_inv has shape \[2, 3\]", matrix_scale_inv=torch.ones(2, 3))
    refused((4, 4), "matrix_scale_inv has type I8", matrix_scale_inv=torch.ones(2, 2, dtype=torch.int8))
    refused(None, "no quantization_config", matrix_scale_inv=torch.ones(2, 2))


# ------------------------------------------------------------------------------------------------ experts that stay float8

PARTS = [Rank(), *(Rank(index, Ranks(tp=2)) for index in (0, 1)), Rank(2, Ranks(tp=4, ep=True))]


@pytest.fixture(scope="module")
def _source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blocks") / "float32"
    write_demo_model(folder, **WHOLE_BLOCKS)
    return folder


@pytest.fixture
def blocks(_source: Path, tmp_path: Path) -> Path:
    """A float8 checkpoint of whole blocks, all with scales of their own, to be spoiled; its meaning is beside it."""
    write_fp8(_source, tmp_path / "blocks", tmp_path / "meaning", (128, 128))
    return tmp_path / "blocks"


def multiplied_out(model: Qwen3Moe) -> dict[str, torch.Tensor]:
    """All parameters, with what float8 ones mean in place of them and their scales."""
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    for name in [name for name in parameters if name.endswith("_scale")]:
        stem, scale = name.removesuffix("_scale"), parameters.pop(name)
        name = next(name for name in parameters if name.startswith(stem))
        matrices = ExpertMatrices(parameters[name], scale)
        parameters[name] = torch.stack([matrices.of(expert, model.norm_D.dtype) for expert in range(len(scale))])
    return parameters


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("rank", PARTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_native_weights_times_scales_are_the_dequantised_ones(blocks: Path, rank: Rank, dtype: str):
    """Every rank's part, bit for bit."""
    native, dequantised = (load(blocks, native=native, rank=rank, dtype=dtype) for native in (True, False))
    is_expert = [name.split(".")[-1] in ("gate_up_E2ID", "down_EDI") for name, _ in native.named_parameters()]
    is_float8 = [parameter.dtype == torch.float8_e4m3fn for parameter in native.parameters()]
    assert is_expert == is_float8
    assert sum(is_float8) == 4
    assert_equal(multiplied_out(native), multiplied_out(dequantised))


def test_block_of_one_expert_with_another_scale_is_seen(blocks: Path):
    dequantised = multiplied_out(load(blocks))
    edit_tensors(blocks, lambda tensors: tensors.update({SCALE: tensors[SCALE].roll(1, 1)}))
    ours = multiplied_out(load(blocks, native=True))
    assert [name for name in ours if not torch.equal(ours[name], dequantised[name])] == ["layers.0.mlp.gate_up_E2ID"]


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
def test_scales_of_16_bits_are_converted(blocks: Path, scale_dtype: torch.dtype):
    def convert(tensors: dict[str, torch.Tensor]) -> None:
        scales = {name: scale.to(scale_dtype) for name, scale in tensors.items() if name.endswith("_scale_inv")}
        tensors.update(scales)

    edit_tensors(blocks, convert)
    assert_equal(multiplied_out(load(blocks, native=True)), multiplied_out(load(blocks)))


@pytest.mark.parametrize("rank", [Rank(), Rank(3, Ranks(tp=4, ep=True))])
@pytest.mark.parametrize("name", ["3.gate_proj.weight", "3.up_proj.weight", "3.down_proj.weight", "down_proj"])
def test_experts_that_are_not_float8_are_refused_by_every_rank(blocks: Path, rank: Rank, name: str):
    """Expert 3 is on rank 0, and the tensor of all experts on all of them."""
    name = "model.layers.0.mlp.experts." + name

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        if name in tensors:
            tensors[name] = tensors[name].float()
            del tensors[name + "_scale_inv"]
        else:
            parts = [f"model.layers.0.mlp.experts.{expert}.down_proj.weight" for expert in range(16)]
            tensors[name] = torch.stack([tensors.pop(part).float() for part in parts])
            for part in parts:
                del tensors[part + "_scale_inv"]

    edit_tensors(blocks, edit)
    load(blocks, rank=rank)
    with pytest.raises(CheckpointError, match=rf"tensor {name} has type F32 where .* implies F8_E4M3.* --fp8 dequ"):
        load(blocks, native=True, rank=rank)


@pytest.mark.parametrize("ep", [False, True])
def test_dummy_weights_of_all_ranks_are_one_float8_model(blocks: Path, ep: bool):
    options: dict[str, Any] = {"native": True, "load_format": "dummy", "dtype": "bfloat16"}
    whole = dict(load(blocks, **options).named_parameters())
    ranks = [dict(load(blocks, rank=Rank(i, Ranks(tp=2, dp=2, ep=ep)), **options).named_parameters()) for i in (0, 1)]
    for name in ("gate_up_E2ID", "gate_up_scale", "down_EDI", "down_scale"):
        name = f"layers.1.mlp.{name}"
        parts = [rank[name].float() for rank in ranks]
        if ep:
            joined = torch.cat(parts)
        elif "down" in name:
            joined = torch.cat(parts, dim=2)
        else:
            halves = [part.chunk(2, dim=1) for part in parts]
            joined = torch.cat([half[i] for i in (0, 1) for half in halves], dim=1)
        assert torch.equal(joined, whole[name].float())
    for name in ("gate_up_E2ID", "down_EDI"):
        meant = multiplied_out(load(blocks, **options))[f"layers.1.mlp.{name}"].float()
        assert meant.var(dim=(1, 2)).mul(meant.shape[2]).sub(1).abs().max() < 0.05


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
