"""Small steps as CUDA graphs: one captured forward pass for each padded number of tokens, replayed with new inputs in its buffers.

A step of T tokens runs in the smallest graph of B >= T lanes, one a token. A generated token is a lane by nature; the tokens of a
short prompt become lanes too, each with a context that ends with itself, because launching a pass kernel by kernel takes longer
than running it. The B - T padding lanes write their keys and values to the padding page, which nobody is ever given, go to no
expert, and leave rows in the capture buffer that nobody takes. The forward pass alone is captured; logits and sampling follow it
eagerly, as they do in every other step.

Neighbours: `common.engine.step_layout` (what is padded), `common.kernels.flashinfer_attention` (planned before each replay).
"""

import gc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from common.engine.batch import StepBatch, batch_of, known_or_last
from common.engine.device import StepStaging
from common.engine.step_layout import Ints, PerDraw, PerToken, StepLayout
from common.kernels.attention import AttentionPlan
from common.kernels.collectives import Gathering
from common.kernels.flashinfer_attention import FixedDecode, FlashinferAttention
from common.kernels.interface import Lanes
from common.memory.kv_pool import KvPool
from common.models.forward import ForwardBatch, MoeModel, RoutingSink
from common.ranks import Rank

_NUM_COLUMNS = len(PerToken._fields)
_MOST_CONTEXT_TOKENS = 2**17
"""Over all lanes of a step that computes prompts: its lanes do not share what they read."""
_SLOTS = PerToken._fields.index("slots")
_NOTHING = AttentionPlan(*(np.array(values, dtype=np.int32) for values in ([0], [], [0], [])))


class StepGraphs:
    """The graphs of one engine. Captures all of them when it is made, which takes some seconds."""

    def __init__(
        self,
        model: MoeModel,
        kv_pool: KvPool,
        attention: FlashinferAttention,
        routing: RoutingSink,
        last_tokens_R: torch.Tensor,
        *,
        rank: Rank,
        sizes: Sequence[int],
        pages_per_request: int,
        captured: bool,
    ) -> None:
        """`sizes` rise, and are those of all ranks.

        Without `captured` the same padded steps run eagerly, to compare or to debug.
        """
        device = kv_pool.pages.device
        self._model, self._kv_pool, self._routing = model, kv_pool, routing
        self._last_tokens_R = last_tokens_R
        self._rank = rank
        self._sizes = tuple(sizes)
        largest = self._sizes[-1]
        # The tokens' columns, and behind them how many tokens each attention group has.
        self._ints = torch.zeros(_NUM_COLUMNS * largest + rank.of.dp, dtype=torch.int64, device=device)
        # Starts, tokens on the last page, and pages: siblings may share pages, so the pool's size is no bound.
        attention_ints = 2 * largest + 1 + largest * pages_per_request
        self._attention_ints = torch.zeros(attention_ints, dtype=torch.int32, device=device)
        pool: Any = torch.cuda.graph_pool_handle() if captured else None
        # The largest first, so that the smaller ones fit into the memory that it has taken.
        self._lanes = {
            size: self._prepare(attention.fixed_decode(size, self._attention_ints), size, pool)
            for size in reversed(self._sizes)
        }

    def close(self) -> None:
        """Let go of the graphs and of their memory; nothing else is called afterwards.

        Not left to the collector: some of what has been captured knows this object.
        """
        self._lanes.clear()

    def takes(self, layout: StepLayout) -> bool:
        """Whether there is a graph of so many lanes, and reading each prompt once for each of its tokens costs next to nothing."""
        if layout.num_tokens > self._sizes[-1]:
            return False
        is_decode = layout.num_tokens == len(layout.attention.context_tokens)
        return is_decode or int(layout.tokens.positions.sum()) <= _MOST_CONTEXT_TOKENS

    def run(
        self, layout: StepLayout, staging: StepStaging, group_tokens: Sequence[int]
    ) -> tuple[StepBatch, torch.Tensor]:
        """Launch a step; returns its tensors and its hidden states `[T, D]`, which the next step's launch overwrites.

        All attention groups take the size that fits the one with the most tokens.
        """
        num_tokens = layout.num_tokens
        assert group_tokens[self._rank.group] == num_tokens
        size = next(size for size in self._sizes if size >= max(group_tokens))
        token_ints, draw_ints = np.split(layout.ints, [_NUM_COLUMNS * num_tokens])
        padded = self._padded(token_ints, size, group_tokens)
        staging.upload_into(padded, self._ints[: len(padded)])
        lanes = self._lanes[size]
        plan = layout.attention.per_token(self._kv_pool.layout.page_size)
        packed = lanes.attention.pack(plan, self._kv_pool.padding_page)
        staging.upload_into(packed, self._attention_ints[: len(packed)])
        lanes.attention.plan(packed)
        hidden_BD = lanes.run()
        draws = PerDraw(*staging.upload(draw_ints).view(len(PerDraw._fields), layout.num_draws))
        return batch_of(layout, draws, staging), hidden_BD[:num_tokens]

    def _padded(self, token_ints: Ints, size: int, group_tokens: Sequence[int]) -> Ints:
        """The tokens' columns, zeros in the padding lanes but for their slots, and behind them each group's number of tokens."""
        num_tokens = group_tokens[self._rank.group]
        padded = np.zeros(_NUM_COLUMNS * size + len(group_tokens), dtype=np.int64)
        columns = padded[: _NUM_COLUMNS * size].reshape(_NUM_COLUMNS, size)
        columns[:, :num_tokens] = token_ints.reshape(_NUM_COLUMNS, num_tokens)
        columns[_SLOTS, num_tokens:] = self._kv_pool.padding_page * self._kv_pool.layout.page_size
        padded[_NUM_COLUMNS * size :] = group_tokens
        return padded

    def _prepare(self, attention: FixedDecode, size: int, pool: Any) -> "_Lanes":
        """Run a step of padding alone, which compiles what is not compiled yet, and capture the next one."""
        dp, group = self._rank.of.dp, self._rank.group
        column_ints, counts_M = torch.split(self._ints[: _NUM_COLUMNS * size + dp], [_NUM_COLUMNS * size, dp])
        nothing: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._ints[: _NUM_COLUMNS * size + dp].copy_(torch.from_numpy(self._padded(nothing, size, [0] * dp)))
        packed = attention.pack(_NOTHING, self._kv_pool.padding_page)
        self._attention_ints[: len(packed)].copy_(torch.from_numpy(packed))
        attention.plan(packed)
        tokens = PerToken(*column_ints.view(_NUM_COLUMNS, size))
        gathering = Gathering(size, (size,) * dp, Lanes(counts_M, size)) if dp > 1 else None

        def forward() -> torch.Tensor:
            batch = ForwardBatch(
                token_ids_T=known_or_last(tokens, self._last_tokens_R),
                positions_T=tokens.positions,
                slots_T=tokens.slots,
                attention=attention,
                routing=self._routing,
                num_tokens=counts_M[group : group + 1],
                gathering=gathering,
            )
            return self._model(batch, self._kv_pool)

        forward()
        if pool is None:
            return _Lanes(attention, forward)
        graph = torch.cuda.CUDAGraph()
        # A capture ends with an error if the collector frees another engine's graphs meanwhile.
        gc.disable()
        try:
            # What other threads do with the device meanwhile, NCCL's watchdog above all, is no part of the capture.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                hidden_BD = forward()
        finally:
            gc.enable()

        def replay() -> torch.Tensor:
            graph.replay()
            return hidden_BD

        return _Lanes(attention, replay)


class _Lanes(NamedTuple):
    """What there is of one padded size: its attention, and the forward pass over the buffers."""

    attention: FixedDecode
    run: Callable[[], torch.Tensor]
