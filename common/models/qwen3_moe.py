"""Qwen3-MoE: grouped-query attention with normed queries and keys, and experts in all or some of the layers.

Numerically a twin of transformers' Qwen3MoeForCausalLM. Query, key and value come from one product, gate and up from
another. It knows no request and no page: the step's attention plan and slots are passed on to the kernels. Neighbours:
`common.models.forward` (what it is given), `common.models.weights` (fills it), `common.kernels` (does the work).

Shape letters: T tokens, D hidden size, H query heads, h key/value heads, d head size, E experts, K top-k, I inner
width, P positions, V vocabulary, S sampled positions.
"""

from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from common.kernels import reference
from common.kernels.interface import Kernels
from common.memory.kv_pool import KvPool
from common.models.config import ModelConfig
from common.models.forward import ForwardBatch
from common.models.layers.rotary import rotary_tables
from common.models.weights import Fused, WeightTable

Tables = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of every position, `[P, d]` each."""


class Qwen3Moe(nn.Module):
    """The model with empty weights; `common.models.registry.build_model` returns it filled."""

    def __init__(
        self, config: ModelConfig, num_positions: int, device: torch.device, dtype: torch.dtype, kernels: Kernels
    ) -> None:
        """Allocate the weights on `device`. Positions from `num_positions` on must not occur."""
        super().__init__()
        self.config = config
        self.kernels = kernels
        make = _Maker(device, dtype)
        self.embed_VD = make.matrix(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Layer(config, layer, make, kernels) for layer in range(config.num_hidden_layers))
        self.norm_D = make.norm(config.hidden_size)
        tied = config.tie_word_embeddings
        self.lm_head_VD = self.embed_VD if tied else make.matrix(config.vocab_size, config.hidden_size)
        cos_Pd, sin_Pd = rotary_tables(config, num_positions, device, dtype)
        self.register_buffer("cos_Pd", cos_Pd, persistent=False)
        self.register_buffer("sin_Pd", sin_Pd, persistent=False)

    def forward(self, batch: ForwardBatch, kv_pool: KvPool) -> torch.Tensor:
        """Run the layers, store keys and values, record the routing; returns `[T, D]` after the final norm."""
        tables = (cast(torch.Tensor, self.cos_Pd), cast(torch.Tensor, self.sin_Pd))
        x_TD = F.embedding(batch.token_ids_T, self.embed_VD)
        counts_shape = (len(self.config.moe_layer_ids), self.config.num_experts)
        counts_LE = torch.zeros(counts_shape, dtype=torch.int32, device=x_TD.device)
        delta: torch.Tensor | None = None
        for layer in self.layers:
            x_TD, delta = layer(x_TD, delta, tables, counts_LE, batch, kv_pool)
        return self.kernels.add_norm(x_TD, delta, self.norm_D, self.config.rms_norm_eps)[1]

    def logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """Project hidden states to logits `[S, V]` in the model's dtype."""
        return F.linear(hidden_SD, self.lm_head_VD)

    def weight_table(self) -> WeightTable:
        """Say where each tensor of a checkpoint goes, in the names that the Qwen team and transformers use."""
        targets = {"model.embed_tokens.weight": cast(torch.Tensor, self.embed_VD), "model.norm.weight": self.norm_D}
        fused: dict[str, Fused] = {}
        if not self.config.tie_word_embeddings:
            targets["lm_head.weight"] = self.lm_head_VD
        for index, layer in enumerate(self.layers):
            cast(_Layer, layer).add_weights(f"model.layers.{index}.", targets, fused)
        # Some tools write the tied matrix a second time.
        tolerated = frozenset({"lm_head.weight"} if self.config.tie_word_embeddings else ())
        quantization = self.config.quantization_config
        fp8_block = None if quantization is None else quantization.weight_block_size
        return WeightTable(targets, fused, tolerated, fp8_block)


class _Maker:
    """Makes parameters that are never trained: matrices unset, norms at one, biases at zero."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype

    def matrix(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, device=self._device, dtype=self._dtype), requires_grad=False)

    def norm(self, size: int) -> nn.Parameter:
        return nn.Parameter(torch.ones(size, device=self._device, dtype=self._dtype), requires_grad=False)

    def bias(self, size: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(size, device=self._device, dtype=self._dtype), requires_grad=False)


class _Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, make: _Maker, kernels: Kernels) -> None:
        super().__init__()
        self.eps, self.kernels = config.rms_norm_eps, kernels
        self.input_norm_D = make.norm(config.hidden_size)
        self.attention = _Attention(config, layer, make, kernels)
        self.mlp_norm_D = make.norm(config.hidden_size)
        if layer in config.moe_layer_ids:
            self.mlp: _Experts | _DenseMlp = _Experts(config, config.moe_layer_ids.index(layer), make, kernels)
        else:
            self.mlp = _DenseMlp(config, make)

    def forward(
        self,
        x_TD: torch.Tensor,
        delta: torch.Tensor | None,
        tables: Tables,
        counts_LE: torch.Tensor,
        batch: ForwardBatch,
        kv_pool: KvPool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add what the layer before computed; returns the sum, and what this layer adds to it, which its successor will do."""
        x_TD, normed_TD = self.kernels.add_norm(x_TD, delta, self.input_norm_D, self.eps)
        delta = self.attention(normed_TD, tables, batch, kv_pool)
        x_TD, normed_TD = self.kernels.add_norm(x_TD, delta, self.mlp_norm_D, self.eps)
        return x_TD, cast(torch.Tensor, self.mlp(normed_TD, counts_LE, batch))

    def add_weights(self, prefix: str, targets: dict[str, torch.Tensor], fused: dict[str, Fused]) -> None:
        targets[prefix + "input_layernorm.weight"] = self.input_norm_D
        targets[prefix + "post_attention_layernorm.weight"] = self.mlp_norm_D
        self.attention.add_weights(prefix + "self_attn.", targets)
        self.mlp.add_weights(prefix + "mlp.", targets, fused)


class _Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, make: _Maker, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.layer, self.eps, self.head_dim = layer, config.rms_norm_eps, config.head_dim
        self.head_split = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        qkv_size = sum(self.head_split) * config.head_dim
        self.qkv = make.matrix(qkv_size, config.hidden_size)
        self.out = make.matrix(config.hidden_size, config.num_attention_heads * config.head_dim)
        self.qkv_bias = make.bias(qkv_size) if config.attention_bias else None
        self.out_bias = make.bias(config.hidden_size) if config.attention_bias else None
        self.q_norm_d = make.norm(config.head_dim)
        self.k_norm_d = make.norm(config.head_dim)

    def forward(self, x_TD: torch.Tensor, tables: Tables, batch: ForwardBatch, kv_pool: KvPool) -> torch.Tensor:
        qkv = F.linear(x_TD, self.qkv, self.qkv_bias)
        k_cache, v_cache = kv_pool.layer(self.layer)
        q_THd = self.kernels.norm_rotate_store(
            qkv, self.q_norm_d, self.k_norm_d, self.eps, *tables, batch.positions_T, k_cache, v_cache, batch.slots_T
        )
        out_THd = batch.attention(q_THd, k_cache, v_cache)
        return F.linear(out_THd.flatten(1), self.out, self.out_bias)

    def add_weights(self, prefix: str, targets: dict[str, torch.Tensor]) -> None:
        rows = [num_heads * self.head_dim for num_heads in self.head_split]
        names = [prefix + name for name in ("q_proj", "k_proj", "v_proj")]
        _add_slices(targets, [f"{name}.weight" for name in names], self.qkv, rows)
        targets[prefix + "o_proj.weight"] = self.out
        if self.qkv_bias is not None and self.out_bias is not None:
            _add_slices(targets, [f"{name}.bias" for name in names], self.qkv_bias, rows)
            targets[prefix + "o_proj.bias"] = self.out_bias
        targets[prefix + "q_norm.weight"] = self.q_norm_d
        targets[prefix + "k_norm.weight"] = self.k_norm_d


class _DenseMlp(nn.Module):
    def __init__(self, config: ModelConfig, make: _Maker) -> None:
        super().__init__()
        self.gate_up = make.matrix(2 * config.intermediate_size, config.hidden_size)
        self.down = make.matrix(config.hidden_size, config.intermediate_size)

    def forward(self, x_TD: torch.Tensor, counts_LE: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        return F.linear(reference.silu_and_mul(F.linear(x_TD, self.gate_up)), self.down)

    def add_weights(self, prefix: str, targets: dict[str, torch.Tensor], fused: dict[str, Fused]) -> None:
        width = self.down.shape[1]
        names = [prefix + "gate_proj.weight", prefix + "up_proj.weight"]
        _add_slices(targets, names, self.gate_up, [width, width])
        targets[prefix + "down_proj.weight"] = self.down


class _Experts(nn.Module):
    def __init__(self, config: ModelConfig, moe_layer: int, make: _Maker, kernels: Kernels) -> None:
        super().__init__()
        self.moe_layer, self.norm_topk_prob, self.kernels = moe_layer, config.norm_topk_prob, kernels
        num_experts, width, hidden_size = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_ED = make.matrix(num_experts, hidden_size)
        self.gate_up_E2ID = make.matrix(num_experts, 2 * width, hidden_size)
        self.down_EDI = make.matrix(num_experts, hidden_size, width)

    def forward(self, x_TD: torch.Tensor, counts_LE: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        return self.kernels.experts(
            x_TD,
            self.gate_ED,
            self.gate_up_E2ID,
            self.down_EDI,
            norm_topk_prob=self.norm_topk_prob,
            ids_TK=batch.routing.target(self.moe_layer, len(x_TD)),
            counts_E=counts_LE[self.moe_layer],
            num_tokens=batch.num_tokens,
        )

    def add_weights(self, prefix: str, targets: dict[str, torch.Tensor], fused: dict[str, Fused]) -> None:
        targets[prefix + "gate.weight"] = self.gate_ED
        width = self.down_EDI.shape[2]
        gate_up_names: list[str] = []
        down_names: list[str] = []
        for expert in range(self.gate_ED.shape[0]):
            names = [f"{prefix}experts.{expert}.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")]
            _add_slices(targets, names[:2], self.gate_up_E2ID[expert], [width, width])
            targets[names[2]] = self.down_EDI[expert]
            gate_up_names += names[:2]
            down_names.append(names[2])
        fused[prefix + "experts.gate_up_proj"] = Fused(self.gate_up_E2ID, tuple(gate_up_names))
        fused[prefix + "experts.down_proj"] = Fused(self.down_EDI, tuple(down_names))


def _add_slices(targets: dict[str, torch.Tensor], names: list[str], parameter: torch.Tensor, rows: list[int]) -> None:
    """Cut a fused parameter along its first dimension, one slice a name."""
    targets.update(zip(names, torch.split_with_sizes(parameter, rows), strict=True))
