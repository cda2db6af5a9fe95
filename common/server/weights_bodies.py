"""Bodies of a trainer's requests: their fields, by SGLang's names, and tensors, which may be large.

Fields that are not known say nothing. Neighbour: `weights_api`.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
from aiohttp import web
from msgspec import Meta, Struct

from common.errors import DeadlineExceeded, RequestError
from common.messages import ErrorReport, ReportedError
from common.orders import PauseMode, PickledWeights

Body = TypeVar("Body", bound=Struct)


class PauseBody(Struct):
    """Of /pause_generation."""

    mode: PauseMode = "abort"


class UpdateBody(Struct, kw_only=True):
    """What all updates may say. The cache is always flushed."""

    weight_version: str | None = None
    flush_cache: bool | None = None
    abort_all_requests: bool | None = None


class FromFiles(UpdateBody, kw_only=True):
    """What an update by safetensors may say."""

    load_format: Literal["auto"] | None = None


class FromTrainer(UpdateBody, kw_only=True):
    """What an update by a trainer's own tensors may say."""

    load_format: Literal["auto", "flattened_bucket"] | None = None

    @property
    def is_bucket(self) -> bool:
        """Whether the tensors lie end to end in one."""
        return self.load_format == "flattened_bucket"


class FromDisk(FromFiles, kw_only=True):
    """Of /update_weights_from_disk: a folder that the worker can see."""

    model_path: str


class FromDistributed(FromTrainer, kw_only=True):
    """Of /update_weights_from_distributed: what will be broadcast, in order; types as torch calls them."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[Annotated[int, Meta(ge=0, le=2**63 - 1)]]]
    group_name: str = "weight_update_group"


class FromPickles(FromTrainer, kw_only=True):
    """Of /update_weights_from_tensor, in base64: one pickle, or one for each rank."""

    serialized_named_tensors: list[bytes]


class InitGroup(Struct, kw_only=True):
    """Of /init_weights_update_group; rank 0 is the trainer."""

    master_address: str
    master_port: Annotated[int, Meta(ge=1, le=65535)]
    rank_offset: Annotated[int, Meta(ge=1, le=2**20)]
    world_size: Annotated[int, Meta(ge=2, le=2**20)]
    group_name: str = "weight_update_group"
    backend: Literal["nccl", "gloo"] = "nccl"


class DestroyGroup(Struct):
    """Of /destroy_weights_update_group."""

    group_name: str = "weight_update_group"


class RenameBody(Struct, kw_only=True):
    """Of /update_weight_version; either name of the version will do, and all requests are ended unless it says no."""

    new_version: str | None = None
    weight_version: str | None = None
    abort_all_requests: bool | None = None


class MemoryFile:
    """Bytes in this process's memory that others can read as a file, until it is closed or this process ends."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.memfd_create("weights"), "wb", buffering=0)
        self.path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"

    def write(self, data: bytes) -> None:
        """Append."""
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]

    def __enter__(self) -> "MemoryFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def decode(body: bytes, kind: type[Body]) -> Body:
    """Read a body; fields that are not known say nothing. Raises RequestError."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        what, _, where = str(error).partition(" - at `$.")
        raise RequestError(where.rstrip("`") or "body", what) from error


def folder_of(path: str) -> Path:
    """Find a checkpoint's folder. Raises RequestError."""
    try:
        folder = Path(path).resolve(strict=True)
    except (OSError, ValueError) as error:
        raise RequestError("model_path", f"{path!r}: {error}") from error
    if not folder.is_dir():
        raise RequestError("model_path", f"{path!r} is no folder")
    return folder


def options_of(request: web.Request) -> FromFiles:
    """The options of an update whose body is the tensors: they are in the query."""
    try:
        return msgspec.convert(dict(request.query), FromFiles, strict=False)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$.")
        raise RequestError(where.rstrip("`") or "query", what) from error


def stored_pickles(pieces: Sequence[bytes], stack: ExitStack) -> tuple[FromPickles, PickledWeights]:
    """Read a body of pickles and store each in a file that `stack` keeps. Takes long for large bodies. Raises RequestError."""
    asked = decode(b"".join(pieces), FromPickles)
    files = [stack.enter_context(MemoryFile()) for _ in asked.serialized_named_tensors]
    for file, pickled in zip(files, asked.serialized_named_tensors, strict=True):
        file.write(pickled)
    return asked, PickledWeights(tuple(file.path for file in files), asked.is_bucket)


@asynccontextmanager
async def receiving(request: web.Request, *, max_bytes: int, deadline_s: float) -> AsyncIterator[AsyncIterator[bytes]]:
    """A body that may be large, piece by piece. Raises ReportedError with status 413, and DeadlineExceeded."""

    async def chunks() -> AsyncIterator[bytes]:
        announced, received = request.content_length or 0, 0
        while max(announced, received) <= max_bytes:
            chunk = await request.content.readany()
            if not chunk:
                return
            received += len(chunk)
            yield chunk
        message = f"the body is larger than --max-weights-bytes {max_bytes}"
        raise ReportedError(ErrorReport(status=413, message=message, code="invalid_request"))

    try:
        async with asyncio.timeout(deadline_s):
            yield chunks()
    except TimeoutError as error:
        raise DeadlineExceeded(f"the body was not here within {deadline_s:g} s", stage="weights") from error
