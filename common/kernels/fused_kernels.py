"""The kernels in few launches, for a GPU; their parts are in `common.kernels.triton`."""

import torch
import torch.nn.functional as F  # noqa: N812

from common.kernels.interface import ExpertMatrices, Lanes, Peers
from common.kernels.triton import experts, grouped_experts, grouped_fp8, layer, sampling, single_experts
from common.kernels.triton.routing import Routing, choose, place, route
from common.kernels.triton.tuning import ExpertShape, tuned_for


class FusedKernels:
    """One launch where torch takes many; see `common.kernels.interface.Kernels`. For 16-bit types, and experts of float8."""

    def __init__(self, *, native_fp8: bool = False) -> None:
        """With `native_fp8`, for GPUs of compute capability 9.0 or more."""
        self.native_fp8 = native_fp8

    def add_norm(
        self, x_TD: torch.Tensor, delta: torch.Tensor | None, weight_D: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One launch."""
        return layer.add_norm(x_TD, delta, weight_D, eps)

    def add_norm_over(
        self, x_TD: torch.Tensor, partial_TD: torch.Tensor, peers: Peers, weight_D: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of few tokens a copy and one launch, which reads the others' memory."""
        area = peers.area(partial_TD)
        if area is None:
            return self.add_norm(x_TD, peers.sum(partial_TD), weight_D, eps)
        area.own.copy_(partial_TD)
        return layer.add_norm_over(x_TD, area, weight_D, eps)

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
        gate_up_E2ID: ExpertMatrices,
        down_EDI: ExpertMatrices,
        *,
        norm_topk_prob: bool,
        ids_TK: torch.Tensor,
        counts_E: torch.Tensor,
        num_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        """Four launches for few tokens: the router's product, the choice with the rows' capture, and the two expert products."""
        logits_TE = F.linear(hidden_TD, gate_ED)
        routing = route(logits_TE, ids_TK, counts_E, norm_topk_prob=norm_topk_prob, num_tokens=num_tokens)
        return _run(hidden_TD, routing, gate_up_E2ID, down_EDI)

    def add_up(self, delta: torch.Tensor) -> torch.Tensor:
        """One launch, or none."""
        return delta if delta.dim() == 2 else layer.add_up(delta)

    def route(
        self,
        hidden_TD: torch.Tensor,
        gate_ED: torch.Tensor,
        *,
        norm_topk_prob: bool,
        ids_TK: torch.Tensor,
        num_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        """Two launches: the router's product, and the choice with the rows' capture."""
        return choose(F.linear(hidden_TD, gate_ED), ids_TK, norm_topk_prob=norm_topk_prob, num_tokens=num_tokens)

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
        """Five launches for few tokens: zeros to count with, who goes where, the two expert products, and their sum."""
        assert hidden_ND.is_contiguous()
        assert weights_NK.is_contiguous()
        routing = place(ids_NK, weights_NK, first_expert=first_expert, num_experts=len(down_EDI.weight), lanes=lanes)
        out = _run(hidden_ND, routing, gate_up_E2ID, down_EDI)
        return out if out.dim() == 2 else layer.add_up(out, routing.ids_TK)

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


def _run(
    hidden_TD: torch.Tensor, routing: Routing, gate_up_E2ID: ExpertMatrices, down_EDI: ExpertMatrices
) -> torch.Tensor:
    """The expert products, in the way that is fastest for as many tokens: `[T, D]`, or `[T, K, D]` still to be added up."""
    tuned = tuned_for(ExpertShape.of(down_EDI, routing.ids_TK.shape[1]))
    if len(hidden_TD) <= tuned.single_tokens:
        return single_experts.single_tokens(hidden_TD, routing, gate_up_E2ID, down_EDI)
    if len(hidden_TD) <= tuned.few_tokens:
        return experts.few_tokens(hidden_TD, routing, gate_up_E2ID, down_EDI)
    many_tokens = grouped_experts.many_tokens if down_EDI.scale is None else grouped_fp8.many_tokens
    return many_tokens(hidden_TD, routing, gate_up_E2ID, down_EDI)
