"""What is sent to a server, as whole bodies made before the clock starts, and what the server says of itself.

    tandem   POST /generate with token ids; rows as int32 JSON, as msgpack, or none
    openai   POST /v1/completions with token ids, which any OpenAI-compatible server answers; no rows

It sends nothing but questions about the server. Neighbours: `online`, `judge` (reads the answers).
"""

import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from common.errors import CheckpointError, UsageError
from common.models.config import load_model_config, resolve_checkpoint
from common.protocol.replies import MSGPACK
from common.server.http import bearer
from deploy.bench.options import BenchError
from deploy.bench.speed.client import Job
from deploy.bench.speed.workloads import RowsForm, make_prompts

Target = Literal["tandem", "openai"]

PATHS: Final[dict[Target, str]] = {"tandem": "/generate", "openai": "/v1/completions"}
_ASK_DEADLINE_S: Final = 60.0


class Server(Struct, frozen=True, kw_only=True):
    """Whom the requests go to. `num_experts` is None where no rows are asked for, or nobody knows."""

    url: str
    target: Target
    api_key: str
    model: str
    """The name that an OpenAI-compatible server gives its model."""
    vocab_size: int
    num_experts: int | None
    has_target_shape: bool
    """Whether it says that it serves the shape that the targets are about, on a GPU."""


class Load(Struct, frozen=True, kw_only=True):
    """Equal requests: so many of them, with prompts of their own."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    form: RowsForm
    stream: bool
    seed: int
    serial: int
    """Unlike that of any other load of the same seed."""


def describe_server(url: str, target: Target, *, api_key: str, model: str, vocab_size: int) -> Server:
    """Ask a server what it serves; `model` (a checkpoint) and `vocab_size`, if they are given, need no asking.

    Raises UsageError if nobody says from where prompts may be drawn, BenchError if the server does not answer.
    """
    url = url.rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"--url {url}: begins with neither http:// nor https://")
    info = _ask(f"{url}/server_info", api_key) if target == "tandem" else {}
    name = str(_find(_ask(f"{url}/v1/models", api_key), "id")) if target == "openai" else ""
    vocab_size = vocab_size or _find_int(info, "vocab_size") or (_vocab_size_of(model) if model else 0)
    if not vocab_size:
        raise UsageError("--vocab-size: the server does not tell it, and no --model was named to look it up")
    shape = (_find(info, "num_hidden_layers"), _find(info, "num_experts"), _find(info, "num_experts_per_tok"))
    return Server(
        url=url,
        target=target,
        api_key=api_key,
        model=name,
        vocab_size=vocab_size,
        num_experts=_find_int(info, "num_experts"),
        has_target_shape=shape == (48, 128, 8) and str(_find(info, "device")).startswith("cuda"),
    )


def make_job(server: Server, load: Load, *, deadline_s: float, background: Load | None = None) -> Job:
    """Write all bodies of a load, and those of another one that runs beside it."""
    return Job(
        url=server.url,
        path=PATHS[server.target],
        headers={
            "Content-Type": "application/json",
            "Accept": MSGPACK if load.form == "msgpack" else "application/json",
            **bearer(server.api_key),
        },
        bodies=make_bodies(server, load),
        background=[] if background is None else make_bodies(server, background),
        deadline_s=deadline_s,
    )


def make_bodies(server: Server, load: Load) -> list[bytes]:
    """Write the body of each request of a load."""
    prompts = make_prompts(
        load.requests, load.prompt_tokens, vocab_size=server.vocab_size, seed=load.seed, serial=load.serial
    ).tolist()
    # A positive int32, whatever the seed is: some servers take no other.
    first_seed = (load.seed * 1_000_003 + load.serial * 1_009) % 2**30
    write = _tandem_body if server.target == "tandem" else _openai_body
    return [msgspec.json.encode(write(server, load, prompt, first_seed + i)) for i, prompt in enumerate(prompts)]


def _tandem_body(_: Server, load: Load, prompt: Sequence[int], seed: int) -> dict[str, Any]:
    rows: dict[RowsForm, dict[str, Any]] = {
        "off": {},
        "int32": {"return_routed_experts": True, "routed_experts_dtype": "int32"},
        "msgpack": {"return_routed_experts": True, "routed_experts_dtype": "auto"},
    }
    return {
        "input_ids": prompt,
        "sampling_params": {
            "max_new_tokens": load.output_tokens,
            "temperature": 1.0,
            "ignore_eos": True,
            "sampling_seed": seed,
        },
        "stream": load.stream,
        **rows[load.form],
    }


def _openai_body(server: Server, load: Load, prompt: Sequence[int], seed: int) -> dict[str, Any]:
    return {
        "model": server.model,
        "prompt": prompt,
        "max_tokens": load.output_tokens,
        "temperature": 1.0,
        "ignore_eos": True,
        "seed": seed,
        "stream": load.stream,
        **({"stream_options": {"include_usage": True}} if load.stream else {}),
    }


def _ask(url: str, api_key: str) -> Any:
    request = urllib.request.Request(url, headers=bearer(api_key))
    try:
        with urllib.request.urlopen(request, timeout=_ASK_DEADLINE_S) as response:
            return msgspec.json.decode(response.read())
    except (OSError, msgspec.DecodeError) as error:
        raise BenchError(f"{url}: {error}") from error


def _vocab_size_of(model: str) -> int:
    try:
        return load_model_config(resolve_checkpoint(model, weights=False)).vocab_size
    except CheckpointError as error:
        raise UsageError(f"--model {model}: {error}") from error


def _find(info: Any, key: str) -> Any:
    """The first value of that name at any depth: a router's account holds those of its workers."""
    if isinstance(info, dict):
        if key in info:
            return info[key]
        info = list(info.values())
    found = (_find(part, key) for part in info) if isinstance(info, list) else ()
    return next((value for value in found if value is not None), None)


def _find_int(info: Any, key: str) -> int | None:
    value = _find(info, key)
    return value if isinstance(value, int) else None
