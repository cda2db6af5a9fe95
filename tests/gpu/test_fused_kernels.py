"""The fused kernels against their torch twins in float32, over random shapes in bfloat16; every output is poisoned first."""

import numpy as np
import pytest
import torch

from common.kernels.attention import AttentionPlan
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
        gate_up,
        down,
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
    weights = random(128, 2048), random(128, 1536, 2048, scale=0.02), random(128, 2048, 768, scale=0.03)

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
