"""RoPE tables: cosines and sines of every position, computed as transformers computes them.

How a context is stretched (yarn and its like) is left to transformers' own functions, so that it cannot differ from the
trainer's. It knows no attention; `common.kernels.reference.rotary` applies the table.

Shape letters: P positions, d head size.
"""

import torch
from transformers import Qwen3MoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from common.models.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """Angles per position `[d/2]`, float32 on the CPU, and the factor by which cosines and sines are scaled."""
    if config.rope.type == "default":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return 1.0 / (config.rope.theta**exponents), 1.0
    transformers_config = Qwen3MoeConfig(
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters={"rope_type": config.rope.type, "rope_theta": config.rope.theta, **config.rope.options},
    )
    frequencies, scale = ROPE_INIT_FUNCTIONS[config.rope.type](transformers_config, torch.device("cpu"))
    return frequencies, float(scale)


def rotary_tables(
    config: ModelConfig, num_positions: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines `[P, d]` of positions `[0, P)`, each angle in both halves; rounded from float32 to `dtype`."""
    frequencies, scale = inverse_frequencies(config)
    positions_P = torch.arange(num_positions, device=device, dtype=torch.float32)
    angles_Pd = (positions_P[:, None] * frequencies.to(device)).repeat(1, 2)
    return (angles_Pd.cos() * scale).to(dtype), (angles_Pd.sin() * scale).to(dtype)
