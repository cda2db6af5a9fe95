"""Small checkpoints of every shape that the tests serve."""

from pathlib import Path
from typing import Any

from deploy.demo_model import write_demo_model

_SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "mlp_only_layers": [],
    "moe_intermediate_size": 24,
    "max_position_embeddings": 1024,
}

SHAPES: dict[str, dict[str, Any]] = {
    # Experts in every layer, groups of two query heads.
    "plain": _SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2, "norm_topk_prob": True, "seed": 1},
    # Experts in layers 1 and 5: the even ones are dense by step, layer 3 by name. Tied embeddings, biases, yarn.
    "mixed": _SMALL
    | {
        "num_hidden_layers": 6,
        "mlp_only_layers": [3],
        "decoder_sparse_step": 2,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "norm_topk_prob": False,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 256,
        },
        "seed": 2,
    },
    # More experts than a byte can name.
    "wide": _SMALL
    | {"hidden_size": 64, "num_experts": 300, "num_experts_per_tok": 8, "moe_intermediate_size": 8, "seed": 3},
}

ON_GPU: dict[str, Any] = _SMALL | {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "moe_intermediate_size": 64,
    "initializer_range": 0.1,
    "seed": 4,
}
"""A shape that the fused kernels take."""


def make_checkpoint(folder: Path, shape: str) -> Path:
    """Write the checkpoint of that shape into `folder` and return it."""
    write_demo_model(folder, **SHAPES[shape])
    return folder
