"""The Triton kernels on a CPU, by Triton's interpreter, against their torch twins: `python -m tests.support.interpreted_kernels`.

A process of its own, because TRITON_INTERPRET must be set before the kernels are defined. Prints one JSON object: for each check
what went wrong, or null. Experts run in float16: the interpreter has no bfloat16 products.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable

os.environ["TRITON_INTERPRET"] = "1"

import torch

from common.kernels import reference
from common.kernels.torch_kernels import TorchKernels
from common.kernels.triton import experts, grouped_experts, layer, sampling
from common.kernels.triton.routing import route
from common.memory.kv_pool import KvPool
from common.memory.layout import KvLayout

TWIN = TorchKernels()
HALF = torch.float16
CPU = torch.device("cpu")


def check_add_norm() -> None:
    for tokens, hidden, added in ((3, 48, None), (2, 96, 1), (5, 64, 8)):
        x, weight = torch.randn(tokens, hidden), torch.randn(hidden)
        delta = None if added is None else torch.randn(tokens, added, hidden).squeeze(1)
        for ours, theirs in zip(
            layer.add_norm(x, delta, weight, 1e-6), TWIN.add_norm(x, delta, weight, 1e-6), strict=True
        ):
            assert torch.allclose(ours, theirs, atol=1e-5)


def check_norm_rotate_store() -> None:
    for heads, kv_heads, dim, page_size in ((6, 2, 16, 4), (5, 3, 24, 1)):
        layout = KvLayout(
            page_size=page_size, num_layers=3, num_kv_heads=kv_heads, head_dim=dim, dtype="float32", itemsize_bytes=4
        )
        ours, theirs = (KvPool(layout, 32 // page_size, CPU, torch.float32) for _ in range(2))
        qkv, q_norm, k_norm = torch.randn(9, (heads + 2 * kv_heads) * dim), torch.randn(dim), torch.randn(dim)
        angles = torch.randn(50, dim // 2).repeat(1, 2)
        positions, slots = torch.randint(50, (9,)), torch.randperm(32)[:9]
        rest = (q_norm, k_norm, 1e-6, angles.cos(), angles.sin(), positions)
        our_q = layer.norm_rotate_store(qkv, *rest, *ours.layer(1), slots)
        their_q = TWIN.norm_rotate_store(qkv, *rest, *theirs.layer(1), slots)
        assert torch.allclose(our_q, their_q, atol=1e-5)
        assert torch.allclose(ours.pages, theirs.pages, atol=1e-5)


def check_experts(run: Callable[..., torch.Tensor], *, is_padded: bool = True) -> None:
    """Rows, counts, weights and outputs, with padding lanes, and with more experts than a byte can name."""
    for tokens, padding, num_experts, top_k, hidden, width in (
        (3, 0, 8, 2, 48, 24),
        (2, 2, 16, 4, 200, 40),
        (6, 0, 300, 8, 32, 16),
    ):
        padding *= is_padded
        for norm_topk_prob in (True, False):
            x = torch.randn(tokens + padding, hidden).to(HALF)
            gate = (torch.randn(num_experts, hidden) / hidden**0.5).to(HALF)
            gate_up = (torch.randn(num_experts, 2 * width, hidden) / hidden**0.5).to(HALF)
            down = (torch.randn(num_experts, hidden, width) / width**0.5).to(HALF)
            logits = torch.nn.functional.linear(x, gate)
            probabilities = logits[:tokens].softmax(dim=-1, dtype=torch.float32)
            ids = probabilities.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
            weights = probabilities.gather(1, ids)
            if norm_topk_prob:
                weights = weights / weights.sum(dim=1, keepdim=True)
            expected = reference.moe_experts(x[:tokens], ids, weights.to(HALF), gate_up, down)
            captured = torch.full((tokens + padding, 3, top_k), 255, dtype=torch.uint16)
            counts = torch.zeros(num_experts, dtype=torch.int32)
            routing = route(
                logits, captured[:, 1], counts, norm_topk_prob=norm_topk_prob, num_tokens=torch.tensor([tokens])
            )
            out = run(x, routing, gate_up, down)
            rows = captured.to(torch.int64)
            assert torch.equal(rows[:tokens, 1], ids)
            assert torch.equal(counts.long(), ids.flatten().bincount(minlength=num_experts))
            assert (rows[:, (0, 2)] == 255).all()
            assert (rows[tokens:] == 255).all()
            added = out[:tokens].float() if out.dim() == 2 else out[:tokens].float().sum(dim=1)
            assert torch.allclose(added, expected.float(), atol=0.01)


def check_ties() -> None:
    """Of equal logits the lower expert comes first, whatever their sign; infinities are logits like others."""
    logits = torch.tensor(
        [[0.5, -1.0, 0.5, 0.0, -0.0, 0.5], [-3.0, -3.0, -torch.inf, -2.0, -2.0, -60000.0]], dtype=HALF
    )
    ids = torch.empty(2, 5, dtype=torch.int32)
    route(logits, ids, torch.zeros(6, dtype=torch.int32), norm_topk_prob=True)
    assert ids[0, :3].tolist() == [0, 2, 5]
    assert ids[1].tolist() == [3, 4, 0, 1, 5]


def check_draw() -> None:
    logits = torch.randn(6, 5000) * 2
    temperatures = torch.tensor([1.0, 0.0, 0.7, 1.3, 1.0, 0.0])
    seeds = torch.tensor([1, 2, 2**63 - 1, 77, 0, 5])
    for first in range(2):
        positions = torch.arange(6) * 1000 + first
        tokens, logprobs = sampling.draw(logits, temperatures, seeds, positions)
        expected, expected_logprobs = TWIN.draw(logits, temperatures, seeds, positions)
        assert torch.equal(tokens, expected)
        assert torch.allclose(logprobs, expected_logprobs, atol=1e-5)


CHECKS: dict[str, Callable[[], None]] = {
    "add_norm": check_add_norm,
    "norm_rotate_store": check_norm_rotate_store,
    "few_tokens": lambda: check_experts(experts.few_tokens),
    "single_tokens": lambda: check_experts(experts.single_tokens),
    # Graphs are smaller than what goes this way, so nothing is padded.
    "many_tokens": lambda: check_experts(grouped_experts.many_tokens, is_padded=False),
    "ties": check_ties,
    "draw": check_draw,
}


def main() -> int:
    """Run all checks and print what came of each."""
    results: dict[str, str | None] = {}
    for name, check in CHECKS.items():
        torch.manual_seed(0)
        try:
            check()
            results[name] = None
        except Exception:  # noqa: BLE001  whatever goes wrong is the check's result
            results[name] = traceback.format_exc()
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
