"""From options to a loaded model: model_type to class, dtype, weights.

It is where the one table of models is; it knows no engine. Neighbours: `common.models.config`, `common.models.weights`.
"""

import torch

from common.config import ModelOptions
from common.errors import CheckpointError
from common.kernels.collectives import Collectives
from common.kernels.interface import Kernels
from common.models.config import ModelConfig, resolve_checkpoint
from common.models.forward import MoeModel
from common.models.qwen3_moe import Qwen3Moe
from common.models.weight_files import load_weights
from common.models.weights import fill_randomly

_MODELS = {"qwen3_moe": Qwen3Moe}
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def resolve_dtype(config: ModelConfig, options: ModelOptions) -> torch.dtype:
    """Type of weights, activations and KV pool: `--dtype`, or the checkpoint's for auto.

    Raises CheckpointError if the checkpoint names none either.
    """
    name = config.dtype if options.dtype == "auto" else options.dtype
    if name is None:
        raise CheckpointError(f"{options.model}: config.json has neither dtype nor torch_dtype; name one with --dtype")
    return _DTYPES[name]


def build_model(
    config: ModelConfig,
    options: ModelOptions,
    device: torch.device,
    kernels: Kernels,
    collectives: Collectives | None = None,
) -> MoeModel:
    """Make a rank's part of the model that `config` describes on `device` and fill its weights; all of it if it has no mates.

    It takes positions up to the longer of `options.context_tokens` and the checkpoint's own context. Raises
    CheckpointError if the checkpoint does not fit its config.
    """
    num_positions = max(options.context_tokens, config.max_position_embeddings)
    collectives = collectives or Collectives.alone()
    model = _MODELS[config.model_type](
        config, num_positions, device, resolve_dtype(config, options), kernels, collectives
    )
    if options.load_format == "dummy":
        fill_randomly(model.weight_table(), device)
    else:
        load_weights(model.weight_table(), resolve_checkpoint(options.model))
    return model
