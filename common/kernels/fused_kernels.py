"""The kernels in few launches, for a GPU; their parts are in `common.kernels.triton`."""

import torch
import torch.nn.functional as F  # noqa: N812

from common.kernels.triton import experts, grouped_experts, layer, sampling
from common.kernels.triton.routing import route
from common.kernels.triton.tuning import tuned_for


class FusedKernels:
    """One launch where torch takes many; see `common.kernels.interface.Kernels`. Weights and activations of 16 bits."""

    def add_norm(
        self, x_TD: torch.Tensor, delta: torch.Tensor | None, weight_D: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One launch."""
        return layer.add_norm(x_TD, delta, weight_D, eps)

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
        """One launch."""
        return layer.norm_rotate_store(
            qkv, q_norm_d, k_norm_d, eps, cos_Pd, sin_Pd, positions_T, k_cache, v_cache, slots_T
        )

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
        """Four launches for few tokens: the router's product, the choice with the rows' capture, and the two expert products."""
        num_experts, hidden_size, width = down_EDI.shape
        logits_TE = F.linear(hidden_TD, gate_ED)
        routing = route(logits_TE, ids_TK, counts_E, norm_topk_prob=norm_topk_prob, num_tokens=num_tokens)
        tuned = tuned_for(num_experts=num_experts, top_k=ids_TK.shape[1], hidden_size=hidden_size, width=width)
        if len(hidden_TD) <= tuned.single_tokens:
            return experts.single_tokens(hidden_TD, routing, gate_up_E2ID, down_EDI)
        run = experts.few_tokens if len(hidden_TD) <= tuned.few_tokens else grouped_experts.many_tokens
        return run(hidden_TD, routing, gate_up_E2ID, down_EDI)

    def draw(
        self,
        logits_SV: torch.Tensor,
        temperatures_S: torch.Tensor,
        seeds_S: torch.Tensor,
        positions_S: torch.Tensor,
        *,
        all_greedy: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Two launches, greedy or not: so a greedy row's token does not depend on who is beside it."""
        return sampling.draw(logits_SV, temperatures_S, seeds_S, positions_S)
