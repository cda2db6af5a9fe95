"""What a weight update is checked for before anything is written, whichever way it comes; and pickles, which may do nothing."""

import io
import os
import pickle
import random
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from common.errors import CheckpointError
from common.models import pickled as pickled_weights
from common.models.pickled import read_pickled
from common.models.weight_files import FileWeights
from common.models.weight_sources import BroadcastWeights, TensorWeights, Weights, announced
from common.models.weight_table import Fused, Target, WeightTable, columns_of, rows_of, whole
from common.ranks import Span

BLOCK = (2, 2)
FP8 = torch.float8_e4m3fn


class Model:
    """A rank's part of a model that has each kind of tensor: a vector, joined rows, columns, experts, one of them elsewhere."""

    def __init__(self, fp8_block: tuple[int, int] | None = None) -> None:
        self.norm, self.qk, self.out = torch.zeros(4), torch.zeros(4, 4), torch.zeros(4, 2)
        self.expert = torch.zeros(4, 4)
        self.table = WeightTable(
            {
                "norm": whole(self.norm),
                **rows_of(["q", "k"], self.qk, [4, 4], [Span(2, 4)] * 2),
                "out": columns_of(self.out, 4, Span(2, 4)),
                **rows_of(["gate.0", "up.0"], self.expert, [2, 2]),
                "gate.1": Target((2, 4)),
                "up.1": Target((2, 4)),
            },
            {"gate_up": Fused((2, 4, 4), {"gate.0": (0, 0), "up.0": (0, 2), "gate.1": (1, 0), "up.1": (1, 2)})},
            frozenset({"tied"}),
            fp8_block,
        )

    def held(self) -> list[torch.Tensor]:
        """All that the rank holds."""
        return [tensor.clone() for tensor in (self.norm, self.qk, self.out, self.expert)]


def checkpoint() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"norm": (4,), "q": (4, 4), "k": (4, 4), "out": (4, 4)}
    shapes |= {f"{part}.{expert}": (2, 4) for part in ("gate", "up") for expert in range(2)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    parts = [torch.cat([tensors[f"gate.{expert}"], tensors[f"up.{expert}"]]) for expert in range(2)]
    return {name: tensor for name, tensor in tensors.items() if "." not in name} | {"gate_up": torch.stack(parts)}


def expected(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    qk = torch.cat([tensors["q"][2:], tensors["k"][2:]])
    return [tensors["norm"], qk, tensors["out"][:, 2:], torch.cat([tensors["gate.0"], tensors["up.0"]])]


def same(ours: Iterable[torch.Tensor], theirs: Iterable[torch.Tensor]) -> bool:
    return all(torch.equal(our, their) for our, their in zip(ours, theirs, strict=True))


def by_file(tensors: dict[str, torch.Tensor], folder: Path) -> Weights:
    save_file(tensors, folder / "update.safetensors")
    return FileWeights(folder / "update.safetensors")


def by_broadcast(tensors: dict[str, torch.Tensor], folder: Path) -> Weights:
    dtypes = [str(tensor.dtype) for tensor in tensors.values()]
    coming = iter(tensors.values())
    return BroadcastWeights(
        announced(list(tensors), dtypes, [tensor.shape for tensor in tensors.values()]),
        lambda: lambda header: next(coming),
    )


def by_memory(tensors: dict[str, torch.Tensor], folder: Path) -> Weights:
    return TensorWeights(tensors)


WAYS = {"file": by_file, "broadcast": by_broadcast, "memory": by_memory}
Way = Callable[[dict[str, torch.Tensor], Path], Weights]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    return WAYS[str(request.param)]


@pytest.mark.parametrize("spelling", [dict, fused])
def test_all_tensors_are_taken(way: Way, tmp_path: Path, spelling: Callable[[Any], dict[str, torch.Tensor]]):
    model, tensors = Model(), checkpoint()
    weights = way(spelling(tensors) | {"tied": torch.ones(3)}, tmp_path)
    assert weights.check(model.table) == 0
    assert not any(tensor.any() for tensor in model.held()), "checking writes nothing"
    assert weights.load(model.table) == model.table.targets.keys()
    assert same(model.held(), expected(tensors))


def test_nothing_remembers_where_the_weights_came_from():
    model = Model()
    trained = {name: tensor.clone().requires_grad_() for name, tensor in checkpoint().items()}
    TensorWeights(trained).load(model.table)
    assert same(model.held(), expected(checkpoint()))
    assert not any(tensor.requires_grad for tensor in model.held())


@pytest.mark.parametrize(
    ("spelling", "names"), [(dict, ["norm", "k", "gate.0", "up.1"]), (fused, ["q", "gate_up"]), (dict, ["gate.1"])]
)
def test_some_tensors_are_taken_and_the_missing_counted(
    way: Way, tmp_path: Path, spelling: Callable[[Any], dict[str, torch.Tensor]], names: list[str]
):
    model, tensors = Model(), checkpoint()
    stored = {name: tensor for name, tensor in spelling(tensors).items() if name in names}
    weights = way(stored, tmp_path)
    named = {name for name in tensors if name in names or ("gate_up" in names and "." in name)}
    assert weights.check(model.table) == len(tensors) - len(named)
    assert weights.load(model.table) == named
    mixed = {name: tensor if name in named else torch.zeros_like(tensor) for name, tensor in tensors.items()}
    assert same(model.held(), expected(mixed))


BAD: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "unknown": ({"new": torch.ones(1)}, "has unknown tensor new"),
    "shape": ({"q": torch.ones(4, 3)}, r"tensor q has shape \[4, 3\] where the config implies \[4, 4\]"),
    "shape of another rank's": ({"gate.1": torch.ones(2, 5)}, r"gate\.1 has shape"),
    "shape, fused": ({"gate_up": torch.ones(2, 4, 5)}, r"gate_up has shape"),
    "both spellings": ({"gate_up": torch.ones(2, 4, 4), "up.1": torch.ones(2, 4)}, r"unknown tensor up\.1"),
    "type": ({"norm": torch.ones(4, dtype=torch.int32)}, "norm has type"),
    "double": ({"norm": torch.ones(4, dtype=torch.float64)}, "norm has type"),
    "float8 where there is none": (
        {"q": torch.ones(4, 4).to(FP8), "q_scale_inv": torch.ones(2, 2)},
        "has no quantization_config",
    ),
    "scales alone": ({"q_scale_inv": torch.ones(2, 2)}, "unknown tensor q_scale_inv"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_named_and_nothing_written(way: Way, tmp_path: Path, name: str):
    stored, message = BAD[name]
    model = Model()
    for attempt in ("check", "load"):
        with pytest.raises(CheckpointError, match=message):
            getattr(way(stored, tmp_path), attempt)(model.table)
        assert not any(tensor.any() for tensor in model.held())


@pytest.mark.parametrize("scales_first", [False, True])
def test_a_float8_matrix_and_its_scales_belong_together(way: Way, tmp_path: Path, scales_first: bool):
    model = Model(BLOCK)
    matrix, scale = torch.arange(16.0).view(4, 4).to(FP8), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    pair = [("q", matrix), ("norm", torch.ones(4)), ("q_scale_inv", scale)]
    stored = dict(reversed(pair) if scales_first else pair)
    assert way(stored, tmp_path).check(model.table) == 6
    assert way(stored, tmp_path).load(model.table) == {"q", "norm"}
    meant = matrix.float() * scale.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(model.qk[:2], meant[2:])
    assert torch.equal(model.norm, torch.ones(4))
    with pytest.raises(CheckpointError, match="lacks tensor q_scale_inv"):
        way({"q": matrix}, tmp_path).check(model.table)
    with pytest.raises(CheckpointError, match="unknown tensor q_scale_inv"):
        way({"q": matrix.float(), "q_scale_inv": scale}, tmp_path).check(model.table)
    with pytest.raises(CheckpointError, match=r"q_scale_inv has shape \[1, 2\]"):
        way({"q": matrix, "q_scale_inv": scale[:1]}, tmp_path).check(model.table)


def test_a_broadcast_keeps_nothing_but_halves_of_float8_matrices():
    model, sizes = Model(BLOCK), [("q", (4, 4)), ("norm", (4,)), ("q_scale_inv", (2, 2)), ("k", (4, 4))]
    made: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def receive(header: Any) -> torch.Tensor:
        nonlocal most
        tensor = torch.ones(header.shape).to(FP8 if header.dtype == "F8_E4M3" else torch.float32)
        made.append(weakref.ref(tensor))
        most = max(most, sum(each() is not None for each in made))
        return tensor

    dtypes = ["float8_e4m3fn", "float32", "float32", "float32"]
    headers = announced([name for name, _ in sizes], dtypes, [shape for _, shape in sizes])
    BroadcastWeights(headers, lambda: receive).load(model.table)
    assert most == 2


@pytest.mark.parametrize(
    ("names", "dtypes", "shapes", "message"),
    [
        (["a"], [], [[1]], "1 names, 0 dtypes and 1 shapes"),
        (["a", "b", "a"], ["float32"] * 3, [[1]] * 3, "tensor a twice"),
        (["a"], ["torch.int64"], [[1]], "tensor a has type int64"),
    ],
)
def test_announcements_that_make_no_sense(names: list[str], dtypes: list[str], shapes: Any, message: str):
    with pytest.raises(CheckpointError, match=message):
        announced(names, dtypes, shapes)


# ------------------------------------------------------------------------------------------------ files


def test_a_folder_must_have_everything(tmp_path: Path):
    tensors = checkpoint()
    save_file(fused(tensors), tmp_path / "model.safetensors")
    assert FileWeights(tmp_path).check(Model().table) == 0
    del tensors["up.1"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks tensor up\.1"):
        FileWeights(tmp_path).check(Model().table)


def test_a_file_that_ends_early_is_refused_at_each_look(tmp_path: Path):
    model, weights, path = Model(), by_file(checkpoint(), tmp_path), tmp_path / "update.safetensors"
    content = path.read_bytes()
    assert weights.check(model.table) == 0
    for cut in (content[:-1], content[: len(content) // 2], content[:20], b""):
        path.unlink()
        path.write_bytes(cut)
        for attempt in (weights.check, weights.load):
            with pytest.raises(CheckpointError):
                attempt(model.table)
        assert not any(tensor.any() for tensor in model.held())


# ------------------------------------------------------------------------------------------------ pickles


def pickled(value: object, path: Path, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("kind", [list, dict])
def test_pickled_tensors(tmp_path: Path, protocol: int, kind: type):
    tensors = {
        "a": torch.randn(3, 4),
        "b": torch.nn.Parameter(torch.randn(2).bfloat16()),
        "c": torch.randn(6, 6)[1:3, ::2],
    }
    read = read_pickled(pickled(kind(tensors.items()), tmp_path / "p", protocol))
    assert list(read) == list(tensors)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


class Calls:
    """Unpickling it calls something."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_a_pickle_runs_nothing(tmp_path: Path):
    trace = tmp_path / "ran"
    wicked: list[Any] = [
        Calls(os.mkdir, str(trace)),
        Calls(eval, f"__import__('os').mkdir('{trace}')"),
        Calls(torch.load, str(tmp_path / "other")),
        Calls(torch.storage._load_from_bytes, saved(Calls(os.mkdir, str(trace)))),
        Calls(getattr, "text", "upper"),
        os.mkdir,
    ]
    for value in wicked:
        bucket = {"flattened_tensor": torch.ones(1), "metadata": [value]}
        for is_bucket, update in ((False, [("a", value)]), (True, bucket)):
            with pytest.raises(CheckpointError, match="cannot be unpickled"):
                read_pickled(pickled(update, tmp_path / "p"), is_bucket=is_bucket)
            assert not trace.exists()
    pickle.loads(pickle.dumps(wicked[0]))
    assert trace.exists(), "they would do it elsewhere"


def spoken(text: str) -> bytes:
    """A string, as protocol 4 writes it."""
    return b"\x8c" + bytes([len(text)]) + text.encode()


def found(place: tuple[str, str]) -> bytes:
    """The opcodes that look something up."""
    return spoken(place[0]) + spoken(place[1]) + b"\x93"


def setting(place: tuple[str, str], state: bytes) -> bytes:
    """A pickle that sets the state of something that it may look up."""
    return b"\x80\x04" + found(place) + state + b"b."


METADATA = ("sglang.srt.weight_sync.tensor_bucket", "FlattenedTensorMetadata")
DICT = b"}" + spoken("fields") + b"K\x05s"
STATES = {"attributes": b"N" + DICT + b"\x86", "dictionary": DICT}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("place", pickled_weights._ALLOWED)
def test_a_pickle_sets_nothing_that_stays(tmp_path: Path, place: tuple[str, str], state: str):
    """The state of what it may name would be that of what torch itself, or the next update, finds there."""
    allowed = pickled_weights._ALLOWED[place]
    before = getattr(allowed, "fields", None)
    path = tmp_path / "p"
    path.write_bytes(setting(place, STATES[state]))
    with pytest.raises(CheckpointError, match="may not set the state"):
        read_pickled(path)
    assert getattr(allowed, "fields", None) is before


@pytest.mark.parametrize("state", STATES)
def test_metadata_takes_what_it_is_told_as_it_is(tmp_path: Path, state: str):
    """Neither a class, nor a method, nor anything but a dictionary with the fields."""
    entry = found(METADATA) + b")\x81" + STATES[state] + b"b"
    tensor = pickle.dumps(torch.ones(1), protocol=4)[2:-1]
    tensor = tensor[9:] if tensor[:1] == b"\x95" else tensor
    bucket = b"}(" + spoken("flattened_tensor") + tensor + spoken("metadata") + b"]" + entry + b"au."
    (tmp_path / "p").write_bytes(b"\x80\x04" + bucket)
    with pytest.raises(CheckpointError, match="tensor 0 of metadata: "):
        read_pickled(tmp_path / "p", is_bucket=True)


@pytest.mark.parametrize(
    "value", [3, [1], [("a", 1)], {1: torch.ones(1)}, [("a", torch.ones(1))] * 2, [("a", torch.ones(1), 3)]]
)
def test_a_pickle_of_something_else(tmp_path: Path, value: object):
    with pytest.raises(CheckpointError):
        read_pickled(pickled(value, tmp_path / "p"))


def test_rubbish_is_no_pickle(tmp_path: Path):
    (tmp_path / "p").write_bytes(b"rubbish")
    with pytest.raises(CheckpointError):
        read_pickled(tmp_path / "p")
    with pytest.raises(CheckpointError):
        read_pickled(tmp_path / "none")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_was_damaged_is_read_or_refused(tmp_path: Path):
    whole = pickled([("a", torch.ones(2)), ("b", torch.zeros(3))], tmp_path / "p").read_bytes()
    rng = random.Random(1)
    damaged = [whole[:stop] for stop in range(0, len(whole), 7)]
    for _ in range(500):
        place = rng.randrange(len(whole))
        damaged.append(whole[:place] + bytes([rng.randrange(256)]) + whole[place + 1 :])
    num_refused = 0
    for data in damaged:
        (tmp_path / "p").write_bytes(data)
        try:
            read_pickled(tmp_path / "p")
        except CheckpointError:
            num_refused += 1
    assert num_refused > 100
