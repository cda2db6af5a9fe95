"""The model that the targets are about, without its weights: a folder of config and tokenizer for `--load-format dummy`.

`python -m deploy.bench shape FOLDER` writes it for other commands; `--model qwen3-30b-a3b-shape` of the speed benchmarks
makes one in the cache, and `--model qwen3-30b-a3b-fp8-shape` one of its FP8 checkpoint. The tokenizer is the demo model's,
so only ids below its own vocabulary have a text.

Neighbours: `deploy.demo_model` (the tokenizer), `offline` and `online` (use it).
"""

import os
import tempfile
from pathlib import Path
from typing import Any, Final

import msgspec

from common.errors import UsageError
from deploy.demo import REPOSITORY
from deploy.demo_model import train_tokenizer

SHAPE_NAME: Final = "qwen3-30b-a3b-shape"
FP8_SHAPE_NAME: Final = "qwen3-30b-a3b-fp8-shape"

CONFIG: Final[dict[str, Any]] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
    "attention_bias": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 1,
}
_FP8: Final = {
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
}
_CONFIGS: Final = {SHAPE_NAME: CONFIG, FP8_SHAPE_NAME: CONFIG | _FP8}


def main(argv: list[str]) -> int:
    """Write the folder that the one argument names. Raises UsageError."""
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UsageError("usage: python -m deploy.bench shape FOLDER")
    folder = Path(argv[0]).expanduser()
    try:
        write_shape(folder)
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror}") from error
    print(folder)
    return 0


def write_shape(folder: Path, config: dict[str, Any] = CONFIG) -> None:
    """Write config.json and the tokenizer's files into `folder`, made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer().save_pretrained(folder)
    # Last, since it is what tells others that there is a model; and whole or not at all.
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        file.write(msgspec.json.format(msgspec.json.encode(config), indent=2))
    Path(file.name).chmod(0o644)
    Path(file.name).rename(folder / "config.json")


def resolve_model(model: str) -> str:
    """Give the folder of a shape for its name, written if it is not there, and any other model as it is."""
    if model not in _CONFIGS:
        return model
    folder = Path(os.environ.get("XDG_CACHE_HOME") or REPOSITORY / ".cache") / "tandem" / model
    write_shape(folder, _CONFIGS[model])
    return str(folder)
