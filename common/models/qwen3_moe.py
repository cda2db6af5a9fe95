"""Qwen3-MoE: grouped-query attention with normed queries and keys, and experts in all or some of the layers.

On a worker of several ranks each has its part: attention heads and vocabulary are split within the attention group, the experts
over all ranks (`common.ranks`). What a rank computes of an activation is added up with the others' parts before the next norm.

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
from common.kernels.collectives import Collectives, Routed
from common.kernels.interface import FP8_BLOCK, ExpertMatrices, Kernels, Lanes
from common.memory.kv_pool import KvPool
from common.models.config import ModelConfig
from common.models.forward import ForwardBatch
from common.models.layers.rotary import rotary_tables
from common.models.weight_table import Fused, Target, WeightTable, columns_of, rows_of, whole
from common.ranks import Span

Tables = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of every position, `[P, d]` each."""


class Qwen3Moe(nn.Module):
    """The model with empty weights; `common.models.registry.build_model` returns it filled."""

    def __init__(
        self,
        config: ModelConfig,
        num_positions: int,
        device: torch.device,
        dtype: torch.dtype,
        kernels: Kernels,
        collectives: Collectives,
    ) -> None:
        """Allocate the rank's weights on `device`. Positions from `num_positions` on must not occur."""
        super().__init__()
        self.config = config
        self.kernels, self.collectives = kernels, collectives
        make = _Maker(device, dtype)
        self.embed_VD = make.matrix(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            _Layer(config, layer, make, kernels, collectives) for layer in range(config.num_hidden_layers)
        )
        self.norm_D = make.norm(config.hidden_size)
        self.vocabulary = collectives.rank.vocabulary(config.vocab_size)
        # Where it does not come out even, the last ranks of a group have less than the first.
        self.missing_vocabulary = len(collectives.rank.of.rank(0).vocabulary(config.vocab_size)) - len(self.vocabulary)
        if config.tie_word_embeddings:
            self.lm_head_VD: torch.Tensor = self.embed_VD[self.vocabulary.start : self.vocabulary.stop]
        else:
            self.lm_head_VD = make.matrix(len(self.vocabulary), config.hidden_size)
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
        return self.collectives.add_norm(self.kernels, x_TD, delta, self.norm_D, self.config.rms_norm_eps)[1]

    def logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """Project hidden states to logits `[S, V]` in the model's dtype, on every rank of the group."""
        logits_SV = F.linear(hidden_SD, self.lm_head_VD)
        if self.missing_vocabulary:
            logits_SV = F.pad(logits_SV, (0, self.missing_vocabulary))
        return self.collectives.gather_vocabulary(logits_SV)[:, : self.config.vocab_size].contiguous()

    def tensors(self) -> list[torch.Tensor]:
        """Weights, and the tables of positions."""
        return [*self.parameters(), *self.buffers()]

    def weight_table(self) -> WeightTable:
        """Say where each tensor of a checkpoint goes, in the names that the Qwen team and transformers use."""
        targets = {"model.embed_tokens.weight": whole(self.embed_VD), "model.norm.weight": whole(self.norm_D)}
        fused: dict[str, Fused] = {}
        if not self.config.tie_word_embeddings:
            head = ["lm_head.weight"]
            targets |= rows_of(head, self.lm_head_VD, [self.config.vocab_size], [self.vocabulary])
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

    def experts(self, num: int, rows: int, columns: int, *, fp8: bool) -> tuple[nn.Parameter, nn.Parameter | None]:
        """A matrix for each expert, and, of float8 numbers, the scales of their blocks."""
        if not fp8:
            return self.matrix(num, rows, columns), None
        shape = num, rows // FP8_BLOCK, columns // FP8_BLOCK
        weight = torch.empty((num, rows, columns), device=self._device, dtype=torch.float8_e4m3fn)
        scale = torch.empty(shape, device=self._device, dtype=torch.float32)
        return nn.Parameter(weight, requires_grad=False), nn.Parameter(scale, requires_grad=False)

    def norm(self, size: int) -> nn.Parameter:
        return nn.Parameter(torch.ones(size, device=self._device, dtype=self._dtype), requires_grad=False)

    def bias(self, size: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(size, device=self._device, dtype=self._dtype), requires_grad=False)


class _Layer(nn.Module):
    def __init__(
        self, config: ModelConfig, layer: int, make: _Maker, kernels: Kernels, collectives: Collectives
    ) -> None:
        super().__init__()
        self.eps, self.kernels, self.collectives = config.rms_norm_eps, kernels, collectives
        self.input_norm_D = make.norm(config.hidden_size)
        self.attention = _Attention(config, layer, make, kernels, collectives)
        self.mlp_norm_D = make.norm(config.hidden_size)
        if layer in config.moe_layer_ids:
            moe_layer = config.moe_layer_ids.index(layer)
            self.mlp: _Experts | _DenseMlp = _Experts(config, moe_layer, make, kernels, collectives)
        else:
            self.mlp = _DenseMlp(config, make, collectives)

    def forward(
        self,
        x_TD: torch.Tensor,
        delta: torch.Tensor | None,
        tables: Tables,
        counts_LE: torch.Tensor,
        batch: ForwardBatch,
        kv_pool: KvPool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add what the layer before computed; returns the sum, and what this layer adds to it, which its successor will do.

        What is to be added is this rank's part; those of its attention group are added up when it is.
        """
        x_TD, normed_TD = self.collectives.add_norm(self.kernels, x_TD, delta, self.input_norm_D, self.eps)
        delta = self.attention(normed_TD, tables, batch, kv_pool)
        x_TD, normed_TD = self.collectives.add_norm(self.kernels, x_TD, delta, self.mlp_norm_D, self.eps)
        return x_TD, cast(torch.Tensor, self.mlp(normed_TD, counts_LE, batch))

    def add_weights(self, prefix: str, targets: dict[str, Target], fused: dict[str, Fused]) -> None:
        targets[prefix + "input_layernorm.weight"] = whole(self.input_norm_D)
        targets[prefix + "post_attention_layernorm.weight"] = whole(self.mlp_norm_D)
        self.attention.add_weights(prefix + "self_attn.", targets)
        self.mlp.add_weights(prefix + "mlp.", targets, fused)


class _Attention(nn.Module):
    def __init__(
        self, config: ModelConfig, layer: int, make: _Maker, kernels: Kernels, collectives: Collectives
    ) -> None:
        super().__init__()
        self.kernels, self.collectives = kernels, collectives
        self.layer, self.eps = layer, config.rms_norm_eps
        heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
        self.qkv_sizes = [num_heads * config.head_dim for num_heads in heads]
        rank = collectives.rank
        kv_heads = rank.kv_heads(config.num_key_value_heads)
        self.qkv_spans = [
            Span(own.start * config.head_dim, own.stop * config.head_dim)
            for own in (rank.heads(config.num_attention_heads), kv_heads, kv_heads)
        ]
        qkv_size = sum(map(len, self.qkv_spans))
        self.qkv = make.matrix(qkv_size, config.hidden_size)
        self.out = make.matrix(config.hidden_size, len(self.qkv_spans[0]))
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
        # The bias is there once in the sum.
        bias = self.out_bias if self.collectives.rank.is_leader else None
        return F.linear(out_THd.flatten(1), self.out, bias)

    def add_weights(self, prefix: str, targets: dict[str, Target]) -> None:
        names = [prefix + name for name in ("q_proj", "k_proj", "v_proj")]
        targets |= rows_of([f"{name}.weight" for name in names], self.qkv, self.qkv_sizes, self.qkv_spans)
        targets[prefix + "o_proj.weight"] = columns_of(self.out, self.qkv_sizes[0], self.qkv_spans[0])
        if self.qkv_bias is not None and self.out_bias is not None:
            targets |= rows_of([f"{name}.bias" for name in names], self.qkv_bias, self.qkv_sizes, self.qkv_spans)
            targets[prefix + "o_proj.bias"] = whole(self.out_bias)
        targets[prefix + "q_norm.weight"] = whole(self.q_norm_d)
        targets[prefix + "k_norm.weight"] = whole(self.k_norm_d)


class _DenseMlp(nn.Module):
    def __init__(self, config: ModelConfig, make: _Maker, collectives: Collectives) -> None:
        super().__init__()
        self.collectives, self.width = collectives, config.intermediate_size
        self.own = collectives.rank.width_in_group(self.width)
        self.gate_up = make.matrix(2 * len(self.own), config.hidden_size)
        self.down = make.matrix(config.hidden_size, len(self.own))

    def forward(self, x_TD: torch.Tensor, counts_LE: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        inner_TI = reference.silu_and_mul(F.linear(x_TD, self.gate_up))
        return F.linear(inner_TI, self.down)

    def add_weights(self, prefix: str, targets: dict[str, Target], fused: dict[str, Fused]) -> None:
        names = [prefix + "gate_proj.weight", prefix + "up_proj.weight"]
        targets |= rows_of(names, self.gate_up, [self.width] * 2, [self.own] * 2)
        targets[prefix + "down_proj.weight"] = columns_of(self.down, self.width, self.own)


class _Experts(nn.Module):
    def __init__(
        self, config: ModelConfig, moe_layer: int, make: _Maker, kernels: Kernels, collectives: Collectives
    ) -> None:
        super().__init__()
        self.moe_layer, self.norm_topk_prob = moe_layer, config.norm_topk_prob
        self.kernels, self.collectives = kernels, collectives
        self.num_experts, self.width, hidden_size = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.own = collectives.rank.experts(self.num_experts)
        self.own_width = collectives.rank.expert_width(self.width)
        self.gate_ED = make.matrix(self.num_experts, hidden_size)
        num, width, fp8 = len(self.own), len(self.own_width), kernels.native_fp8
        self.gate_up_E2ID, self.gate_up_scale = make.experts(num, 2 * width, hidden_size, fp8=fp8)
        self.down_EDI, self.down_scale = make.experts(num, hidden_size, width, fp8=fp8)

    def forward(self, x_TD: torch.Tensor, counts_LE: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        ranks = self.collectives.rank.of
        ids_TK = batch.routing.target(self.moe_layer, len(x_TD))
        if ranks.dp > 1 or ranks.ep:
            return self._with_the_others(x_TD, ids_TK, batch)
        return self.kernels.experts(
            x_TD,
            self.gate_ED,
            *self._matrices(),
            norm_topk_prob=self.norm_topk_prob,
            ids_TK=ids_TK,
            counts_E=counts_LE[self.moe_layer],
            num_tokens=batch.num_tokens,
        )

    def _with_the_others(self, x_TD: torch.Tensor, ids_TK: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """Route this group's tokens, and run all groups' through the experts, or the parts of them, that are here."""
        weights_TK = self.kernels.route(
            x_TD, self.gate_ED, norm_topk_prob=self.norm_topk_prob, ids_TK=ids_TK, num_tokens=batch.num_tokens
        )
        lanes = None if batch.num_tokens is None else Lanes(batch.num_tokens, len(x_TD))
        if batch.gathering is not None:
            lanes = batch.gathering.lanes
        routed = self.collectives.gather(Routed(x_TD, ids_TK, weights_TK), batch.gathering)
        partial_ND = self.kernels.run_experts(
            routed.hidden,
            routed.ids,
            routed.weights,
            *self._matrices(),
            first_expert=self.own.start,
            lanes=lanes,
        )
        return self.collectives.scatter_sum(partial_ND, batch.gathering, len(x_TD))

    def _matrices(self) -> tuple[ExpertMatrices, ExpertMatrices]:
        return ExpertMatrices(self.gate_up_E2ID, self.gate_up_scale), ExpertMatrices(self.down_EDI, self.down_scale)

    def add_weights(self, prefix: str, targets: dict[str, Target], fused: dict[str, Fused]) -> None:
        targets[prefix + "gate.weight"] = whole(self.gate_ED)
        width, hidden_size = self.width, self.gate_ED.shape[1]
        is_fp8 = self.gate_up_scale is not None
        gate_up: dict[str, tuple[int, int]] = {}
        down: dict[str, tuple[int, int]] = {}
        for expert in range(self.num_experts):
            names = [f"{prefix}experts.{expert}.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")]
            if self.own.start <= expert < self.own.stop:
                place = expert - self.own.start
                gate_up_scale = None if self.gate_up_scale is None else self.gate_up_scale[place]
                down_scale = None if self.down_scale is None else self.down_scale[place]
                halves, spans = [width] * 2, [self.own_width] * 2
                targets |= rows_of(names[:2], self.gate_up_E2ID[place], halves, spans, gate_up_scale)
                targets[names[2]] = columns_of(self.down_EDI[place], width, self.own_width, down_scale)
            else:
                targets |= dict.fromkeys(names[:2], Target((width, hidden_size), is_fp8=is_fp8))
                targets[names[2]] = Target((hidden_size, width), is_fp8=is_fp8)
            gate_up |= {names[0]: (expert, 0), names[1]: (expert, width)}
            down[names[2]] = (expert, 0)
        fused[prefix + "experts.gate_up_proj"] = Fused((self.num_experts, 2 * width, hidden_size), gate_up)
        fused[prefix + "experts.down_proj"] = Fused((self.num_experts, hidden_size, width), down)
