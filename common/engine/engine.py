"""The engine: one model on one device, with its KV pool, its page allocator and its host cache. It runs plans.

It knows no role, no queue, no network: a worker's scheduler decides what a plan holds, `common.engine.loop` when it runs.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch

from common.config import EngineOptions, ModelOptions
from common.engine.backends import Backends, choose_backends
from common.engine.batch import ScoredBatch, padding_batch, upload_layout
from common.engine.capacity import CapacityPlan, plan_capacity
from common.engine.device import Device, StepStaging, open_device
from common.engine.penalties import LogitChanges, TokenCounts
from common.engine.sampler import SamplingBatch, sample, top_logprobs
from common.engine.seats import Seats
from common.engine.step import Launched
from common.engine.step_layout import StepLayout, lay_out
from common.kernels.reference import logprobs_of
from common.memory.kv_pool import KvPool
from common.memory.layout import KvLayout
from common.memory.page_allocator import PageAllocator
from common.memory.request_table import RequestTable
from common.models.config import ModelConfig, load_model_config, resolve_checkpoint
from common.models.forward import MoeModel
from common.models.registry import build_model, resolve_dtype
from common.routed_experts.capture import RoutedExpertsCapturer
from common.routed_experts.host_cache import HostCache
from common.routed_experts.spec import RowSpec
from common.scheduling.step_plan import StepPlan

if TYPE_CHECKING:
    from common.engine.cuda_graphs import StepGraphs

_SCORED_SLICE = 512


class Engine:
    """Runs steps. `launch` queues a step's work and returns at once; `Launched.settle` waits for it and commits."""

    def __init__(
        self,
        *,
        model: MoeModel,
        config: ModelConfig,
        capacity: CapacityPlan,
        device: Device,
        backends: Backends,
        kv_pool: KvPool,
        allocator: PageAllocator,
        capturer: RoutedExpertsCapturer,
        host_cache: HostCache,
        weight_version: str,
    ) -> None:
        self.config = config
        self.capacity = capacity
        self.kv_pool = kv_pool
        self.allocator = allocator
        self.host_cache = host_cache
        self.weight_version = weight_version
        self.table = RequestTable(capacity.max_running_requests, capacity.pages_per_request, device.torch_device)
        self.seats = Seats(allocator, self.table)
        self.num_steps = 0
        self.num_failed_steps = 0
        self.num_tokens_computed = 0
        self._model = model
        self._device = device
        self._backends = backends
        self._graphs: StepGraphs | None = None
        self._capturer = capturer
        self._token_counts = TokenCounts(capacity.max_running_requests, config.vocab_size, device)

    @torch.inference_mode()
    def warm_up(self, *, cuda_graphs: bool) -> None:
        """Compile what fused kernels need for steps of every size, so that no request waits for it; else, do nothing.

        From then on small steps run in padded sizes, as CUDA graphs if asked for. Takes seconds, and minutes on a machine
        where nothing has been compiled before.
        """
        backends, capacity = self._backends, self.capacity
        if backends.flashinfer is None:
            return
        from common.engine.cuda_graphs import StepGraphs

        sizes = {1 << shift for shift in range(capacity.max_step_tokens.bit_length())} | {capacity.max_step_tokens}
        for num_tokens in sorted(sizes):
            forward = padding_batch(num_tokens, self.kv_pool, backends.flashinfer, self._device.upload, self._capturer)
            hidden_1D = self._model(forward, self.kv_pool)[:1]
            first = forward.positions_T[:1]
            backends.kernels.draw(self._model.logits(hidden_1D), first.float(), first, first)
        self._graphs = StepGraphs(
            self._model,
            self.kv_pool,
            backends.flashinfer,
            self._capturer,
            self.table.last_tokens,
            sizes=capacity.graph_sizes,
            pages_per_request=capacity.pages_per_request,
            captured=cuda_graphs,
        )

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Queue one forward pass and its copies to the host; the device may still be busy with the step before."""
        layout = lay_out(plan, self.table, self.capacity.page_size)
        assert layout.num_tokens <= self.capacity.max_step_tokens, "the plan is over the step's token budget"
        staging = self._device.begin_step()
        ticket = self.host_cache.reserve(layout.tokens.slots)
        if self._graphs is not None and self._graphs.takes(layout):
            batch, hidden_TD = self._graphs.run(layout, staging)
        else:
            forward, batch = upload_layout(
                layout, staging, self.table.last_tokens, self._backends.attention, self._capturer
            )
            hidden_TD = self._model(forward, self.kv_pool)
        results = {"rows": self._capturer.take(layout.num_tokens)}
        if batch.sampling is not None:
            logits_SV = self._model.logits(hidden_TD[batch.draws.last_tokens])
            changes = self._logit_changes(plan, layout, batch.draws.rows, staging)
            results |= self._sample(logits_SV, batch.sampling, changes, batch.draws.rows, layout.top_count)
        if batch.scored is not None:
            results |= self._score(batch.scored, hidden_TD)
        self.num_steps += 1
        self.num_tokens_computed += layout.num_tokens
        num_scored = layout.scored.counts if layout.scored is not None else (0,) * len(plan.entries)
        return Launched(plan, staging.copy_to_host(results), num_scored, ticket, self.host_cache)

    def synchronize(self) -> None:
        """Wait until all that was ever queued on the device has been done; raises if the device is broken."""
        self._device.synchronize()

    def _logit_changes(
        self, plan: StepPlan, layout: StepLayout, rows_S: torch.Tensor, staging: StepStaging
    ) -> LogitChanges | None:
        """What is done to the draws' logits before they are sampled; None, at no cost, in most steps."""
        if not layout.any_logit_changes:
            return None
        draws = [plan.entries[i] for i in layout.draw_entries]
        return self._token_counts.changes_of(draws, rows_S, self.config.eos_token_ids, staging.upload)

    def _sample(
        self,
        logits_SV: torch.Tensor,
        sampling: SamplingBatch,
        changes: LogitChanges | None,
        rows_S: torch.Tensor,
        top_count: int,
    ) -> dict[str, torch.Tensor]:
        """Draw the step's tokens, and leave them where the next step finds them."""
        if changes is None:
            tokens_S, logprobs_S = sample(logits_SV, sampling, self._backends.kernels)
        else:
            tokens_S, _ = sample(self._token_counts.apply(logits_SV, changes), sampling, self._backends.kernels)
            logprobs_S = logprobs_of(logits_SV, tokens_S)
            self._token_counts.count(changes, tokens_S)
        self.table.last_tokens[rows_S] = tokens_S
        results = {"tokens": tokens_S, "logprobs": logprobs_S}
        if top_count:
            results["top_logprobs"], results["top_ids"] = top_logprobs(logits_SV, top_count)
        return results

    def _score(self, scored: ScoredBatch, hidden_TD: torch.Tensor) -> dict[str, torch.Tensor]:
        """Take the logprobs of prompt tokens, in slices: logits of a whole chunk could be larger than the KV pool."""
        parts: dict[str, list[torch.Tensor]] = {"prompt_logprobs": [], "prompt_top_logprobs": [], "prompt_top_ids": []}
        for index, tokens in zip(
            torch.split(scored.hidden_N, _SCORED_SLICE), torch.split(scored.next_tokens_N, _SCORED_SLICE), strict=True
        ):
            logits = self._model.logits(hidden_TD[index])
            parts["prompt_logprobs"].append(logprobs_of(logits, tokens))
            if scored.top_count:
                values, ids = top_logprobs(logits, scored.top_count)
                parts["prompt_top_logprobs"].append(values)
                parts["prompt_top_ids"].append(ids)
        return {name: torch.cat(part) for name, part in parts.items() if part}


class EngineParts(NamedTuple):
    """The replaceable parts of an engine; tests put in ones that misbehave, to show that the checks can fail."""

    device: Device | None = None
    """None: the one that the options name."""
    engine: type[Engine] = Engine
    capturer: type[RoutedExpertsCapturer] = RoutedExpertsCapturer
    host_cache: type[HostCache] = HostCache


def build_engine(
    model_options: ModelOptions,
    options: EngineOptions,
    *,
    chunked_prefill_tokens: int,
    parts: EngineParts = EngineParts(),
) -> Engine:
    """Load the model and allocate all memory. Raises UsageError or CheckpointError for what the operator can mend."""
    config = load_model_config(resolve_checkpoint(model_options.model))
    device = parts.device or open_device(options)
    dtype = resolve_dtype(config, model_options)
    backends = choose_backends(options, config, dtype, device.torch_device)
    model = build_model(config, model_options, device.torch_device, backends.kernels)
    layout = KvLayout(
        page_size=options.page_size,
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        dtype=str(dtype).removeprefix("torch."),
        itemsize_bytes=dtype.itemsize,
    )
    rows = RowSpec(
        num_experts=config.num_experts,
        top_k=config.top_k,
        layer_ids=config.moe_layer_ids,
        num_hidden_layers=config.num_hidden_layers,
    )
    capacity = plan_capacity(
        options,
        layout,
        rows,
        vocab_size=config.vocab_size,
        context_tokens=model_options.context_tokens or config.max_position_embeddings,
        chunked_prefill_tokens=chunked_prefill_tokens,
        budget_bytes=device.pool_budget_bytes(options.memory_fraction),
    )
    allocator = PageAllocator(capacity.num_pages)
    engine = parts.engine(
        model=model,
        config=config,
        capacity=capacity,
        device=device,
        backends=backends,
        kv_pool=KvPool(layout, capacity.num_pages, device.torch_device, dtype),
        allocator=allocator,
        capturer=parts.capturer(rows, capacity.max_step_tokens, device.torch_device),
        host_cache=parts.host_cache(rows, allocator.generations, options.page_size),
        weight_version=model_options.weight_version,
    )
    engine.warm_up(cuda_graphs=options.cuda_graphs)
    return engine
