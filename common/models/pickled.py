"""Named tensors as trainers pickle them: a list of `(name, tensor)`, a dictionary or a flattened bucket, tensors by value or as
CUDA memory to share.

A pickle is a program: it names functions, calls them, and sets what objects have. Here it may name those few that put tensors
together, and nothing else, and set nothing but a bucket's metadata, so that a wicked one cannot do more than a wicked checkpoint.
The worker takes pickles only with --allow-pickled-weights. It is the one place that reads them (`tests/unit/test_no_pickle.py`).
Neighbours: `common.models.weight_sources`, `common.models.buckets`.
"""

import io
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any, Final

import torch
from torch.multiprocessing import reductions

from common.errors import CheckpointError
from common.models.buckets import unpacked

_FAILURES = (
    pickle.UnpicklingError,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def read_pickled(path: Path, *, is_bucket: bool = False) -> dict[str, torch.Tensor]:
    """Read the tensors of a file, which is a flattened bucket if and only if `is_bucket`.

    Raises CheckpointError if it is not what it should be, or names what it may not.
    """
    found = _read(path)
    if (isinstance(found, dict) and found.keys() == _BUCKET) != is_bucket:
        was = "is no" if is_bucket else "is a"
        raise CheckpointError(f"the update {was} flattened bucket, and load_format says otherwise")
    return _bucket(**found) if is_bucket else _named(found)


def _read(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _Unpickler(file).load()
    except _FAILURES as error:
        raise CheckpointError(f"the update cannot be unpickled: {type(error).__name__}: {error}") from error


def _bucket(flattened_tensor: object, metadata: object) -> dict[str, torch.Tensor]:
    if not isinstance(metadata, list) or not all(isinstance(said, _Metadata) for said in metadata):
        raise CheckpointError("the update: metadata must be a list of FlattenedTensorMetadata")
    return unpacked(flattened_tensor, [said.fields for said in metadata])


def _named(found: object) -> dict[str, torch.Tensor]:
    pairs = list(found.items()) if isinstance(found, dict) else found
    if not isinstance(pairs, list | tuple) or not all(map(_is_named_tensor, pairs)):
        raise CheckpointError("the update must be a list of (name, tensor)")
    tensors = dict(pairs)
    if len(tensors) < len(pairs):
        raise CheckpointError("the update has a tensor twice")
    return tensors


def _is_named_tensor(pair: object) -> bool:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        return False
    name, tensor = pair
    return isinstance(name, str) and type(tensor) is torch.Tensor


class _Metadata:
    """What a bucket says of one of its tensors, in place of SGLang's class: anything, until `unpacked` has looked at it."""

    fields: object = None


class _Unpickler(pickle._Unpickler):
    """Finds what is allowed and nothing else. It is the one written in Python, whose opcodes can be replaced."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = _ALLOWED.get((module, name))
        if allowed is None:
            raise pickle.UnpicklingError(f"it may not name {module}.{name}")
        return allowed

    def load_build(self: Any) -> None:
        """Set an object's state. That of a class or function would stay as it was set, for everybody else too."""
        fields = self.stack.pop()
        if type(self.stack[-1]) is not _Metadata:
            raise pickle.UnpicklingError(f"it may not set the state of {type(self.stack[-1]).__name__}")
        self.stack[-1].fields = fields

    dispatch = pickle._Unpickler.dispatch | {pickle.BUILD[0]: load_build}


def _load_storage(data: bytes) -> Any:
    """What `torch.storage._load_from_bytes` is for, which would itself unpickle anything."""
    return torch.load(io.BytesIO(data), weights_only=True)


def _rebuild_parameter(data: torch.Tensor, requires_grad: bool, hooks: object) -> torch.Tensor:
    return data


def _rebuild_cuda_tensor(*parts: Any) -> torch.Tensor:
    """Open another process's CUDA memory; its device may be given by the UUID, as SGLang's trainers do."""
    device = parts[_DEVICE]
    if isinstance(device, str):
        known = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
        if device not in known:
            raise CheckpointError(f"the update is on a GPU that this rank does not see: {device}")
        parts = (*parts[:_DEVICE], known.index(device), *parts[_DEVICE + 1 :])
    tensor: torch.Tensor = reductions.rebuild_cuda_tensor(*parts)  # type: ignore[no-untyped-call]
    return tensor


_DEVICE: Final = 6
"""Which argument of torch's `rebuild_cuda_tensor` is the device."""
_BUCKET: Final = {"flattened_tensor", "metadata"}
_DTYPES: Final = ("bfloat16", "float16", "float32", "float8_e4m3fn", "uint8")
_ALLOWED: Final[dict[tuple[str, str], Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Tensor"): torch.Tensor,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch.nn.parameter", "Parameter"): torch.Tensor,
    ("torch.storage", "TypedStorage"): torch.TypedStorage,
    ("torch.storage", "UntypedStorage"): torch.UntypedStorage,
    ("torch.storage", "_load_from_bytes"): _load_storage,
    ("torch.multiprocessing.reductions", "rebuild_cuda_tensor"): _rebuild_cuda_tensor,
    ("sglang.srt.utils.patch_torch", "_rebuild_cuda_tensor_modified"): _rebuild_cuda_tensor,
    ("sglang.srt.patch_torch", "_rebuild_cuda_tensor_modified"): _rebuild_cuda_tensor,
    ("sglang.srt.weight_sync.tensor_bucket", "FlattenedTensorMetadata"): _Metadata,
    ("sglang.srt.model_executor.model_runner", "FlattenedTensorMetadata"): _Metadata,
    **{("torch", name): getattr(torch, name) for name in _DTYPES},
}
