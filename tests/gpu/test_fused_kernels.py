"""The fused kernels against their torch twins in float32, over random shapes in bfloat16; every output is poisoned first."""

import numpy as np
import pytest
import torch

from common.kernels.attention import AttentionPlan
from common.kernels.interface import ExpertMatrices, Lanes
from common.kernels.torch_attention import TorchAttention
from common.kernels.torch_kernels import TorchKernels
from common.memory.kv_pool import KvPool
from common.memory.layout import KvLayout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BF16 = torch.bfloat16
DTYPE_ERROR = 8e-3
TWIN = TorchKernels()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def fused():
    from common.kernels.fused_kernels import FusedKernels

    return FusedKernels()


def random(*sizes: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(sizes, device="cuda") * scale).to(BF16)


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.float(), theirs.float()
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-9))


@pytest.mark.parametrize(("tokens", "hidden", "added"), [(1, 64, None), (7, 2048, 1), (300, 2048, 8), (33, 96, 3)])
def test_add_norm(fused, tokens: int, hidden: int, added: int | None):
    x, weight = random(tokens, hidden), random(hidden)
    delta = None if added is None else random(tokens, added, hidden).squeeze(1)
    ours = fused.add_norm(x, delta, weight, 1e-6)
    theirs = TWIN.add_norm(x.float(), None if delta is None else delta.float(), weight.float(), 1e-6)
    assert max(error(our, their) for our, their in zip(ours, theirs, strict=True)) < DTYPE_ERROR


def pools(page_size: int, num_pages: int, heads: int, dim: int) -> tuple[KvPool, KvPool]:
    layout = KvLayout(
        page_size=page_size, num_layers=3, num_kv_heads=heads, head_dim=dim, dtype="bfloat16", itemsize_bytes=2
    )
    made = [KvPool(layout, num_pages, torch.device("cuda"), dtype) for dtype in (BF16, torch.float32)]
    for pool in made:
        pool.pages.fill_(7.0)
    return made[0], made[1]


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dim", "page_size"), [(1, 32, 4, 128, 16), (50, 6, 3, 64, 1), (200, 5, 1, 128, 4)]
)
def test_norm_rotate_store(fused, tokens: int, heads: int, kv_heads: int, dim: int, page_size: int):
    """Queries and the whole pool agree, so nothing but the tokens' slots was written."""
    ours, theirs = pools(page_size, -(-300 // page_size), kv_heads, dim)
    qkv, q_norm, k_norm = random(tokens, (heads + 2 * kv_heads) * dim), random(dim), random(dim)
    angles = torch.randn(500, dim // 2, device="cuda").repeat(1, 2)
    tables = angles.cos().to(BF16), angles.sin().to(BF16)
    positions = torch.randint(500, (tokens,), device="cuda")
    slots = torch.randperm(300, device="cuda")[:tokens]
    our_q = fused.norm_rotate_store(qkv, q_norm, k_norm, 1e-6, *tables, positions, *ours.layer(1), slots)
    cos, sin = (table.float() for table in tables)
    their_q = TWIN.norm_rotate_store(
        qkv.float(), q_norm.float(), k_norm.float(), 1e-6, cos, sin, positions, *theirs.layer(1), slots
    )
    assert error(our_q, their_q) < DTYPE_ERROR
    assert error(ours.pages, theirs.pages) < DTYPE_ERROR
    untouched = theirs.pages == 7.0
    assert torch.equal(ours.pages[untouched].float(), theirs.pages[untouched])


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize(
    ("tokens", "padding", "experts", "top_k", "hidden", "width"),
    [
        (1, 0, 128, 8, 2048, 768),
        (2, 2, 128, 8, 2048, 768),
        (16, 5, 128, 8, 2048, 768),
        (64, 0, 128, 8, 2048, 768),
        (256, 3, 128, 8, 2048, 768),
        (700, 0, 128, 8, 2048, 768),
        (3000, 0, 128, 8, 2048, 768),
        (37, 2, 300, 8, 64, 8),
        (1500, 0, 300, 8, 64, 8),
        (10, 1, 7, 2, 200, 40),
    ],
)
def test_experts(
    fused, tokens: int, padding: int, experts: int, top_k: int, hidden: int, width: int, norm_topk_prob: bool
):
    """Rows are those of the router's own logits, and the outputs those of these rows; padding gets no expert."""
    x = random(tokens + padding, hidden)
    gate, gate_up, down = (
        random(experts, hidden, scale=4 * hidden**-0.5),
        random(experts, 2 * width, hidden, scale=hidden**-0.5),
        random(experts, hidden, width, scale=width**-0.5),
    )
    dtype = torch.uint8 if experts <= 256 else torch.uint16
    captured = torch.full((tokens + padding, 3, top_k), 255, dtype=dtype, device="cuda")
    counts = torch.zeros(experts, dtype=torch.int32, device="cuda")
    out = fused.experts(
        x,
        gate,
        ExpertMatrices(gate_up),
        ExpertMatrices(down),
        norm_topk_prob=norm_topk_prob,
        ids_TK=captured[:, 1],
        counts_E=counts,
        num_tokens=torch.tensor([tokens], device="cuda"),
    )
    ids = captured[:tokens, 1].long()
    logits = torch.nn.functional.linear(x, gate)[:tokens].float()
    probabilities = logits.softmax(dim=-1)
    best = probabilities.topk(top_k).values
    # Equal logits are common in bfloat16: the experts may differ, their probabilities may not.
    assert torch.allclose(probabilities.gather(1, ids), best, rtol=1e-5)
    assert all(len(set(row)) == top_k for row in ids.tolist())
    assert torch.equal(counts.long(), ids.flatten().bincount(minlength=experts))
    captured = captured.to(torch.int32)
    assert (captured[:, (0, 2)] == 255).all()
    assert (captured[tokens:] == 255).all()

    weights = probabilities.gather(1, ids)
    if norm_topk_prob:
        weights = weights / weights.sum(dim=1, keepdim=True)
    expected = torch.zeros(tokens, hidden, device="cuda")
    for expert in range(experts):
        token, rank = (ids == expert).nonzero(as_tuple=True)
        first, second = (x[token].float() @ gate_up[expert].float().T).chunk(2, dim=1)
        product = torch.nn.functional.silu(first) * second @ down[expert].float().T
        expected.index_add_(0, token, product * weights[token, rank, None])
    ours = out[:tokens] if out.dim() == 2 else out[:tokens].float().sum(dim=1)
    assert error(ours, expected) < DTYPE_ERROR


def test_expert_outputs_do_not_depend_on_the_other_tokens(fused):
    """A token gets the same bits whoever shares its step, as long as the step has the same tiles."""
    x = random(48, 2048)
    gate_up, down = random(128, 1536, 2048, scale=0.02), random(128, 2048, 768, scale=0.03)
    weights = random(128, 2048), ExpertMatrices(gate_up), ExpertMatrices(down)

    def run(hidden: torch.Tensor) -> torch.Tensor:
        return fused.experts(
            hidden,
            *weights,
            norm_topk_prob=True,
            ids_TK=torch.empty((len(hidden), 8), dtype=torch.uint8, device="cuda"),
            counts_E=torch.zeros(128, dtype=torch.int32, device="cuda"),
            num_tokens=None,
        )

    order = torch.randperm(48, device="cuda")
    assert torch.equal(run(x)[order], run(x[order]))
    others = torch.cat((x[:20], random(28, 2048)))
    assert torch.equal(run(x)[:20], run(others)[:20])


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_route_chooses_as_experts_does(fused, norm_topk_prob: bool):
    x, gate = random(40, 256), random(64, 256, scale=0.2)
    matrices = ExpertMatrices(random(64, 64, 256)), ExpertMatrices(random(64, 256, 32))
    ids = torch.full((2, 40, 2, 8), 255, dtype=torch.uint8, device="cuda")
    num_tokens = torch.tensor([33], device="cuda")
    options = {"norm_topk_prob": norm_topk_prob, "num_tokens": num_tokens}
    counts = torch.zeros(64, dtype=torch.int32, device="cuda")
    delta = fused.experts(x, gate, *matrices, ids_TK=ids[0, :, 1], counts_E=counts, **options)
    weights = fused.route(x, gate, ids_TK=ids[1, :, 1], **options)
    assert torch.equal(ids[0], ids[1])
    assert (ids[:, 33:] == 255).all()
    assert weights.dtype == BF16
    lanes = Lanes(num_tokens, 40)
    out = fused.run_experts(x, ids[1, :, 1], weights, *matrices, first_expert=0, lanes=lanes)
    assert torch.equal(out[:33], fused.add_up(delta)[:33])
    assert (out[33:] == 0).all()


@pytest.mark.parametrize(("tokens", "top_k", "hidden"), [(1, 8, 2048), (70, 3, 200)])
def test_add_up(fused, tokens: int, top_k: int, hidden: int):
    delta = random(tokens, top_k, hidden)
    added = fused.add_up(delta)
    assert error(added, delta.float().sum(dim=1)) < DTYPE_ERROR
    assert fused.add_up(added) is added


# ------------------------------------------------------------------------------------------------ experts over many ranks


@pytest.fixture
def _poisoned():
    """Fresh memory is full of NaN and of the largest integers, in a graph at every replay."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1, device="cuda").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


class RankedStep:
    """Lanes of all attention groups, in buffers that a graph may be captured over, and all experts."""

    def __init__(
        self, groups: int, per_group: int, *, experts: int, top_k: int = 8, hidden: int = 2048, width: int = 768
    ) -> None:
        total = groups * per_group
        self.lanes = Lanes(torch.zeros(groups, dtype=torch.int64, device="cuda"), per_group)
        self.x, self.weights = random(total, hidden), random(total, top_k)
        # A strided view, as of the rows of one layer.
        self.ids = torch.zeros((total, 3, top_k), dtype=torch.uint8, device="cuda")[:, 1]
        self.gate_up = random(experts, 2 * width, hidden, scale=hidden**-0.5)
        self.down = random(experts, hidden, width, scale=width**-0.5)

    def refill(self, num_tokens: list[int]) -> None:
        """Other tokens, `num_tokens` in each group; what stands in the other lanes is poison."""
        total, top_k = self.ids.shape
        self.lanes.num_tokens_M.copy_(torch.tensor(num_tokens))
        self.x.copy_(random(*self.x.shape))
        self.weights.copy_(torch.rand_like(self.weights))
        self.ids.copy_(torch.rand(total, len(self.down), device="cuda").argsort(dim=1)[:, :top_k])
        lane = torch.arange(total, device="cuda")
        self.holds = lane % self.lanes.per_group < self.lanes.num_tokens_M[lane // self.lanes.per_group]
        self.x[~self.holds] = torch.nan
        self.weights[~self.holds] = torch.nan

    def share(self, experts: slice = slice(None), width: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor, int]:
        """One rank's matrices, and which its first expert is."""
        gate, up = self.gate_up[experts].chunk(2, dim=1)
        gate_up = torch.cat([gate[:, width], up[:, width]], dim=1)
        return gate_up, self.down[experts, :, width].contiguous(), experts.indices(len(self.down))[0]

    def run(self, kernels, gate_up: torch.Tensor, down: torch.Tensor, first_expert: int) -> torch.Tensor:
        dtype = torch.float32 if kernels is TWIN else BF16
        x, weights = self.x.to(dtype), self.weights.to(dtype)
        matrices = ExpertMatrices(gate_up.to(dtype)), ExpertMatrices(down.to(dtype))
        return kernels.run_experts(x, self.ids, weights, *matrices, first_expert=first_expert, lanes=self.lanes)


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.filterwarnings("ignore:.*determinis")
@pytest.mark.parametrize("split", ["experts", "width"])
@pytest.mark.parametrize(
    ("num_tokens", "per_group", "experts"),
    [
        ([1], 1, 128),
        ([0, 1], 1, 128),
        ([3, 0, 8, 5], 8, 128),
        ([64, 64], 64, 128),
        ([0, 0, 0, 0], 200, 128),
        ([300, 0, 17, 299], 300, 128),
        ([1000, 1000], 1000, 128),
        ([40, 3, 0], 50, 12),
        ([400, 3, 0], 400, 12),
    ],
)
def test_shares_of_experts(fused, num_tokens: list[int], per_group: int, experts: int, split: str):
    """Every rank's share is its twin's, and all of them are the whole; tokens with nothing here get zeros, and empty lanes too."""
    step = RankedStep(len(num_tokens), per_group, experts=experts)
    step.refill(num_tokens)
    size = (experts if split == "experts" else 768) // 4
    spans = [slice(start, start + size) for start in range(0, 4 * size, size)]
    added = torch.zeros(len(step.x), 2048, device="cuda")
    for span in spans:
        gate_up, down, first = step.share(**{split: span})
        ours = step.run(fused, gate_up, down, first)
        assert ours.dtype == BF16
        assert error(ours, step.run(TWIN, gate_up, down, first)) < DTYPE_ERROR
        ids = step.ids.long()
        is_busy = ((ids >= first) & (ids < first + len(down))).any(dim=1) & step.holds
        assert (ours[~is_busy] == 0).all()
        added += ours.float()
    assert error(added, step.run(TWIN, *step.share())) < DTYPE_ERROR


def test_all_experts_are_elsewhere(fused):
    for per_group in (1, 50, 1000):
        step = RankedStep(2, per_group, experts=16, hidden=256, width=64)
        step.refill([per_group, per_group])
        gate_up, down, _ = step.share(slice(4))
        for first in (16, 200):
            assert (step.run(fused, gate_up, down, first) == 0).all()


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.filterwarnings("ignore:.*determinis")
@pytest.mark.parametrize(("groups", "per_group"), [(2, 1), (4, 16), (4, 200)])
def test_shares_of_experts_in_a_graph(fused, groups: int, per_group: int):
    """One graph, replayed with other tokens in other lanes: in each way through the products."""
    step = RankedStep(groups, per_group, experts=64)
    gate_up, down, first = step.share(slice(16, 32))
    step.refill([per_group] * groups)
    step.run(fused, gate_up, down, first)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = step.run(fused, gate_up, down, first)
    fillings = [[per_group] * groups, [0] * groups, [per_group] + [0] * (groups - 1), [0] * (groups - 1) + [1]]
    for num_tokens in fillings * 2:
        step.refill(num_tokens)
        graph.replay()
        assert error(ours, step.run(TWIN, gate_up, down, first)) < DTYPE_ERROR
        assert (ours[~step.holds] == 0).all()


# ------------------------------------------------------------------------------------------------ drawing


@pytest.mark.parametrize(("rows", "vocab"), [(1, 151_936), (5, 4096), (64, 10_007), (9, 40)])
def test_draw(fused, rows: int, vocab: int):
    """The twin's tokens, but where two candidates race within rounding; its logprobs; greedy rows exactly."""
    logits = random(rows, vocab, scale=3.0)
    temperatures = torch.where(torch.arange(rows, device="cuda") % 3 == 1, 0.0, 0.8)
    seeds = torch.randint(2**63 - 1, (rows,), device="cuda")
    positions = torch.randint(40_000, (rows,), device="cuda")
    for shift in range(20):
        tokens, logprobs = fused.draw(logits, temperatures, seeds, positions + shift)
        expected, expected_logprobs = TWIN.draw(logits, temperatures, seeds, positions + shift)
        differ = tokens != expected
        assert int(differ.sum()) <= rows // 20 + (vocab > 100_000)
        assert torch.allclose(logprobs[~differ], expected_logprobs[~differ], atol=1e-4)
        greedy = temperatures == 0
        assert torch.equal(logits.gather(1, tokens[:, None])[greedy], logits.gather(1, expected[:, None])[greedy])


# ------------------------------------------------------------------------------------------------ attention


def plan_of(contexts: list[int], queries: list[int], page_size: int, num_pages: int) -> AttentionPlan:
    pages = [-(-context // page_size) for context in contexts]
    order = np.random.default_rng(1).permutation(num_pages)[: sum(pages)]
    starts = [np.concatenate(([0], np.cumsum(counts))).astype(np.int32) for counts in (queries, pages)]
    return AttentionPlan(starts[0], np.array(contexts, dtype=np.int32), starts[1], order.astype(np.int32))


def upload(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).cuda()


def attention_pair(page_size: int):
    from common.kernels.flashinfer_attention import FlashinferAttention

    ours, theirs = pools(page_size, 4000 // page_size, 4, 128)
    ours.pages.normal_()
    theirs.pages.copy_(ours.pages)
    backend = FlashinferAttention(
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        page_size=page_size,
        max_batch_size=8,
        dtype=BF16,
        device=torch.device("cuda", 0),
    )
    return ours, theirs, backend


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize(
    ("contexts", "queries"), [([1], [1]), ([700, 33, 1500], [700, 33, 1500]), ([900, 640, 17], [100, 1, 17])]
)
def test_prefill_attention(contexts: list[int], queries: list[int], page_size: int):
    ours, theirs, backend = attention_pair(page_size)
    plan = plan_of(contexts, queries, page_size, 4000 // page_size)
    q = random(sum(queries), 32, 128)
    out = backend.plan(plan, upload)(q, *ours.layer(2))
    expected = TorchAttention().plan(plan, upload)(q.float(), *theirs.layer(2))
    assert error(out, expected) < DTYPE_ERROR


@pytest.mark.parametrize("page_size", [1, 16])
def test_decode_attention_in_a_fixed_batch(page_size: int):
    """Ten plans in turn through the same buffers, with padding lanes and contexts that change."""
    ours, theirs, backend = attention_pair(page_size)
    buffer = torch.zeros(50_000, dtype=torch.int32, device="cuda")
    decode = backend.fixed_decode(8, buffer)
    for turn in range(10):
        contexts = [1 + (turn * 37 + lane * 211) % 480 for lane in range(1 + turn % 8)]
        plan = plan_of(contexts, [1] * len(contexts), page_size, 4000 // page_size)
        packed = decode.pack(plan, ours.padding_page)
        buffer[: len(packed)].copy_(upload(packed))
        decode.plan(packed)
        q = random(8, 32, 128)
        out = decode(q, *ours.layer(0))[: len(contexts)]
        expected = TorchAttention().plan(plan, upload)(q[: len(contexts)].float(), *theirs.layer(0))
        assert error(out, expected) < DTYPE_ERROR
