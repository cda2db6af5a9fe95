"""Which kernels an engine runs: torch's anywhere, or the fused ones with flashinfer's attention on a GPU; and whether the experts
of an FP8 checkpoint stay float8.

Triton and flashinfer are imported only when they are chosen: an engine on a CPU needs neither.
"""

import logging
from typing import TYPE_CHECKING, NamedTuple

import torch

from common.config import EngineOptions
from common.engine.capacity import LARGEST_GRAPH
from common.errors import UsageError
from common.kernels.attention import AttentionBackend
from common.kernels.interface import FP8_BLOCK, Kernels
from common.kernels.torch_attention import TorchAttention
from common.kernels.torch_kernels import TorchKernels
from common.models.config import ModelConfig
from common.ranks import Rank

if TYPE_CHECKING:
    from common.kernels.flashinfer_attention import FlashinferAttention

log = logging.getLogger(__name__)

_FUSED_DTYPES = (torch.bfloat16, torch.float16)
_FP8_CAPABILITY = (9, 0)
"""From which on a GPU multiplies float8 numbers, and Triton has the kernels' instructions."""


class Backends(NamedTuple):
    """The kernels and the attention of one engine."""

    kernels: Kernels
    attention: AttentionBackend
    flashinfer: "FlashinferAttention | None"
    """The attention again, if it is one that CUDA graphs can be made of."""


def choose_backends(
    options: EngineOptions, config: ModelConfig, dtype: torch.dtype, device: torch.device, rank: Rank = Rank()
) -> Backends:
    """Choose by `--kernels`, `--fp8`, device and dtype. Raises UsageError if what is asked for, or expected, cannot run."""
    obstacle = _obstacle(config, dtype, device, rank)
    if options.kernels == "torch" or (options.kernels == "auto" and obstacle is not None):
        if device.type == "cuda" and obstacle is not None:
            log.warning("running torch's own kernels, which are slow: %s", obstacle)
        _fp8_is_native(options, config, "only the fused kernels multiply float8 numbers")
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
    native_fp8 = _fp8_is_native(options, config, _fp8_obstacle(config, device, rank))
    attention = FlashinferAttention(
        num_heads=len(rank.heads(config.num_attention_heads)),
        num_kv_heads=len(rank.kv_heads(config.num_key_value_heads)),
        head_dim=config.head_dim,
        page_size=options.page_size,
        max_batch_size=min(options.max_running_requests, LARGEST_GRAPH),
        dtype=dtype,
        device=device,
    )
    return Backends(FusedKernels(native_fp8=native_fp8), attention, attention)


def _obstacle(config: ModelConfig, dtype: torch.dtype, device: torch.device, rank: Rank) -> str | None:
    """Why the fused kernels cannot run this model here, or None."""
    if device.type != "cuda":
        return f"there are none for {device.type}"
    if dtype not in _FUSED_DTYPES:
        return f"there are none for {str(dtype).removeprefix('torch.')}"
    if config.head_dim not in (64, 128, 256):
        return f"there is no attention kernel for heads of {config.head_dim}"
    if config.hidden_size % 8 or len(rank.expert_width(config.moe_intermediate_size)) % 8:
        return "the copy engine wants rows of a multiple of 16 bytes"
    return None


def _fp8_is_native(options: EngineOptions, config: ModelConfig, obstacle: str | None) -> bool:
    """Choose by `--fp8`. Raises UsageError if float8 is asked for and something is in its way."""
    if config.quantization_config is None:
        obstacle = "the checkpoint's config has no quantization_config"
    if options.fp8 == "native" and obstacle is not None:
        raise UsageError(f"--fp8 native: {obstacle}")
    if options.fp8 == "auto" and config.quantization_config is not None and obstacle is not None:
        log.info("FP8 experts are dequantised: %s", obstacle)
    return options.fp8 != "dequantised" and obstacle is None


def _fp8_obstacle(config: ModelConfig, device: torch.device, rank: Rank) -> str | None:
    """Why the fused kernels cannot take this rank's experts as float8, or None. The same for all ranks of a worker."""
    quantization = config.quantization_config
    if quantization is not None and quantization.weight_block_size != (FP8_BLOCK, FP8_BLOCK):
        rows, columns = quantization.weight_block_size
        return f"there are no kernels for blocks of {rows} x {columns}"
    if config.hidden_size % FP8_BLOCK:
        return f"a hidden size of {config.hidden_size} is not a number of whole blocks"
    width = len(rank.expert_width(config.moe_intermediate_size))
    if width % FP8_BLOCK:
        return f"a rank's {width} of an expert's width are not a number of whole blocks"
    capability = torch.cuda.get_device_capability(device)
    if capability < _FP8_CAPABILITY:
        return f"the GPU's compute capability is {'.'.join(map(str, capability))}, and 9.0 is needed"
    return None
