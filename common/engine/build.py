"""From options to a running rank: the model's part loaded, all memory allocated, the other ranks met.

A rank is an `Engine`, or, if it does not lead its attention group, a `Follower`.
"""

from typing import NamedTuple

import torch

from common.config import EngineOptions, ModelOptions
from common.engine.backends import choose_backends
from common.engine.background import Background
from common.engine.capacity import CapacityPlan, plan_capacity
from common.engine.device import Device, open_device
from common.engine.engine import Engine
from common.engine.follower import FollowerLink, follow
from common.engine.forward_pass import ForwardPass
from common.engine.mates import Mates
from common.memory.kv_pool import KvPool
from common.memory.layout import KvLayout
from common.memory.page_allocator import PageAllocator
from common.memory.request_table import RequestTable
from common.models.config import ModelConfig, load_model_config, resolve_checkpoint
from common.models.registry import build_model, resolve_dtype
from common.ranks import Rank, check_fits
from common.routed_experts.capture import RoutedExpertsCapturer
from common.routed_experts.host_cache import HostCache
from common.routed_experts.spec import RowSpec


class EngineParts(NamedTuple):
    """The replaceable parts of an engine; tests put in ones that misbehave, to show that the checks can fail."""

    device: Device | None = None
    """None: the one that the options name."""
    engine: type[Engine] = Engine
    capturer: type[RoutedExpertsCapturer] = RoutedExpertsCapturer
    host_cache: type[HostCache] = HostCache


class Follower(NamedTuple):
    """A rank that runs what its group's leader runs."""

    forward: ForwardPass
    device: Device
    link: FollowerLink

    def run(self, background: Background) -> None:
        """Follow until the leader ends; raises what is wrong with `background`, now and then."""
        follow(self.forward, self.device, self.link, background)


class _Rank(NamedTuple):
    """What leaders and followers are made of."""

    config: ModelConfig
    capacity: CapacityPlan
    rows: RowSpec
    device: Device
    forward: ForwardPass
    table: RequestTable
    capturer: RoutedExpertsCapturer


def build_engine(
    model_options: ModelOptions,
    options: EngineOptions,
    *,
    chunked_prefill_tokens: int,
    mates: Mates = Mates(),
    parts: EngineParts = EngineParts(),
) -> Engine:
    """Make a leader. Raises UsageError or CheckpointError for what the operator can mend."""
    made = _build(model_options, options, chunked_prefill_tokens, mates, parts)
    allocator = PageAllocator(made.capacity.num_pages)
    return parts.engine(
        config=made.config,
        capacity=made.capacity,
        device=made.device,
        forward=made.forward,
        table=made.table,
        allocator=allocator,
        capturer=made.capturer,
        host_cache=parts.host_cache(made.rows, allocator.generations, options.page_size),
        weight_version=model_options.weight_version,
        lockstep=mates.lockstep(),
        followers=mates.followers(),
    )


def build_follower(
    model_options: ModelOptions,
    options: EngineOptions,
    *,
    chunked_prefill_tokens: int,
    mates: Mates,
    parts: EngineParts = EngineParts(),
) -> Follower:
    """Make a follower; its leader is made of the same options. Raises as `build_engine` does."""
    made = _build(model_options, options, chunked_prefill_tokens, mates, parts)
    assert mates.leader_link is not None
    return Follower(made.forward, made.device, mates.leader_link)


def _build(
    model_options: ModelOptions, options: EngineOptions, chunked_prefill_tokens: int, mates: Mates, parts: EngineParts
) -> _Rank:
    rank = mates.rank
    config = load_model_config(resolve_checkpoint(model_options.model))
    check_fits(
        rank.of,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        intermediate_size=config.intermediate_size,
        moe_intermediate_size=config.moe_intermediate_size,
        num_experts=config.num_experts,
    )
    device = parts.device or open_device(options, rank)
    dtype = resolve_dtype(config, model_options)
    backends = choose_backends(options, config, dtype, device.torch_device, rank)
    collectives = mates.collectives(device.torch_device)
    model = build_model(config, model_options, device.torch_device, backends.kernels, collectives)
    layout = _layout_of(config, options, dtype, rank)
    rows = RowSpec(
        num_experts=config.num_experts,
        top_k=config.top_k,
        layer_ids=config.moe_layer_ids,
        num_hidden_layers=config.num_hidden_layers,
    )
    budget_bytes = device.pool_budget_bytes(options.memory_fraction)
    if budget_bytes is not None:
        # The ranks of a group have the same pages, so as many as fit the one with the least memory.
        budget_bytes = collectives.smallest(budget_bytes, device.torch_device)
    capacity = plan_capacity(
        options,
        layout,
        rows,
        vocab_size=config.vocab_size,
        context_tokens=model_options.context_tokens or config.max_position_embeddings,
        chunked_prefill_tokens=chunked_prefill_tokens,
        budget_bytes=budget_bytes,
        dp=rank.of.dp,
        gathered_token_bytes=_gathered_token_bytes(config, dtype, rank),
    )
    table = RequestTable(capacity.max_running_requests, capacity.pages_per_request, device.torch_device)
    capturer = parts.capturer(rows, capacity.max_step_tokens, device.torch_device)
    forward = ForwardPass(
        model=model,
        capacity=capacity,
        device=device,
        backends=backends,
        kv_pool=KvPool(layout, capacity.num_pages, device.torch_device, dtype),
        routing=capturer,
        collectives=collectives,
        last_tokens_R=table.last_tokens,
        cuda_graphs=options.cuda_graphs,
    )
    forward.warm_up()
    return _Rank(config, capacity, rows, device, forward, table, capturer)


def _gathered_token_bytes(config: ModelConfig, dtype: torch.dtype, rank: Rank) -> int:
    """What a token of any group takes on this rank while the experts run: gathered twice over, sorted by expert, and summed."""
    width = len(rank.expert_width(config.moe_intermediate_size))
    per_expert = 2 * config.hidden_size + 3 * width
    return (3 * config.hidden_size + config.top_k * per_expert) * dtype.itemsize


def _layout_of(config: ModelConfig, options: EngineOptions, dtype: torch.dtype, rank: Rank) -> KvLayout:
    heads = rank.kv_heads(config.num_key_value_heads)
    return KvLayout(
        page_size=options.page_size,
        num_layers=config.num_hidden_layers,
        num_kv_heads=len(heads),
        first_kv_head=heads.start,
        model_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        dtype=str(dtype).removeprefix("torch."),
        itemsize_bytes=dtype.itemsize,
    )
