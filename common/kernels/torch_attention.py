"""The attention backend in plain torch, for any device: `common.kernels.reference.paged_attention`, request by request."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy.typing as npt
import torch

from common.kernels.attention import Attention, AttentionPlan
from common.kernels.reference import paged_attention


class TorchAttention:
    """What an engine on a CPU runs, and the oracle of the other backends."""

    def plan(self, plan: AttentionPlan, upload: Callable[[npt.NDArray[Any]], torch.Tensor]) -> Attention:
        """Put the pages where the caches are; all else stays on the host."""
        return partial(paged_attention, plan=plan, pages=upload(plan.pages))
