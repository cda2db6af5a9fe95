"""The capturer: takes the expert ids of every MoE layer of a step into one device buffer, and hands out owned copies.

The buffer is overwritten by the next launch, so whoever settles a step must hold a copy made on the forward's own stream (R3):
`take` makes it. The capturer knows no slots and no requests; `common.engine.step` pairs its rows with them.
"""

import torch

from common.routed_experts.spec import RowSpec

_TORCH_DTYPES = {"uint8": torch.uint8, "uint16": torch.uint16}


class RoutedExpertsCapturer:
    """A buffer `[max_step_tokens, L, K]` of the smallest dtype that holds every expert id, on the model's device."""

    def __init__(self, spec: RowSpec, max_step_tokens: int, device: torch.device) -> None:
        self.buffer = torch.zeros(
            (max_step_tokens, spec.num_layers, spec.top_k), dtype=_TORCH_DTYPES[spec.dtype], device=device
        )

    def record(self, moe_layer: int, expert_ids_TK: torch.Tensor) -> None:
        """Keep `[T, K]` ids of the `moe_layer`-th MoE layer of the step that is being launched."""
        self.buffer[: expert_ids_TK.shape[0], moe_layer].copy_(expert_ids_TK)

    def take(self, num_tokens: int) -> torch.Tensor:
        """Copy the step's rows `[T, L, K]` out of the buffer, in stream order; the caller owns the copy."""
        return self.buffer[:num_tokens].clone()
