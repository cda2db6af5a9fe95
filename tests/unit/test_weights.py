"""Reading checkpoints: both spellings of config and experts, shards, and everything that must be refused by name."""

import json
import logging
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from common.config import ModelOptions
from common.errors import CheckpointError, UsageError
from common.kernels.torch_kernels import TorchKernels
from common.models.config import Fp8Config, load_model_config, resolve_checkpoint
from common.models.qwen3_moe import Qwen3Moe
from common.models.registry import build_model
from common.models.weight_files import load_weights
from common.models.weight_table import Fused, Target, WeightTable, columns_of, rows_of, whole
from common.models.weights import fill_randomly
from common.ranks import Span
from tests.support.checkpoints import SHAPES, edit_config, edit_tensors, make_checkpoint

CPU = torch.device("cpu")
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
EXPERT = "model.layers.0.mlp.experts.3.gate_proj.weight"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    return {shape: make_checkpoint(tmp_path_factory.mktemp(shape), shape) for shape in SHAPES}


@pytest.fixture
def folder(checkpoints, tmp_path) -> Path:
    """A copy of the plain checkpoint, to be spoiled."""
    return shutil.copytree(checkpoints["plain"], tmp_path / "checkpoint")


def load(folder: Path, **options: Any) -> Qwen3Moe:
    model = build_model(load_model_config(folder), ModelOptions(model=str(folder), **options), CPU, TorchKernels())
    assert isinstance(model, Qwen3Moe)
    return model


def assert_equal_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    pairs = list(zip(ours.named_parameters(), theirs.named_parameters(), strict=True))
    assert pairs
    for (name, our), (_, their) in pairs:
        assert torch.equal(our, their), name


# ------------------------------------------------------------------------------------------------ tensors


def test_missing_tensor_is_named(folder):
    edit_tensors(folder, lambda tensors: tensors.pop(EXPERT))
    with pytest.raises(CheckpointError, match=rf"lacks tensor {EXPERT}"):
        load(folder)


def test_many_missing_tensors_are_counted_and_a_few_named(folder):
    edit_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.1." in name])
    with pytest.raises(CheckpointError, match=r"lacks 57 tensors: model\.layers\.1\.\S+, .*\.\.\."):
        load(folder)


def test_extra_tensor_is_named(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.0.mlp.shared.weight": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=r"unknown tensor model\.layers\.0\.mlp\.shared\.weight"):
        load(folder)


def test_wrong_shape_is_named(folder):
    edit_tensors(folder, lambda tensors: tensors.update({EXPERT: torch.ones(24, 47)}))
    with pytest.raises(CheckpointError, match=rf"{EXPERT} has shape \[24, 47\] .* \[24, 48\]"):
        load(folder)


def test_integer_tensor_is_refused(folder):
    edit_tensors(folder, lambda tensors: tensors.update({EXPERT: torch.ones(24, 48, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=rf"{EXPERT} has type I8"):
        load(folder)


def test_another_number_of_layers_or_experts_is_refused(folder):
    edit_config(folder, num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=r"unknown 57 tensors: model\.layers\.2"):
        load(folder)
    edit_config(folder, num_hidden_layers=3, num_local_experts=17)
    with pytest.raises(CheckpointError, match=r"experts\.16"):
        load(folder)


def test_biases_in_a_model_without_them_are_refused(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["mixed"], tmp_path / "checkpoint")
    edit_config(folder, attention_bias=False)
    with pytest.raises(CheckpointError, match=r"unknown 24 tensors: .*bias"):
        load(folder)


@pytest.mark.parametrize("damage", ["cut", "gone", "rubbish"])
def test_damaged_file_is_named(folder, damage):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[:-100] if damage == "cut" else b"rubbish")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(folder)


@pytest.mark.parametrize("shape", list(SHAPES))
def test_fused_experts_are_the_same_weights(checkpoints, tmp_path, shape):
    folder = shutil.copytree(checkpoints[shape], tmp_path / "fused")
    config = load_model_config(folder)

    def fuse(tensors):
        for layer in config.moe_layer_ids:
            prefix = f"model.layers.{layer}.mlp.experts."
            parts = {
                part: torch.stack([tensors.pop(f"{prefix}{i}.{part}.weight") for i in range(config.num_experts)])
                for part in ("gate_proj", "up_proj", "down_proj")
            }
            tensors[prefix + "gate_up_proj"] = torch.cat((parts["gate_proj"], parts["up_proj"]), dim=1)
            tensors[prefix + "down_proj"] = parts["down_proj"]

    edit_tensors(folder, fuse)
    assert_equal_weights(load(folder), load(checkpoints[shape]))


def test_experts_in_both_spellings_are_refused(folder):
    edit_tensors(
        folder, lambda tensors: tensors.update({"model.layers.0.mlp.experts.down_proj": torch.ones(16, 48, 24)})
    )
    with pytest.raises(CheckpointError, match=r"unknown 16 tensors: model\.layers\.0\.mlp\.experts\.0\.down_proj"):
        load(folder)


def shard(folder: Path, num_shards: int) -> dict[str, str]:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % num_shards}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_shards_are_the_same_weights(folder, checkpoints):
    shard(folder, 3)
    assert_equal_weights(load(folder), load(checkpoints["plain"]))


def test_missing_shard_is_named(folder):
    shard(folder, 3)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors"):
        load(folder)


def test_tensor_in_two_shards_is_refused(folder):
    weight_map = shard(folder, 2)
    twice = load_file(folder / "model-0.safetensors") | {EXPERT: torch.ones(24, 48)}
    twice |= {name: torch.ones(1) for name, file in weight_map.items() if file == "model-1.safetensors"}
    save_file(twice, folder / "model-0.safetensors")
    with pytest.raises(CheckpointError, match="is in two files"):
        load(folder)


def test_unreadable_index_is_refused(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointError, match=r"index\.json"):
        load(folder)


def test_head_of_a_tied_model_is_tolerated_and_not_read(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["mixed"], tmp_path / "tied")
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(1000, 48)}))
    model = load(folder)
    assert model.lm_head_VD.data_ptr() == model.embed_VD.data_ptr()
    assert_equal_weights(model, load(checkpoints["mixed"]))


def test_conversion_to_another_dtype_is_logged(folder, caplog):
    with caplog.at_level(logging.WARNING):
        assert {parameter.dtype for parameter in load(folder).parameters()} == {torch.float32}
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        model = load(folder, dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert "are converted" in caplog.text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dummy_weights_repeat_themselves_and_need_no_file(folder, dtype):
    (folder / "model.safetensors").unlink()
    first, second = (load(folder, load_format="dummy", dtype=dtype) for _ in range(2))
    assert_equal_weights(first, second)
    matrices = [parameter for parameter in first.parameters() if parameter.dim() >= 2]
    assert all(
        parameter.isfinite().all() and parameter.std() > 0 for parameter in first.parameters() if parameter.dim() > 1
    )
    assert not torch.equal(matrices[1], matrices[1].roll(1, 0))
    assert not torch.equal(first.layers[0].attention.qkv, first.layers[1].attention.qkv)


# ------------------------------------------------------------------------------------------------ parts


@dataclass(frozen=True)
class Toy:
    """Sizes of a checkpoint that has each kind of tensor once."""

    hidden: int
    rows: tuple[int, int]
    columns: int
    vocab: int
    experts: int
    width: int

    def tensors(self) -> dict[str, torch.Tensor]:
        """The checkpoint."""
        shapes = {name: target.shape for name, target in self.table(Held.all_of(self)).targets.items()}
        return {name: torch.randn(shape) for name, shape in shapes.items()}

    def table(self, held: "Held", dtype: torch.dtype = torch.float32) -> WeightTable:
        """The table of a rank, with parameters that are NaN."""

        def empty(*shape: int) -> torch.Tensor:
            return torch.full(shape, torch.nan, dtype=dtype)

        num_rows = sum(map(len, held.rows))
        targets = {
            **rows_of(["embed"], empty(len(held.vocab) + 2, self.hidden), [self.vocab], [held.vocab]),
            **rows_of(["q", "k"], empty(num_rows, self.hidden), self.rows, held.rows),
            **rows_of(["q_bias", "k_bias"], empty(num_rows), self.rows, held.rows),
            "out": columns_of(empty(self.hidden, len(held.columns)), self.columns, held.columns),
            "norm": whole(empty(self.hidden)),
        }
        gate_up = empty(len(held.experts), 2 * len(held.width), self.hidden)
        down = empty(len(held.experts), self.hidden, len(held.width))
        places: dict[str, tuple[int, int]] = {}
        for expert in range(self.experts):
            names = [f"gate.{expert}", f"up.{expert}"]
            places |= {names[0]: (expert, 0), names[1]: (expert, self.width)}
            if held.experts.start <= expert < held.experts.stop:
                at = expert - held.experts.start
                targets |= rows_of(names, gate_up[at], [self.width] * 2, [held.width] * 2)
                targets[f"down.{expert}"] = columns_of(down[at], self.width, held.width)
            else:
                targets |= {name: Target((self.width, self.hidden)) for name in names}
                targets[f"down.{expert}"] = Target((self.hidden, self.width))
        fused = {
            "gate_up": Fused((self.experts, 2 * self.width, self.hidden), places),
            "down": Fused(
                (self.experts, self.hidden, self.width),
                {f"down.{expert}": (expert, 0) for expert in range(self.experts)},
            ),
        }
        return WeightTable(targets, fused)

    def fused(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same checkpoint with its experts in two tensors."""
        gate, up, down = (
            torch.stack([tensors[f"{part}.{expert}"] for expert in range(self.experts)])
            for part in ("gate", "up", "down")
        )
        others = {name: tensor for name, tensor in tensors.items() if "." not in name}
        return others | {"gate_up": torch.cat((gate, up), dim=1), "down": down}


@dataclass(frozen=True)
class Held:
    """What one rank holds of a toy."""

    rows: tuple[Span, Span]
    columns: Span
    vocab: Span
    experts: Span
    width: Span

    @classmethod
    def all_of(cls, toy: Toy) -> "Held":
        [held] = split(toy, 1, ep=False, cut=even)
        return held


Cut = Callable[[int, int], list[Span]]


def even(size: int, num_ranks: int) -> list[Span]:
    return [Span(size * rank // num_ranks, size * (rank + 1) // num_ranks) for rank in range(num_ranks)]


def split(toy: Toy, num_ranks: int, *, ep: bool, cut: Cut) -> list[Held]:
    """Cut a toy for the ranks: whole experts with `ep`, otherwise a part of each."""
    every = [*zip(*(cut(size, num_ranks) for size in toy.rows), strict=True)]
    experts, width = [[Span(0, size)] * num_ranks for size in (toy.experts, toy.width)]
    if ep:
        experts = cut(toy.experts, num_ranks)
    else:
        width = cut(toy.width, num_ranks)
    columns, vocab = cut(toy.columns, num_ranks), cut(toy.vocab, num_ranks)
    return [Held(*parts) for parts in zip(every, columns, vocab, experts, width, strict=True)]


def joined(tables: list[WeightTable]) -> dict[str, torch.Tensor]:
    """Every tensor from the parts of all ranks."""
    tensors: dict[str, torch.Tensor] = {}
    for name in tables[0].targets:
        views = [view for table in tables if (view := table.targets[name].view) is not None]
        if name == "norm":
            assert all(torch.equal(view, views[0]) or view.isnan().all() for view in views)
            views = views[:1]
        tensors[name] = torch.cat(views, dim=1 if name == "out" or name.startswith("down") else 0)
    return tensors


@pytest.fixture(params=range(12))
def ranks(request) -> tuple[Toy, list[Held]]:
    """A toy of random sizes, cut at random for some ranks; parts may be empty."""
    rng = random.Random(request.param)

    def cut(size: int, num_ranks: int) -> list[Span]:
        bounds = [0, *sorted(rng.randint(0, size) for _ in range(num_ranks - 1)), size]
        return [Span(start, stop) for start, stop in pairwise(bounds)]

    sizes = [rng.randint(1, 20) for _ in range(7)]
    toy = Toy(sizes[0], (sizes[1], sizes[2]), *sizes[3:])
    return toy, split(toy, rng.randint(1, 5), ep=request.param % 2 == 0, cut=cut)


@pytest.mark.parametrize("spelling", ["one by one", "fused"])
def test_parts_of_all_ranks_are_the_file(ranks, tmp_path, spelling):
    toy, helds = ranks
    tensors = toy.tensors()
    save_file(tensors if spelling == "one by one" else toy.fused(tensors), tmp_path / "model.safetensors")
    tables = [toy.table(held) for held in helds]
    for table in tables:
        load_weights(table, tmp_path)
    ours = joined(tables)
    assert ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(ours[name], tensor), name


def test_rows_that_no_tensor_covers_are_left_alone(tmp_path):
    toy = Toy(4, (4, 4), 4, 8, 2, 4)
    save_file(toy.tensors(), tmp_path / "model.safetensors")
    parameter = torch.full((6, 4), 7.0)
    table = toy.table(Held.all_of(toy))
    load_weights(
        WeightTable({**table.targets, **rows_of(["embed"], parameter, [8], [Span(4, 8)])}, table.fused), tmp_path
    )
    assert torch.equal(parameter[:4], load_file(tmp_path / "model.safetensors")["embed"][4:])
    assert (parameter[4:] == 7).all()


@pytest.mark.parametrize("shape_view_origin", [((4, 4), (3, 4), (2, 0)), ((4,), (5,), ()), ((4, 4), (4,), ())])
def test_view_that_sticks_out_of_its_tensor_is_refused(shape_view_origin):
    shape, view, origin = shape_view_origin
    with pytest.raises(AssertionError):
        Target(shape, torch.zeros(view), origin)


@pytest.mark.parametrize("spelling", ["one by one", "fused"])
@pytest.mark.parametrize("ep", [False, True])
def test_ranks_read_what_they_hold_and_no_more(tmp_path, monkeypatch, spelling, ep):
    read_bytes = 0

    class Counting:
        """An open file that only gives slices; no whole tensor can be asked of it."""

        def __init__(self, path: Path, **options: Any) -> None:
            self._open = safe_open(path, **options)

        def __enter__(self) -> "Counting":
            self._file = self._open.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self._open.__exit__(*error)

        def keys(self) -> list[str]:
            return self._file.keys()

        def get_slice(self, name: str) -> "CountingSlice":
            return CountingSlice(self._file.get_slice(name))

    class CountingSlice:
        def __init__(self, stored: Any) -> None:
            self._stored = stored
            self.get_shape, self.get_dtype = stored.get_shape, stored.get_dtype

        def __getitem__(self, part: tuple[slice, ...]) -> torch.Tensor:
            nonlocal read_bytes
            tensor = self._stored[part]
            read_bytes += tensor.nbytes
            return tensor

    toy = Toy(8, (16, 8), 16, 32, 8, 12)
    tensors = toy.tensors()
    save_file(tensors if spelling == "one by one" else toy.fused(tensors), tmp_path / "model.safetensors")
    monkeypatch.setattr("common.models.weight_files.safe_open", Counting)
    split_bytes = sum(tensor.nbytes for name, tensor in tensors.items() if name != "norm")
    for held in split(toy, 4, ep=ep, cut=even):
        read_bytes = 0
        load_weights(toy.table(held), tmp_path)
        assert read_bytes == split_bytes / 4 + tensors["norm"].nbytes


def replaced(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize("spelling", ["one by one", "fused"])
@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_refuses_what_is_wrong_with_any_tensor(tmp_path, rank, spelling):
    """The spoiled ones are the last expert's, or the experts' of both; without `ep` it is in a part that rank 0 has not."""
    toy = Toy(8, (16, 8), 16, 32, 4, 12)
    last, shape = ("down.3", (8, 12)) if spelling == "one by one" else ("down", (4, 8, 12))
    wider = (*shape[:-1], 13)
    spoilings = [
        (lambda tensors: tensors.pop(last), rf"lacks .*{last}"),
        (replaced("down.4", torch.ones(8, 12)), r"unknown tensor down\.4"),
        (replaced(last, torch.ones(wider)), rf"{last} has shape .*13\] where"),
        (replaced(last, torch.ones(shape, dtype=torch.int8)), rf"{last} has type I8"),
    ]
    for ep in (True, False):
        held = split(toy, 2, ep=ep, cut=even)[rank]
        for spoil, message in spoilings:
            tensors = toy.tensors()
            tensors = tensors if spelling == "one by one" else toy.fused(tensors)
            spoil(tensors)
            save_file(tensors, tmp_path / "model.safetensors")
            with pytest.raises(CheckpointError, match=message):
                load_weights(toy.table(held), tmp_path)


def test_conversion_is_logged_by_the_ranks_that_hold_the_tensor(tmp_path, caplog):
    toy = Toy(8, (16, 8), 16, 32, 4, 12)
    tensors = toy.tensors()
    save_file(tensors | {"down.3": tensors["down.3"].bfloat16()}, tmp_path / "model.safetensors")
    warnings = []
    for held in split(toy, 2, ep=True, cut=even):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            load_weights(toy.table(held), tmp_path)
        warnings.append(caplog.text)
    assert warnings[0] == ""
    assert "1 tensors are converted" in warnings[1]
    assert "down.3 from BF16" in warnings[1]


@pytest.mark.parametrize("ep", [False, True])
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dummy_weights_of_all_ranks_are_one_model(num_ranks, ep, dtype):
    toy = Toy(32, (16, 8), 16, 30, 8, 12)
    alone = toy.table(Held.all_of(toy), dtype)
    tables = [toy.table(held, dtype) for held in split(toy, num_ranks, ep=ep, cut=even)]
    for table in (alone, *tables):
        fill_randomly(table, CPU)
    ours, theirs = joined(tables), joined([alone])
    for name, tensor in theirs.items():
        if tensor.dim() == 1:
            assert tensor.isnan().all(), name
            assert ours[name].isnan().all(), name
        else:
            assert torch.equal(ours[name], tensor), name
            assert tensor.float().std() == pytest.approx(tensor.shape[1] ** -0.5, rel=0.3), name
    matrices = [tensor for tensor in theirs.values() if tensor.dim() == 2]
    assert len({tuple(matrix.flatten()[:8].tolist()) for matrix in matrices}) == len(matrices)


def test_dummy_weights_are_those_of_any_other_process():
    """Whatever Python's hashes of names are there, and whatever was filled before."""
    program = (
        "import torch; from common.models.weight_table import *; from common.models.weights import *;"
        "views = {name: torch.empty(5, 3) for name in ('other', 'embed')};"
        "fill_randomly(WeightTable({name: whole(view) for name, view in views.items()}), torch.device('cpu'));"
        "print(views['embed'].tolist())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "3"}
    there = subprocess.check_output([sys.executable, "-c", program], cwd=Path(__file__).parents[2], env=environment)
    here = torch.empty(5, 3)
    fill_randomly(WeightTable({"embed": whole(here)}), CPU)
    assert here.tolist() == json.loads(there)


# ------------------------------------------------------------------------------------------------ config


@pytest.mark.parametrize("shape", list(SHAPES))
def test_config_agrees_with_transformers(checkpoints, shape):
    ours, theirs = load_model_config(checkpoints[shape]), AutoConfig.from_pretrained(checkpoints[shape])
    for name in ours.__struct_fields__:
        if name not in ("top_k", "moe_layer_ids", "rope", "eos_token_ids", "dtype", "quantization_config"):
            assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.top_k == theirs.num_experts_per_tok
    assert (ours.rope.type, ours.rope.theta) == (
        theirs.rope_parameters["rope_type"],
        theirs.rope_parameters["rope_theta"],
    )
    assert ours.eos_token_ids == (0, 2)
    assert ours.dtype == "float32"
    assert ours.quantization_config is None
    assert ours.moe_layer_ids == {"plain": (0, 1, 2), "wide": (0, 1, 2), "mixed": (1, 5)}[shape]


def test_older_spellings_mean_the_same(checkpoints, tmp_path):
    new = load_model_config(checkpoints["mixed"])
    folder = shutil.copytree(checkpoints["mixed"], tmp_path / "old")
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    edit_config(
        folder,
        num_experts=new.num_experts,
        num_local_experts=...,
        torch_dtype="float32",
        dtype=...,
        rope_theta=rope.pop("rope_theta"),
        rope_scaling={"type": rope.pop("rope_type"), **rope},
        rope_parameters=...,
    )
    assert load_model_config(folder) == new
    edit_config(folder, rope_scaling=None, rope_theta=1_000_000)
    assert load_model_config(folder).rope.theta == 1e6
    assert load_model_config(folder).rope.type == "default"


def test_yarn_without_its_trained_length_means_the_context(folder):
    edit_config(folder, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0})
    assert load_model_config(folder).rope.options == {"factor": 2.0, "original_max_position_embeddings": 1024}


def test_end_tokens_are_those_of_both_files(folder):
    edit_config(folder, eos_token_id=[7, 5])
    assert load_model_config(folder).eos_token_ids == (0, 2, 5, 7)
    (folder / "generation_config.json").unlink()
    assert load_model_config(folder).eos_token_ids == (5, 7)
    edit_config(folder, eos_token_id=None)
    assert load_model_config(folder).eos_token_ids == ()


def test_float8_blocks_are_read(folder):
    edit_config(folder, quantization_config=FP8 | {"weight_block_size": [64, 128]})
    assert load_model_config(folder).quantization_config == Fp8Config(quant_method="fp8", weight_block_size=(64, 128))
    described = {"activation_scheme": "dynamic", "fmt": "e4m3", "modules_to_not_convert": ["lm_head"]}
    edit_config(folder, quantization_config=FP8 | described)
    assert load_model_config(folder).quantization_config == Fp8Config(quant_method="fp8", weight_block_size=(128, 128))
    edit_config(folder, quantization_config=None)
    assert load_model_config(folder).quantization_config is None


def test_head_size_may_be_left_out(folder):
    edit_config(folder, head_dim=...)
    assert load_model_config(folder).head_dim == 12


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "qwen2_moe"}, "model_type"),
        ({"model_type": ...}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"quantization_config": {}}, r"quantization_config: .*`quant_method`"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config: .*`\$\.quant_method`"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, r"quantization_config: .*`\$\.quant_method`"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config: .*`weight_block_size`"),
        ({"quantization_config": FP8 | {"weight_block_size": None}}, r"quantization_config: .*weight_block_size"),
        ({"quantization_config": FP8 | {"weight_block_size": [128]}}, r"quantization_config: .*weight_block_size"),
        ({"quantization_config": FP8 | {"weight_block_size": [128, 0]}}, r"quantization_config: .*weight_block_size"),
        ({"quantization_config": FP8 | {"weight_block_size": [1.5, 1]}}, r"quantization_config: .*weight_block_size"),
        ({"quantization_config": FP8 | {"fmt": "e5m2"}}, r"quantization_config: .*`\$\.fmt`"),
        ({"quantization_config": FP8 | {"activation_scheme": "static"}}, r"quantization_config: .*activation_scheme"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rope_parameters"),
        ({"rope_parameters": ..., "rope_scaling": {"type": "longrope"}}, "rope_scaling"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_parameters"),
        ({"num_experts": 17}, "num_experts"),
        ({"hidden_size": ...}, "hidden_size"),
        ({"hidden_size": "many"}, "hidden_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_local_experts": ...}, "num_experts"),
        ({"num_experts_per_tok": 17}, "num_experts_per_tok"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"mlp_only_layers": [0, 1, 2]}, "mlp_only_layers"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ({"dtype": "float8_e4m3fn"}, "dtype"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
    ],
)
def test_config_that_cannot_be_served_names_the_field(folder, fields, named):
    edit_config(folder, **fields)
    with pytest.raises(CheckpointError, match=rf"config\.json: {named}"):
        load_model_config(folder)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_unreadable_config_is_named(folder, content):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model_config(folder)


def test_config_needs_no_torch():
    program = "import sys, common.models.config; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=False).returncode == 0


# ------------------------------------------------------------------------------------------------ where it is


@pytest.fixture
def hub(monkeypatch) -> list[tuple[str, dict[str, Any]]]:
    """A hub that cannot be reached, and a list of what it was asked for."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def unreachable(name: str, **settings: Any) -> str:
        asked.append((name, settings))
        raise FileNotFoundError("cannot reach the hub\nand much more")

    monkeypatch.setattr("common.models.config.snapshot_download", unreachable)
    return asked


def test_local_folder_is_itself(folder, hub, monkeypatch):
    assert resolve_checkpoint(str(folder)) == folder
    monkeypatch.chdir(folder.parent)
    assert resolve_checkpoint(folder.name) == Path(folder.name)
    assert not hub


@pytest.mark.parametrize("path", ["/no/such/folder", "./missing", "../missing", "~/missing-model", "a/b/c", ""])
def test_missing_path_is_not_sent_to_the_hub(path, hub):
    with pytest.raises(UsageError, match="no such folder"):
        resolve_checkpoint(path)
    assert not hub


def test_file_is_not_a_folder(folder, hub):
    with pytest.raises(UsageError, match="not a folder"):
        resolve_checkpoint(str(folder / "config.json"))
    assert not hub


def test_unreachable_hub_is_one_line(hub):
    with pytest.raises(UsageError) as raised:
        resolve_checkpoint("some/model")
    assert "some/model" in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(UsageError):
        resolve_checkpoint("some/model", weights=False)
    assert ["*.safetensors" in settings["allow_patterns"] for _, settings in hub] == [True, False]
