"""The capturer: lets every MoE layer of a step write its expert ids into one device buffer, and hands out owned copies.

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

    def target(self, moe_layer: int, num_tokens: int) -> torch.Tensor:
        """Where the step that is being launched writes the ids of its `moe_layer`-th MoE layer: a view `[num_tokens, K]`."""
        return self.buffer[:num_tokens, moe_layer]

    def take(self, num_tokens: int) -> torch.Tensor:
        """Copy the step's rows `[T, L, K]` out of the buffer, in stream order; the caller owns the copy."""
        return self.buffer[:num_tokens].clone()
