"""The torch kernels against plain loops and against transformers' own modules."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeRMSNorm,
    Qwen3MoeSparseMoeBlock,
    apply_rotary_pos_emb,
)

from common.kernels import reference as kernels
from common.kernels.attention import AttentionPlan
from common.kernels.interface import ExpertMatrices, Lanes
from common.kernels.torch_attention import TorchAttention
from common.kernels.torch_kernels import TorchKernels
from common.memory.kv_pool import KvPool
from common.memory.layout import KvLayout


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_pool(page_size: int, num_pages: int, num_kv_heads: int = 2, head_dim: int = 8) -> KvPool:
    layout = KvLayout(
        page_size=page_size,
        num_layers=3,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype="float32",
        itemsize_bytes=4,
    )
    return KvPool(layout, num_pages, torch.device("cpu"), torch.float32)


def int32(values) -> np.ndarray:
    return np.array(values, dtype=np.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_transformers(dtype):
    theirs = Qwen3MoeRMSNorm(32, eps=1e-5).to(dtype)
    theirs.weight.data.normal_()
    x = torch.randn(5, 3, 32).to(dtype)
    ours = kernels.rms_norm(x, theirs.weight, 1e-5)
    assert ours.dtype == dtype
    assert torch.equal(ours, theirs(x))


def test_rotary_is_transformers():
    q, k, angles = torch.randn(7, 4, 16), torch.randn(7, 2, 16), torch.randn(7, 8).repeat(1, 2)
    ours = kernels.rotary(q, k, angles.cos(), angles.sin())
    theirs = apply_rotary_pos_emb(q, k, angles.cos(), angles.sin(), unsqueeze_dim=1)
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(our, their)


@pytest.mark.parametrize("page_size", [1, 16])
def test_store_kv_writes_its_slots_and_no_others(page_size):
    pool = make_pool(page_size, 64 // page_size)
    slots = torch.randperm(64)[:20]
    k, v = torch.randn(20, 2, 8), torch.randn(20, 2, 8)
    kernels.store_kv(*pool.layer(1), slots, k, v)
    assert (pool.pages != 0).sum() == k.numel() + v.numel()
    for token, slot in enumerate(slots.tolist()):
        page = pool.pages[slot // page_size, :, 1, :, slot % page_size]
        assert torch.equal(page[:, 0], k[token])
        assert torch.equal(page[:, 1], v[token])


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize(
    "requests", [[(1, 1)], [(9, 9)], [(1, 40)], [(7, 33), (1, 17), (16, 16), (1, 1), (5, 6)], [(1, 3), (1, 30)]]
)
def test_paged_attention_is_the_sum_it_stands_for(page_size, requests):
    """`requests` are (queries, context) pairs; their pages lie shuffled in the pool."""
    num_heads, num_kv_heads, head_dim = 4, 2, 8
    pages_of = [-(-context // page_size) for _, context in requests]
    pool = make_pool(page_size, sum(pages_of) + 3)
    pool.pages.normal_()
    shuffled = torch.randperm(sum(pages_of) + 3)[: sum(pages_of)]
    plan = AttentionPlan(
        query_starts=int32([sum(queries for queries, _ in requests[:i]) for i in range(len(requests) + 1)]),
        context_tokens=int32([context for _, context in requests]),
        page_starts=int32([sum(pages_of[:i]) for i in range(len(requests) + 1)]),
        pages=int32(shuffled.tolist()),
    )
    q = torch.randn(plan.query_starts[-1], num_heads, head_dim)
    k_cache, v_cache = pool.layer(2)
    out = TorchAttention().plan(plan, torch.from_numpy)(q, k_cache, v_cache)
    for i, (queries, context) in enumerate(requests):
        pages = shuffled[plan.page_starts[i] : plan.page_starts[i + 1]].tolist()
        slots = [(page, slot) for page in pages for slot in range(page_size)][:context]
        for query in range(queries):
            seen = slots[: context - queries + query + 1]
            for head in range(num_heads):
                kv_head = head // (num_heads // num_kv_heads)
                keys = torch.stack([k_cache[page, kv_head, slot] for page, slot in seen])
                values = torch.stack([v_cache[page, kv_head, slot] for page, slot in seen])
                token = plan.query_starts[i] + query
                scores = (keys @ q[token, head] / math.sqrt(head_dim)).softmax(0)
                torch.testing.assert_close(out[token, head], scores @ values, atol=1e-5, rtol=1e-5)


def stored(gate_up: torch.Tensor, down: torch.Tensor) -> tuple[ExpertMatrices, ExpertMatrices]:
    return ExpertMatrices(gate_up), ExpertMatrices(down)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_experts_are_transformers(norm_topk_prob, dtype, tolerance):
    config = Qwen3MoeConfig(
        hidden_size=32, moe_intermediate_size=16, num_experts=12, num_experts_per_tok=3, norm_topk_prob=norm_topk_prob
    )
    config._experts_implementation = "eager"
    block = Qwen3MoeSparseMoeBlock(config).requires_grad_(False)
    for parameter in block.parameters():
        parameter.normal_(0, 0.2)
    block = block.to(dtype)
    hidden = torch.randn(21, 32).to(dtype)
    _, their_weights, their_ids = block.gate(hidden)
    weights, ids = kernels.route(hidden, block.gate.weight, 3, norm_topk_prob)
    assert torch.equal(ids, their_ids)
    assert torch.equal(weights, their_weights)
    assert weights.dtype == dtype
    assert ids.dtype == torch.int64
    out = kernels.moe_experts(hidden, ids, weights, *stored(block.experts.gate_up_proj, block.experts.down_proj))
    assert out.dtype == dtype
    torch.testing.assert_close(out, block(hidden[None])[0], atol=tolerance, rtol=tolerance)


def test_experts_with_one_token_and_with_none_for_most_experts():
    gate_up, down = torch.randn(300, 8, 6), torch.randn(300, 6, 4)
    hidden, ids = torch.randn(1, 6), torch.tensor([[299, 0]])
    weights = torch.tensor([[0.25, 0.75]])
    expected = sum(
        weight * (down[expert] @ kernels.silu_and_mul(gate_up[expert] @ hidden[0]))
        for expert, weight in ((299, 0.25), (0, 0.75))
    )
    out = kernels.moe_experts(hidden, ids, weights, *stored(gate_up, down))
    torch.testing.assert_close(out[0], expected, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------ experts over many ranks


@dataclass
class ExpertStep:
    """Tokens of all attention groups, and all experts, in float64."""

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    lanes: Lanes | None
    holds_token: list[bool]

    def run(self, experts: slice = slice(None), width: slice = slice(None)) -> torch.Tensor:
        """What a rank with these experts, and this part of their width, computes."""
        first_expert, _, _ = experts.indices(len(self.down))
        gate, up = self.gate_up[experts].chunk(2, dim=1)
        return TorchKernels().run_experts(
            self.hidden,
            self.ids,
            self.weights,
            *stored(torch.cat([gate[:, width], up[:, width]], dim=1), self.down[experts, :, width]),
            first_expert=first_expert,
            lanes=self.lanes,
        )

    def expected(self, experts: range) -> torch.Tensor:
        """The same by plain loops."""
        out = torch.zeros_like(self.hidden)
        for n, holds_token in enumerate(self.holds_token):
            for k, expert in enumerate(self.ids[n].tolist()):
                if holds_token and expert in experts:
                    gate, up = (self.gate_up[expert] @ self.hidden[n]).chunk(2)
                    inner = gate / (1 + torch.exp(-gate)) * up
                    out[n] += self.weights[n, k] * (self.down[expert] @ inner)
        return out


@st.composite
def expert_steps(draw: st.DrawFn) -> ExpertStep:
    """Groups may be empty, full or anything between; what stands in lanes without a token is poison."""
    num_experts = draw(st.sampled_from([1, 2, 6, 12]))
    top_k = draw(st.integers(1, min(4, num_experts)))
    lanes: Lanes | None = None
    if draw(st.booleans()):
        per_group = draw(st.integers(1, 5))
        num_tokens = draw(st.lists(st.integers(0, per_group), min_size=1, max_size=4))
        lanes = Lanes(torch.tensor(num_tokens), per_group)
        holds_token = [lane < num for num in num_tokens for lane in range(per_group)]
    else:
        holds_token = [True] * draw(st.integers(0, 12))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    total, dtype = len(holds_token), torch.float64
    hidden, weights = torch.randn(total, 6, dtype=dtype), torch.rand(total, top_k, dtype=dtype)
    ids = torch.rand(total, num_experts).argsort(dim=1)[:, :top_k]
    is_empty = ~torch.tensor(holds_token, dtype=torch.bool)
    hidden[is_empty], weights[is_empty] = torch.nan, torch.nan
    captured = torch.zeros(total, 2, top_k, dtype=draw(st.sampled_from([torch.uint8, torch.uint16, torch.int32])))
    captured[:, 1] = ids.to(captured.dtype)
    return ExpertStep(
        hidden=hidden,
        ids=captured[:, 1],
        weights=weights,
        gate_up=torch.randn(num_experts, 24, 6, dtype=dtype),
        down=torch.randn(num_experts, 6, 12, dtype=dtype),
        lanes=lanes,
        holds_token=holds_token,
    )


@settings(max_examples=100, deadline=None)
@given(step=expert_steps(), data=st.data())
def test_some_of_the_experts_are_the_sum_they_stand_for(step: ExpertStep, data: st.DataObject):
    first = data.draw(st.integers(0, len(step.down) - 1))
    stop = data.draw(st.integers(first + 1, len(step.down)))
    out = step.run(slice(first, stop))
    torch.testing.assert_close(out, step.expected(range(first, stop)), atol=1e-12, rtol=1e-9)
    assert (out[~torch.tensor(step.holds_token, dtype=torch.bool)] == 0).all()


@settings(max_examples=60, deadline=None)
@given(step=expert_steps(), num_ranks=st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_the_shares_of_all_ranks_are_the_whole(step: ExpertStep, num_ranks: int):
    """Whether the ranks split the experts or their width."""
    num_experts = len(step.down)
    whole = step.expected(range(num_experts))
    size = 12 // num_ranks
    by_width = [step.run(width=slice(start, start + size)) for start in range(0, 12, size)]
    torch.testing.assert_close(sum(by_width), whole, atol=1e-12, rtol=1e-9)
    size = -(-num_experts // num_ranks)
    by_experts = [step.run(slice(start, start + size)) for start in range(0, num_experts, size)]
    torch.testing.assert_close(sum(by_experts), whole, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_route_and_run_are_experts(dtype, norm_topk_prob):
    """To the bit; and in a padded batch the tokens get what they get alone, and the ids of padding stay as they were."""
    hidden, gate = torch.randn(9, 16).to(dtype), torch.randn(7, 16).to(dtype)
    matrices = stored(torch.randn(7, 24, 16).to(dtype), torch.randn(7, 16, 12).to(dtype))
    ids = torch.full((5, 9, 2, 3), 99, dtype=torch.uint8)
    counts = torch.zeros(7, dtype=torch.int32)
    options = {"norm_topk_prob": norm_topk_prob}
    ours = TorchKernels()
    whole = ours.experts(hidden, gate, *matrices, **options, ids_TK=ids[0, :, 1], counts_E=counts, num_tokens=None)
    weights = ours.route(hidden, gate, **options, ids_TK=ids[1, :, 1], num_tokens=None)
    assert weights.dtype == dtype
    assert torch.equal(ids[0], ids[1])
    assert (ids[0, :, 1] < 7).all()
    assert (ids[:2, :, 0] == 99).all()
    run = ours.run_experts(hidden, ids[1, :, 1], weights, *matrices, first_expert=0, lanes=None)
    assert torch.equal(run, whole)
    their_weights, their_ids = kernels.route(hidden, gate, 3, norm_topk_prob)
    assert torch.equal(run, kernels.moe_experts(hidden, their_ids, their_weights, *matrices))

    hidden[6:] = torch.nan
    num_tokens = torch.tensor([6])
    out = ours.experts(hidden, gate, *matrices, **options, ids_TK=ids[2, :, 1], counts_E=counts, num_tokens=num_tokens)
    alone = ours.experts(hidden[:6], gate, *matrices, **options, ids_TK=ids[3, :6, 1], counts_E=counts, num_tokens=None)
    assert torch.equal(out[:6], alone)
    assert torch.equal(ids[2], ids[3])
    assert torch.equal(ids[2, :6], ids[0, :6])
    ours.route(hidden, gate, **options, ids_TK=ids[4, :, 1], num_tokens=num_tokens)
    assert torch.equal(ids[4], ids[3])
    assert (ids[4, 6:] == 99).all()


def test_what_experts_return_is_added_up_once():
    delta = torch.randn(5, 8, 64).to(torch.bfloat16)
    added = TorchKernels().add_up(delta)
    assert torch.equal(added, delta.float().sum(dim=1).to(torch.bfloat16))
    assert TorchKernels().add_up(added) is added


# ------------------------------------------------------------------------------------------------ attention, by token


@settings(max_examples=60, deadline=None)
@given(
    entries=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=6),
    page_size=st.sampled_from([1, 3, 4]),
)
def test_attention_by_token_is_the_attention(entries: list[tuple[int, int]], page_size: int):
    """A plan in which every token is a request of its own says the same: contexts, pages, and so the result."""
    queries, contexts = [q for q, _ in entries], [q + before for q, before in entries]
    num_pages = [-(-context // page_size) for context in contexts]
    pool = make_pool(page_size, sum(num_pages))
    pool.pages.normal_()
    pages = torch.randperm(sum(num_pages)).numpy()
    starts = [np.concatenate(([0], np.cumsum(counts))) for counts in (queries, num_pages)]
    plan = AttentionPlan(*(np.asarray(a, dtype=np.int32) for a in (starts[0], contexts, starts[1], pages)))
    by_token = plan.per_token(page_size)
    assert by_token.context_tokens.tolist() == [before + i + 1 for q, before in entries for i in range(q)]
    assert np.diff(by_token.page_starts).tolist() == [-(-c // page_size) for c in by_token.context_tokens]
    assert all(array.dtype == np.int32 for array in (by_token.pages, by_token.page_starts, by_token.query_starts))
    q_THd = torch.randn(sum(queries), 4, 8)
    ours, theirs = (TorchAttention().plan(p, torch.from_numpy)(q_THd, *pool.layer(1)) for p in (by_token, plan))
    assert torch.allclose(ours, theirs, atol=1e-5)
