"""Tensors in safetensors files, by their names: a checkpoint's folder, or one file.

Neighbours: `common.models.weights` (what they are matched with), `common.models.config` (reads the rest of a folder).
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from common.errors import CheckpointError
from common.models.weight_table import Part, WeightTable
from common.models.weights import Header, Match, match

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class FileWeights:
    """A folder, which must have all of the model's tensors, or a file, which need not. Each call opens the files anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_partial = path.is_file()
        self._where = "the update" if self._is_partial else f"{path}: the checkpoint"

    def check(self, table: WeightTable) -> int:
        """Compare the headers with the table, as `match` does; returns how many of the model's tensors are missing."""
        with _open_files(self._path) as files:
            return len(self._match(table, files).missing)

    def load(self, table: WeightTable) -> frozenset[str]:
        """Check once more, and copy what the rank holds into the table's views; returns the tensors that were there.

        Raises CheckpointError if a file cannot be read or does not fit, and OSError.
        """
        with _open_files(self._path) as files:
            found = self._match(table, files)
            found.log_conversions(files.headers, self._where)
            for name in found.reads:
                found.fill(name, files.read)
            return found.taken

    def _match(self, table: WeightTable, files: "_OpenFiles") -> Match:
        return match(table, files.headers, self._where, is_partial=self._is_partial)


def load_weights(table: WeightTable, folder: Path) -> None:
    """Fill all of a model from a checkpoint's folder. Raises CheckpointError before the first byte is read if it does not fit."""
    FileWeights(folder).load(table)


class _OpenFiles:
    """Files that are open, and which of them has which tensor."""

    def __init__(self, files: Mapping[str, Any]) -> None:
        self._files = files
        self.headers = {name: _header(file.get_slice(name)) for name, file in files.items()}

    def read(self, name: str, part: Part) -> torch.Tensor:
        """A part of a tensor, on the host. Raises CheckpointError."""
        try:
            tensor: torch.Tensor = self._files[name].get_slice(name)[part]
        except SafetensorError as error:
            raise CheckpointError(f"{name}: {error}") from error
        return tensor


@contextmanager
def _open_files(path: Path) -> Iterator[_OpenFiles]:
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        is_folder = not path.is_file()
        for file in _files_of(path) if is_folder else [path]:
            try:
                opened = stack.enter_context(safe_open(file, framework="pt", device="cpu"))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file if is_folder else 'the update'}: {error}") from error
            for name in opened.keys():  # noqa: SIM118  (safe_open is not a mapping)
                if name in files:
                    raise CheckpointError(f"{path}: tensor {name} is in two files")
                files[name] = opened
        yield _OpenFiles(files)


def _header(stored: Any) -> Header:
    return Header(tuple(stored.get_shape()), stored.get_dtype())


def _files_of(folder: Path) -> list[Path]:
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
