"""What every rank of an attention group computes alike in a step: the forward pass, the logits, and the draws that are shared.

A leader's `Engine` plans, samples and keeps rows around it; a follower (`common.engine.follower`) has nothing else. Both run the
same calls in the same order, because the ranks meet inside of them: a rank that left one out would leave the others waiting.

Shape letters: T tokens, D hidden size, S draws, V vocabulary, R rows of the request table.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from common.engine.backends import Backends
from common.engine.batch import ScoredBatch, StepBatch, nothing_drawn, padding_batch, upload_layout
from common.engine.capacity import CapacityPlan
from common.engine.device import Device, StepStaging
from common.engine.lockstep import StepShape
from common.engine.step_layout import StepLayout
from common.kernels.collectives import Collectives, Gathering
from common.memory.kv_pool import KvPool
from common.models.forward import MoeModel, RoutingSink
from common.models.weight_table import WeightTable

if TYPE_CHECKING:
    from common.engine.cuda_graphs import StepGraphs

_SCORED_SLICE = 512


class ForwardPass:
    """One rank's model, KV pool and kernels."""

    def __init__(
        self,
        *,
        model: MoeModel,
        capacity: CapacityPlan,
        device: Device,
        backends: Backends,
        kv_pool: KvPool,
        routing: RoutingSink,
        collectives: Collectives,
        last_tokens_R: torch.Tensor,
        cuda_graphs: bool,
    ) -> None:
        """With `cuda_graphs`, small steps run as such where the kernels allow it."""
        self.kv_pool = kv_pool
        self.backends = backends
        self.collectives = collectives
        self._model = model
        self._capacity = capacity
        self._device = device
        self._routing = routing
        self._last_tokens_R = last_tokens_R
        self._cuda_graphs = cuda_graphs
        self._graphs: StepGraphs | None = None

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile what fused kernels need for steps of every size, so that no request waits for it; else, do nothing.

        From then on small steps run in padded sizes, as CUDA graphs if asked for. Takes seconds, and minutes on a machine
        where nothing has been compiled before. All ranks of a worker warm up together.
        """
        backends, capacity = self.backends, self._capacity
        if backends.flashinfer is None:
            return
        from common.engine.cuda_graphs import StepGraphs

        sizes = {1 << shift for shift in range(capacity.max_step_tokens.bit_length())} | {capacity.max_step_tokens}
        for num_tokens in sorted(sizes):
            shape = StepShape((num_tokens,) * self.collectives.rank.of.dp, all_fit_graph=False)
            forward = padding_batch(
                num_tokens,
                self.kv_pool,
                backends.flashinfer,
                self._device.upload,
                self._routing,
                self._gathering(shape),
            )
            hidden_1D = self._model(forward, self.kv_pool)[:1]
            first = forward.positions_T[:1]
            backends.kernels.draw(self.logits(hidden_1D), first.float(), first, first)
        self._graphs = StepGraphs(
            self._model,
            self.kv_pool,
            backends.flashinfer,
            self._routing,
            self._last_tokens_R,
            rank=self.collectives.rank,
            sizes=capacity.graph_sizes,
            pages_per_request=capacity.pages_per_request,
            captured=self._cuda_graphs,
        )

    def cool_down(self) -> None:
        """Let go of what `warm_up` has captured, and of its memory; no step may be in flight, nor be launched before it is warm."""
        if self._graphs is not None:
            self._graphs.close()
            self._graphs = None

    @property
    def weights(self) -> list[torch.Tensor]:
        """All that the model keeps on the device."""
        return self._model.tensors()

    @property
    def workspaces(self) -> list[torch.Tensor]:
        """What attention works in: of no meaning between steps."""
        return [] if self.backends.flashinfer is None else self.backends.flashinfer.workspaces

    def weight_table(self) -> WeightTable:
        """Say where the rank's tensors are."""
        return self._model.weight_table()

    def fits_graph(self, layout: StepLayout) -> bool:
        """Whether this group's part of a step can run in a padded size."""
        return self._graphs is not None and self._graphs.takes(layout)

    def run(self, layout: StepLayout, shape: StepShape, staging: StepStaging) -> tuple[StepBatch, torch.Tensor]:
        """Launch a step's forward pass; returns what follows it needs, and the hidden states `[T, D]`."""
        assert max(shape.group_tokens) <= self._capacity.max_step_tokens, "the plan is over the step's token budget"
        if self._graphs is not None and shape.all_fit_graph:
            return self._graphs.run(layout, staging, shape.group_tokens)
        attention, gathering = self.backends.attention, self._gathering(shape)
        if layout.num_tokens > 0:
            forward, batch = upload_layout(layout, staging, self._last_tokens_R, attention, self._routing, gathering)
        else:
            # An idle group joins with a token that belongs to nobody, so that no kernel has to run over nothing.
            forward = padding_batch(1, self.kv_pool, attention, staging.upload, self._routing, gathering)
            batch = nothing_drawn(staging)
        return batch, self._model(forward, self.kv_pool)[: layout.num_tokens]

    def logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """Project hidden states to logits `[S, V]`; every rank of the group gets all of them."""
        return self._model.logits(hidden_SD)

    def scored_logits(
        self, scored: ScoredBatch, hidden_TD: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the logits of the positions that predict a wanted prompt token, and these tokens.

        They come in slices: logits of a whole chunk could be larger than the KV pool.
        """
        slices = torch.split(scored.hidden_N, _SCORED_SLICE), torch.split(scored.next_tokens_N, _SCORED_SLICE)
        for index, tokens in zip(*slices, strict=True):
            yield self.logits(hidden_TD[index]), tokens

    def keep_draws(self, batch: StepBatch, tokens_S: torch.Tensor) -> None:
        """Leave the tokens that the leader has drawn where the next step finds them, on every rank of the group."""
        self._last_tokens_R[batch.draws.rows] = self.collectives.share_draws(tokens_S)

    def _gathering(self, shape: StepShape) -> Gathering | None:
        if len(shape.group_tokens) == 1:
            return None
        per_group = max(1, *shape.group_tokens)
        assert per_group * len(shape.group_tokens) <= self._capacity.max_gathered_tokens
        return Gathering(per_group=per_group, num_tokens=shape.group_tokens)
