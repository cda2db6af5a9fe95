"""What a model is given for one step, and what it must offer; the seam between the engine and the models.

Shape letters: T tokens of the step, D hidden size, K top-k, S sampled positions, V vocabulary.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from common.kernels.attention import Attention
from common.kernels.collectives import Gathering
from common.memory.kv_pool import KvPool
from common.models.weight_table import WeightTable


class RoutingSink(Protocol):
    """Where the experts that each MoE layer chose are written; `common.routed_experts.capture` is the one that keeps them."""

    def target(self, moe_layer: int, num_tokens: int) -> torch.Tensor:
        """The place of the ids of the `moe_layer`-th MoE layer, counted from 0 over MoE layers alone: `[num_tokens, K]`.

        Any integer dtype that holds every id; may be strided, K is contiguous.
        """


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step's tokens, all requests concatenated. Tensors live on the model's device and belong to this step."""

    token_ids_T: torch.Tensor
    """int64, `[0, V)`."""
    positions_T: torch.Tensor
    """int64, absolute."""
    slots_T: torch.Tensor
    """int64: where each token's key and value go."""
    attention: Attention
    routing: RoutingSink
    num_tokens: torch.Tensor | None = None
    """One int64: how many of the T are tokens, if the batch is padded; nothing of the rest is ever read."""
    gathering: Gathering | None = None
    """How the tokens of all attention groups come together for the experts; None in a worker with one group."""


class MoeModel(Protocol):
    """A causal language model with MoE layers."""

    def __call__(self, batch: ForwardBatch, kv_pool: KvPool) -> torch.Tensor:
        """Run the layers, store keys and values, record the routing; returns hidden states `[T, D]` after the final norm."""

    def logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """Project hidden states to logits `[S, V]`; each rank of the attention group gets all of them."""

    def weight_table(self) -> WeightTable:
        """Say where each tensor of a checkpoint goes."""

    def tensors(self) -> list[torch.Tensor]:
        """All that it keeps on the device, but for views of that."""
