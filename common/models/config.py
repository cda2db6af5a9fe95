"""A checkpoint's config as one frozen struct, and where the checkpoint is.

The json is read here and not by transformers: the frontend reads it too and wants no torch, and what is not implemented
must be refused and not ignored. The spellings that transformers has written over time are all read. It knows no tensor;
neighbours: `common.models.weights` reads the rest of the folder, `common.models.layers.rotary` computes what the rope
fields say.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import msgspec
from huggingface_hub import snapshot_download
from msgspec import Meta, Struct

from common.errors import CheckpointError, UsageError

_ROPE_OPTIONS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""Types of rotary positions that are implemented, and the options that each cannot do without."""
_DTYPES = ("bfloat16", "float16", "float32")
_Size = Annotated[int, Meta(ge=1)]
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "tokenizer*")


class RopeConfig(Struct, frozen=True, kw_only=True):
    """Rotary positions: the base, and how a longer context than the trained one is reached."""

    type: str
    theta: float
    options: dict[str, float | int | bool]
    """What the type needs besides, by transformers' names: `factor`, `original_max_position_embeddings` and so on."""


class Fp8Config(Struct, frozen=True, kw_only=True):
    """Matrices are stored as float8 numbers with a scale for each block. The one way to quantise that is read.

    Which matrices they are is in the files' headers, so `modules_to_not_convert` is not read.
    """

    quant_method: Literal["fp8"]
    weight_block_size: tuple[_Size, _Size]
    """Rows and columns of a block."""
    fmt: Literal["e4m3"] = "e4m3"
    activation_scheme: Literal["dynamic"] = "dynamic"


class ModelConfig(Struct, frozen=True, kw_only=True):
    """What a checkpoint's config says of the model; field names are those of config.json where there is one."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    """Width of the dense layers."""
    moe_intermediate_size: int
    """Width of one expert."""
    num_experts: int
    top_k: int
    norm_topk_prob: bool
    moe_layer_ids: tuple[int, ...]
    """The decoder layers that have experts, ascending; row L of the routed experts is `moe_layer_ids[L]`."""
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool
    max_position_embeddings: int
    """Longest context that the checkpoint names, in tokens."""
    rope: RopeConfig
    eos_token_ids: tuple[int, ...]
    """Ascending; empty if the checkpoint names none."""
    dtype: str | None
    """bfloat16, float16 or float32; None if the checkpoint names none."""
    quantization_config: Fp8Config | None
    """None if the weights are stored as they are computed with."""


def load_model_config(folder: Path) -> ModelConfig:
    """Read config.json and, if it is there, generation_config.json.

    Raises CheckpointError, naming the field, if one is missing, has a wrong type, or asks for what is not implemented.
    """
    fields = _Fields(folder / "config.json")
    fields.refuse_unless("model_type", fields.required("model_type", str) == "qwen3_moe", "only qwen3_moe is served")
    fields.refuse_unless("hidden_act", fields.optional("hidden_act", str, "silu") == "silu", "only silu is implemented")
    sliding = fields.optional("use_sliding_window", bool, False)
    fields.refuse_unless("use_sliding_window", not sliding, "not implemented")
    hidden_size = fields.required("hidden_size", int, ge=1)
    num_layers = fields.required("num_hidden_layers", int, ge=1)
    num_heads = fields.required("num_attention_heads", int, ge=1)
    num_kv_heads = fields.required("num_key_value_heads", int, ge=1)
    head_dim = fields.optional("head_dim", int, hidden_size // num_heads)
    num_experts = fields.required("num_experts", int, "num_local_experts", ge=1)
    top_k = fields.required("num_experts_per_tok", int, ge=1)
    moe_layer_ids = _moe_layer_ids(fields, num_layers)
    dtype = fields.optional("dtype", str, None, "torch_dtype")
    fields.refuse_unless("num_key_value_heads", num_heads % num_kv_heads == 0, "does not divide num_attention_heads")
    fields.refuse_unless("head_dim", head_dim > 0 and head_dim % 2 == 0, "must be even")
    fields.refuse_unless("num_experts_per_tok", top_k <= num_experts, "more than num_experts")
    fields.refuse_unless("dtype", dtype is None or dtype in _DTYPES, f"not one of {', '.join(_DTYPES)}")
    fields.refuse_unless("mlp_only_layers", bool(moe_layer_ids), "leaves no layer with experts")
    max_position_embeddings = fields.required("max_position_embeddings", int, ge=1)
    return ModelConfig(
        model_type="qwen3_moe",
        vocab_size=fields.required("vocab_size", int, ge=1),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.required("intermediate_size", int, ge=1),
        moe_intermediate_size=fields.required("moe_intermediate_size", int, ge=1),
        num_experts=num_experts,
        top_k=top_k,
        norm_topk_prob=fields.optional("norm_topk_prob", bool, False),
        moe_layer_ids=moe_layer_ids,
        rms_norm_eps=fields.optional("rms_norm_eps", float, 1e-6),
        tie_word_embeddings=fields.optional("tie_word_embeddings", bool, False),
        attention_bias=fields.optional("attention_bias", bool, False),
        max_position_embeddings=max_position_embeddings,
        rope=_rope(fields, max_position_embeddings),
        eos_token_ids=_eos_token_ids(folder, fields),
        dtype=dtype,
        quantization_config=fields.optional("quantization_config", Fp8Config, None),
    )


def resolve_checkpoint(path_or_id: str, *, weights: bool = True) -> Path:
    """Find a checkpoint's folder: a local one, or a snapshot of a hub repository, downloaded if it is not cached.

    `weights=False` leaves the weights out (a frontend, random weights). What looks like a path never goes to the hub.
    Raises UsageError in one line if there is no such folder, or if the hub cannot be reached or does not have it.
    """
    path = Path(os.path.expanduser(path_or_id))
    if path_or_id and path.is_dir():
        return path
    if path_or_id and path.exists():
        raise UsageError(f"model {path_or_id}: not a folder")
    if not path_or_id or path_or_id[0] in "/.~" or path_or_id.count("/") > 1:
        raise UsageError(f"model {path_or_id or repr('')}: no such folder")
    patterns = [*_SMALL_FILES, *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(path_or_id, allow_patterns=patterns, ignore_patterns=["*/*"], etag_timeout=5.0))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"model {path_or_id}: no such folder here, and the hub did not give it: {reason}") from error


class _Fields:
    """A json object's fields, each read with its type; errors name the file and the field."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values = _read_json(path)

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def required(self, name: str, kind: Any, other_name: str = "", *, ge: int | None = None) -> Any:
        """A field that must be there, under either of its names."""
        value = self.optional(name, kind, None, other_name)
        self.refuse_unless(name, value is not None, "missing")
        self.refuse_unless(name, ge is None or value >= ge, f"must be at least {ge}")
        return value

    def optional(self, name: str, kind: Any, default: Any, other_name: str = "") -> Any:
        """A field that may be missing or null; then `default`, which is transformers' own."""
        spelling = name if name in self or other_name not in self else other_name
        if name in self and other_name in self:
            self.refuse_unless(name, self.values[name] == self.values[other_name], f"{other_name} says otherwise")
        if spelling not in self:
            return default
        try:
            return msgspec.convert(self.values[spelling], kind)
        except msgspec.ValidationError as error:
            raise CheckpointError(f"{self.path}: {spelling}: {error}") from error

    def refuse_unless(self, name: str, holds: bool, why: str) -> None:
        """Raise CheckpointError naming the field, and its value if it has one."""
        if not holds:
            value = f" = {msgspec.json.encode(self.values[name]).decode()}" if name in self else ""
            raise CheckpointError(f"{self.path}: {name}{value}: {why}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _moe_layer_ids(fields: _Fields, num_layers: int) -> tuple[int, ...]:
    dense = set(fields.optional("mlp_only_layers", tuple[int, ...], ()))
    step = fields.optional("decoder_sparse_step", int, 1)
    fields.refuse_unless("decoder_sparse_step", step >= 1, "must be at least 1")
    return tuple(layer for layer in range(num_layers) if layer not in dense and (layer + 1) % step == 0)


def _rope(fields: _Fields, max_position_embeddings: int) -> RopeConfig:
    """Read `rope_parameters`, or the older pair `rope_theta` and `rope_scaling`."""
    name = "rope_parameters" if "rope_parameters" in fields else "rope_scaling"
    # transformers takes rope_scaling then, and silently forgets the base that rope_parameters names.
    both = "rope_parameters" in fields and "rope_scaling" in fields
    fields.refuse_unless(name, not both, "rope_scaling is there too; keep one of them")
    options = dict(fields.optional(name, dict[str, Any], {}))
    old_type = options.pop("type", "default")
    rope_type = options.pop("rope_type", None) or old_type
    theta = options.pop("rope_theta", None) or fields.optional("rope_theta", float, 10_000.0)
    partial = options.pop("partial_rotary_factor", None) or fields.optional("partial_rotary_factor", float, 1.0)
    options = {key: value for key, value in options.items() if value is not None}
    types = ", ".join(_ROPE_OPTIONS)
    fields.refuse_unless(name, rope_type in _ROPE_OPTIONS, f"rope_type {rope_type!r} is not one of {types}")
    fields.refuse_unless(name, partial == 1.0, "partial_rotary_factor is not implemented")
    for needed in _ROPE_OPTIONS[rope_type]:
        fields.refuse_unless(name, needed in options, f"{needed} is missing")
    if rope_type in ("yarn", "llama3"):
        outer = fields.optional("original_max_position_embeddings", int, None)
        trained = outer or options.get("original_max_position_embeddings", max_position_embeddings)
        options["original_max_position_embeddings"] = trained
    try:
        return RopeConfig(
            type=cast(str, rope_type),
            theta=msgspec.convert(theta, float),
            options=msgspec.convert(options, dict[str, float | int | bool]),
        )
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{fields.path}: {name}: {error}") from error


def _eos_token_ids(folder: Path, fields: _Fields) -> tuple[int, ...]:
    """The union of both files' ids: a chat model's config.json often names one and its generation_config.json two."""
    sources = [fields]
    if (folder / "generation_config.json").exists():
        sources.append(_Fields(folder / "generation_config.json"))
    ids: set[int] = set()
    for source in sources:
        value = source.optional("eos_token_id", int | tuple[int, ...], ())
        ids |= {value} if isinstance(value, int) else set(value)
    return tuple(sorted(ids))
