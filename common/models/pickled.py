"""Named tensors as trainers pickle them: a list of `(name, tensor)` or a dictionary, tensors by value or as CUDA memory to share.

A pickle is a program: it names functions and calls them. Here it may name those few that put tensors together, and nothing else,
so that a wicked one cannot do more than a wicked checkpoint. The worker takes pickles only with --allow-pickled-weights. It is the
one place that reads them (`tests/unit/test_no_pickle.py`). Neighbour: `common.models.weight_sources`.
"""

import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, Final

import torch
from torch.multiprocessing import reductions

from common.errors import CheckpointError

_FAILURES = (
    pickle.UnpicklingError,
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


def read_pickled(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a file. Raises CheckpointError if it is not what it should be, or names what it may not."""
    try:
        with path.open("rb") as file:
            found = _Unpickler(file).load()
        pairs = list(found.items() if isinstance(found, dict) else found)
        tensors = dict(pairs)
    except _FAILURES as error:
        raise CheckpointError(f"the update cannot be unpickled: {type(error).__name__}: {error}") from error
    if len(tensors) < len(pairs):
        raise CheckpointError("the update has a tensor twice")
    if not all(isinstance(name, str) and type(tensor) is torch.Tensor for name, tensor in pairs):
        raise CheckpointError("the update must be a list of (name, tensor)")
    return tensors


class _Unpickler(pickle.Unpickler):
    """Finds what is allowed and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = _ALLOWED.get((module, name))
        if allowed is None:
            raise pickle.UnpicklingError(f"it may not name {module}.{name}")
        return allowed


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
_DTYPES: Final = ("bfloat16", "float16", "float32", "float8_e4m3fn")
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
    **{("torch", name): getattr(torch, name) for name in _DTYPES},
}
