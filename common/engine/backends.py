"""Which kernels an engine runs: torch's anywhere, or the fused ones with flashinfer's attention on a GPU.

Triton and flashinfer are imported only when they are chosen: an engine on a CPU needs neither.
"""

import logging
from typing import TYPE_CHECKING, NamedTuple

import torch

from common.config import EngineOptions
from common.engine.capacity import LARGEST_GRAPH
from common.errors import UsageError
from common.kernels.attention import AttentionBackend
from common.kernels.interface import Kernels
from common.kernels.torch_attention import TorchAttention
from common.kernels.torch_kernels import TorchKernels
from common.models.config import ModelConfig

if TYPE_CHECKING:
    from common.kernels.flashinfer_attention import FlashinferAttention

log = logging.getLogger(__name__)

_FUSED_DTYPES = (torch.bfloat16, torch.float16)


class Backends(NamedTuple):
    """The kernels and the attention of one engine."""

    kernels: Kernels
    attention: AttentionBackend
    flashinfer: "FlashinferAttention | None"
    """The attention again, if it is one that CUDA graphs can be made of."""


def choose_backends(options: EngineOptions, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Backends:
    """Choose by `--kernels`, device and dtype. Raises UsageError if fused kernels are asked for, or expected, and cannot run."""
    obstacle = _obstacle(config, dtype, device)
    if options.kernels == "torch" or (options.kernels == "auto" and obstacle is not None):
        if device.type == "cuda" and obstacle is not None:
            log.warning("running torch's own kernels, which are slow: %s", obstacle)
        return Backends(TorchKernels(), TorchAttention(), None)
    if obstacle is not None:
        raise UsageError(f"--kernels fused: {obstacle}")
    try:
        from common.kernels.flashinfer_attention import FlashinferAttention
        from common.kernels.fused_kernels import FusedKernels
    except ImportError as error:
        raise UsageError(
            f"--kernels {options.kernels}: {error.name or error} is not installed;"
            " `pip install -e '.[gpu]'` installs what GPUs need, --kernels torch runs without"
        ) from error
    attention = FlashinferAttention(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        page_size=options.page_size,
        max_batch_size=min(options.max_running_requests, LARGEST_GRAPH),
        dtype=dtype,
        device=device,
    )
    return Backends(FusedKernels(), attention, attention)


def _obstacle(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the fused kernels cannot run this model here, or None."""
    if device.type != "cuda":
        return f"there are none for {device.type}"
    if dtype not in _FUSED_DTYPES:
        return f"there are none for {str(dtype).removeprefix('torch.')}"
    if config.head_dim not in (64, 128, 256):
        return f"there is no attention kernel for heads of {config.head_dim}"
    if config.hidden_size % 8 or config.moe_intermediate_size % 8:
        return "the copy engine wants rows of a multiple of 16 bytes"
    return None
