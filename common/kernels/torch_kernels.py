"""The kernels in plain torch, on any device: what an engine on a CPU runs, and the twins of the fused ones."""

import torch

from common.kernels import reference


class TorchKernels:
    """Computes and rounds as transformers does; see `common.kernels.interface.Kernels`."""

    def add_norm(
        self, x_TD: torch.Tensor, delta: torch.Tensor | None, weight_D: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add, then norm."""
        if delta is not None:
            x_TD = x_TD + (delta if delta.dim() == 2 else delta.sum(dim=1))
        return x_TD, reference.rms_norm(x_TD, weight_D, eps)

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
        gate_up_E2ID: torch.Tensor,
        down_EDI: torch.Tensor,
        *,
        norm_topk_prob: bool,
        ids_TK: torch.Tensor,
        counts_E: torch.Tensor,
        num_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        """Each expert once, over its tokens together. Waits for the device, and so takes no part in a padded graph."""
        assert num_tokens is None, "only the fused kernels run padded batches"
        weights_TK, chosen_TK = reference.route(hidden_TD, gate_ED, ids_TK.shape[1], norm_topk_prob)
        ids_TK.copy_(chosen_TK)
        return reference.moe_experts(hidden_TD, chosen_TK, weights_TK, gate_up_E2ID, down_EDI)

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
