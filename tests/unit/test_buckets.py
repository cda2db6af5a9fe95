"""Tensors that come end to end in one flat tensor, pickled or as bytes: what each of them is, and what is not believed."""

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing import reductions

from common.errors import CheckpointError
from common.models.buckets import cut, num_bytes, unpacked
from common.models.pickled import read_pickled
from common.models.weight_sources import announced
from tests.support.trainer import FIELDS, PLACES, announcement, bytes_of, described, metadata_class, pickled_bucket

FP8 = torch.float8_e4m3fn
MIXED = {
    "odd": torch.arange(3.0).to(FP8),
    "float": torch.randn(2, 3),
    "scalar": torch.tensor(4.0).bfloat16(),
    "none": torch.empty(0, 5),
    "matrix": torch.randn(3, 5).bfloat16(),
    "half": torch.randn(1, 7, 2).half(),
}
"""The second one and those behind it begin at bytes of odd numbers."""


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def kind(place: str, monkeypatch: pytest.MonkeyPatch) -> type:
    """A trainer's class of metadata, in either place."""
    return metadata_class(monkeypatch, place)


def written(path: Path, kind: type, flat: object, said: list[dict[str, Any]], protocol: int = 4) -> Path:
    path.write_bytes(pickled_bucket(kind, flat, said, protocol))
    return path


def check_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(ours[name].float(), tensor.float()), name


# ------------------------------------------------------------------------------------------------ pickled


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_bucket_of_bytes(tmp_path: Path, kind: type, protocol: int):
    path = written(tmp_path / "p", kind, bytes_of(MIXED.values()), described(MIXED, as_bytes=True), protocol)
    check_same(read_pickled(path, is_bucket=True), MIXED)


def test_a_bucket_of_one_dtype(tmp_path: Path, kind: type):
    tensors = {name: tensor.bfloat16() for name, tensor in MIXED.items()}
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    path = written(tmp_path / "p", kind, flat, described(tensors, as_bytes=False))
    check_same(read_pickled(path, is_bucket=True), tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, FP8])
def test_a_bucket_of_another_dtype(dtype: torch.dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in MIXED.items()}
    check_same(unpacked(bytes_of(tensors.values()).view(dtype), described(tensors, as_bytes=False)), tensors)


def test_a_bucket_that_is_a_slice_of_more(tmp_path: Path, kind: type):
    """Where its numbers begin in memory counts, and not where in the bucket."""
    memory = torch.zeros(100, dtype=torch.uint8)
    tensors = {"float": MIXED["float"]}
    memory[3:27] = bytes_of(tensors.values())
    path = written(tmp_path / "p", kind, memory[3:27], described(tensors, as_bytes=True))
    check_same(read_pickled(path, is_bucket=True), tensors)


def test_numbers_that_begin_where_they_may_are_not_copied(tmp_path: Path, kind: type):
    tensors = {"a": torch.randn(4), "b": torch.randn(2, 3)}
    path = written(tmp_path / "p", kind, bytes_of(tensors.values()), described(tensors, as_bytes=True))
    read = read_pickled(path, is_bucket=True)
    assert read["a"].untyped_storage().data_ptr() == read["b"].untyped_storage().data_ptr()


class OnGpu:
    """A flat tensor of bytes on a GPU, as torch's reductions pickle one: by where it is."""

    def __reduce__(self) -> Any:
        storage, handle = torch.storage.TypedStorage, (0, b"handle", 61, 0, b"counter", 0, b"event", False)
        return reductions.rebuild_cuda_tensor, (torch.Tensor, (61,), (1,), 0, storage, torch.uint8, *handle, False)


def test_a_bucket_on_a_gpu(tmp_path: Path, kind: type, monkeypatch: pytest.MonkeyPatch):
    path = written(tmp_path / "p", kind, OnGpu(), described(MIXED, as_bytes=True))
    opened: list[tuple[Any, ...]] = []

    def rebuild(*parts: Any) -> torch.Tensor:
        opened.append(parts)
        return bytes_of(MIXED.values())

    expected = OnGpu().__reduce__()[1]
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", rebuild)
    check_same(read_pickled(path, is_bucket=True), MIXED)
    assert opened == [expected]


def test_an_empty_bucket(tmp_path: Path, kind: type):
    assert read_pickled(written(tmp_path / "p", kind, torch.empty(0, dtype=torch.uint8), []), is_bucket=True) == {}


def test_room_between_tensors_is_nobodys(tmp_path: Path, kind: type):
    said = described({"a": torch.ones(2)}, as_bytes=False)
    said[0] |= {"start_idx": 1, "end_idx": 3}
    read = read_pickled(written(tmp_path / "p", kind, torch.tensor([9.0, 1, 2, 9]), said), is_bucket=True)
    assert read["a"].tolist() == [1, 2]


def test_load_format_and_what_is_there_must_agree(tmp_path: Path, kind: type):
    path = written(tmp_path / "p", kind, torch.ones(2), described({"a": torch.ones(2)}, as_bytes=False))
    with pytest.raises(CheckpointError, match=r"is a flattened bucket.*load_format"):
        read_pickled(path)
    named: tuple[Any, ...] = ([("a", torch.ones(2))], {"a": torch.ones(2)}, {"flattened_tensor": torch.ones(2)}, [], 3)
    for other in named:
        path.write_bytes(pickle.dumps(other))
        with pytest.raises(CheckpointError, match=r"is no flattened bucket.*load_format"):
            read_pickled(path, is_bucket=True)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "name of bytes": ({"name": b"b"}, "tensor 1 of metadata: Expected `str`, got `bytes` - at `$.name`"),
    "no name": ({"name": None}, "tensor 1 of metadata: Expected `str`, got `null` - at `$.name`"),
    "same name": ({"name": "a"}, "tensor a: is there twice"),
    "shape of words": ({"shape": ("2", 2)}, "tensor b: Expected `int`, got `str` - at `$.shape[0]`"),
    "shape below 0": ({"shape": (-2, -2)}, "tensor b: Expected `int` >= 0 - at `$.shape[0]`"),
    "shape beyond torch": ({"shape": (0, 2**63)}, "tensor b: Expected `int` <= 9223372036854775807 - at `$.shape[1]`"),
    "shape of less": ({"shape": (3,)}, "tensor b: shape [3] of torch.float32 takes 12 bytes, and numel is of 16"),
    "shape of more": ({"shape": (5,)}, "tensor b: shape [5] of torch.float32 takes 20 bytes, and numel is of 16"),
    "dtype of words": ({"dtype": "float32"}, "tensor b: Expected `torch.dtype`, got `str` - at `$.dtype`"),
    "dtype of the shape's size": ({"dtype": torch.bfloat16}, "tensor b: "),
    "start that is true": ({"start_idx": True}, "tensor b: Expected `int`, got `bool` - at `$.start_idx`"),
    "start below 0": ({"start_idx": -1}, "tensor b: Expected `int` >= 0 - at `$.start_idx`"),
    "start too early": ({"start_idx": 0}, "tensor b: start_idx is 0, and the tensor before it ends at "),
    "end of a fraction": ({"end_idx": 3.0}, "tensor b: Expected `int`, got `float` - at `$.end_idx`"),
    "end beyond": ({"end_idx": 99}, "tensor b: end_idx is 99, and flattened_tensor has "),
    "end before its start": ({"end_idx": 0}, "tensor b: numel is "),
    "numel": ({"numel": 3}, "tensor b: numel is 3, from start_idx "),
    "numel below 0": ({"numel": -4}, "tensor b: Expected `int` >= 0 - at `$.numel`"),
}


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_what_is_said_is_not_believed(tmp_path: Path, kind: type, name: str, as_bytes: bool):
    tensors = {"a": torch.ones(3), "b": torch.ones(2, 2), "c": torch.ones(3)}
    fields, message = WRONG[name]
    flat, said = bytes_of(tensors.values()), described(tensors, as_bytes=as_bytes)
    path = written(tmp_path / "p", kind, flat if as_bytes else flat.view(torch.float32), said)
    read_pickled(path, is_bucket=True)
    said[1] |= fields
    path = written(path, kind, flat if as_bytes else flat.view(torch.float32), said)
    with pytest.raises(CheckpointError, match=f"^the update: {re.escape(message)}"):
        read_pickled(path, is_bucket=True)


def test_a_dtype_that_the_bucket_is_not_of(tmp_path: Path, kind: type):
    """The number of bytes alone would not show it."""
    said = described({"a": torch.ones(4).half()}, as_bytes=False)
    path = written(tmp_path / "p", kind, torch.ones(4).bfloat16(), said)
    message = "tensor a: dtype is torch.float16, and flattened_tensor is of torch.bfloat16"
    with pytest.raises(CheckpointError, match=message):
        read_pickled(path, is_bucket=True)


@pytest.mark.parametrize(
    "flat",
    [torch.ones(2, 1), torch.ones(()), torch.ones(4)[::2], torch.nn.Parameter(torch.ones(1, 2)), [1.0, 2.0], None],
)
def test_a_flattened_tensor_that_is_none(tmp_path: Path, kind: type, flat: object):
    path = written(tmp_path / "p", kind, flat, described({"a": torch.ones(2)}, as_bytes=False))
    with pytest.raises(CheckpointError, match="flattened_tensor must be"):
        read_pickled(path, is_bucket=True)


@pytest.mark.parametrize("metadata", [None, 3, "a", {"name": "a"}, [{"name": "a"}], [torch.Size((2,))]])
def test_metadata_that_is_none(tmp_path: Path, metadata: object):
    path = tmp_path / "p"
    path.write_bytes(pickle.dumps({"flattened_tensor": torch.ones(2), "metadata": metadata}))
    with pytest.raises(CheckpointError, match="metadata must be a list"):
        read_pickled(path, is_bucket=True)


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_is_missing_is_named(tmp_path: Path, kind: type, field: str):
    [entry] = [kind(**each) for each in described({"a": torch.ones(2)}, as_bytes=False)]
    delattr(entry, field)
    path = tmp_path / "p"
    path.write_bytes(pickle.dumps({"flattened_tensor": torch.ones(2), "metadata": [entry]}))
    with pytest.raises(CheckpointError, match=f"missing required field `{field}`"):
        read_pickled(path, is_bucket=True)


def test_a_field_that_is_new_says_nothing(tmp_path: Path, kind: type):
    [entry] = [kind(**each) for each in described({"a": torch.ones(2)}, as_bytes=False)]
    entry.crc = 3
    path = tmp_path / "p"
    path.write_bytes(pickle.dumps({"flattened_tensor": torch.ones(2), "metadata": [entry]}))
    assert read_pickled(path, is_bucket=True)["a"].tolist() == [1, 1]


def test_nothing_else_of_those_modules_may_be_named(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch):
    kind = metadata_class(monkeypatch, place, "FlattenedTensorBucket")
    path = written(tmp_path / "p", kind, torch.ones(2), described({"a": torch.ones(2)}, as_bytes=False))
    with pytest.raises(CheckpointError, match=f"may not name {place}.FlattenedTensorBucket"):
        read_pickled(path, is_bucket=True)


# ------------------------------------------------------------------------------------------------ bytes that were announced


def test_bytes_are_cut_into_what_was_announced():
    told = announcement(MIXED)
    headers = announced(told["names"], told["dtypes"], told["shapes"])
    flat = bytes_of(MIXED.values())
    assert sum(map(num_bytes, headers.values())) == len(flat)
    check_same(dict(zip(MIXED, cut(flat, headers.values()), strict=True)), MIXED)
    assert list(cut(flat, [])) == []
