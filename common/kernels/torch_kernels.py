"""The kernels in plain torch, on any device: what an engine on a CPU runs, and the twins of the fused ones."""

import torch

from common.kernels import reference
from common.kernels.interface import ExpertMatrices, Lanes, Peers


class TorchKernels:
    """Computes and rounds as transformers does; see `common.kernels.interface.Kernels`."""

    def __init__(self, *, native_fp8: bool = False) -> None:
        """With `native_fp8`, each expert that runs is dequantised for itself, every time: for tests."""
        self.native_fp8 = native_fp8

    def add_norm(
        self, x_TD: torch.Tensor, delta: torch.Tensor | None, weight_D: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add, then norm."""
        if delta is not None:
            x_TD = x_TD + self.add_up(delta)
        return x_TD, reference.rms_norm(x_TD, weight_D, eps)

    def add_norm_over(
        self, x_TD: torch.Tensor, partial_TD: torch.Tensor, peers: Peers, weight_D: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One after the other."""
        return self.add_norm(x_TD, peers.sum(partial_TD), weight_D, eps)

    def norm_rotate_store(
        self,
        qkv: torch.Tensor,
        q_norm_d: torch.Tensor,
        k_norm_d: torch.Tensor,
        eps: float,
        cos_Pd: torch.Tensor,
        sin_Pd: torch.Tensor,
        positions_T: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slots_T: torch.Tensor,
    ) -> torch.Tensor:
        """One after the other."""
        num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
        qkv = qkv.view(len(qkv), -1, head_dim)
        num_heads = qkv.shape[1] - 2 * num_kv_heads
        q_THd, k_Thd, v_Thd = torch.split_with_sizes(qkv, (num_heads, num_kv_heads, num_kv_heads), dim=1)
        q_THd, k_Thd = reference.rotary(
            reference.rms_norm(q_THd, q_norm_d, eps),
            reference.rms_norm(k_Thd, k_norm_d, eps),
            cos_Pd[positions_T],
            sin_Pd[positions_T],
        )
        reference.store_kv(k_cache, v_cache, slots_T, k_Thd, v_Thd)
        return q_THd

    def experts(
        self,
        hidden_TD: torch.Tensor,
        gate_ED: torch.Tensor,
        gate_up_E2ID: ExpertMatrices,
        down_EDI: ExpertMatrices,
        *,
        norm_topk_prob: bool,
        ids_TK: torch.Tensor,
        counts_E: torch.Tensor,
        num_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        """One after the other. Waits for the device, and so takes no part in a graph."""
        weights_TK = self.route(hidden_TD, gate_ED, norm_topk_prob=norm_topk_prob, ids_TK=ids_TK, num_tokens=num_tokens)
        return self.run_experts(hidden_TD, ids_TK, weights_TK, gate_up_E2ID, down_EDI, first_expert=0, lanes=None)

    def add_up(self, delta: torch.Tensor) -> torch.Tensor:
        """Add, in float32, and round once."""
        return delta if delta.dim() == 2 else delta.sum(dim=1)

    def route(
        self,
        hidden_TD: torch.Tensor,
        gate_ED: torch.Tensor,
        *,
        norm_topk_prob: bool,
        ids_TK: torch.Tensor,
        num_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        """Choose for all lanes, and keep the ids of those that hold a token."""
        weights_TK, chosen_TK = reference.route(hidden_TD, gate_ED, ids_TK.shape[1], norm_topk_prob)
        if num_tokens is not None:
            is_token_T = torch.arange(len(hidden_TD), device=hidden_TD.device) < num_tokens
            chosen_TK = torch.where(is_token_T[:, None], chosen_TK, ids_TK.long())
        ids_TK.copy_(chosen_TK)
        return weights_TK

    def run_experts(
        self,
        hidden_ND: torch.Tensor,
        ids_NK: torch.Tensor,
        weights_NK: torch.Tensor,
        gate_up_E2ID: ExpertMatrices,
        down_EDI: ExpertMatrices,
        *,
        first_expert: int,
        lanes: Lanes | None,
    ) -> torch.Tensor:
        """Each expert once, over its tokens together. Waits for the device."""
        ids_NK = ids_NK.long()
        if lanes is not None:
            lane_N = torch.arange(len(ids_NK), device=ids_NK.device)
            is_token_N = lane_N % lanes.per_group < lanes.num_tokens_M[lane_N // lanes.per_group]
            ids_NK = ids_NK.masked_fill(~is_token_N[:, None], -1)
        return reference.moe_experts(hidden_ND, ids_NK, weights_NK, gate_up_E2ID, down_EDI, first_expert=first_expert)

    def draw(
        self,
        logits_SV: torch.Tensor,
        temperatures_S: torch.Tensor,
        seeds_S: torch.Tensor,
        positions_S: torch.Tensor,
        *,
        all_greedy: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The exponential race over the whole vocabulary, if anybody races."""
        if all_greedy:
            tokens_S = logits_SV.argmax(dim=-1)
            return tokens_S, reference.logprobs_of(logits_SV, tokens_S)
        return reference.draw(logits_SV, temperatures_S, seeds_S, positions_S)
