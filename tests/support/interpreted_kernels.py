"""The Triton kernels on a CPU, by Triton's interpreter, against their torch twins: `python -m tests.support.interpreted_kernels`.

A process of its own, because TRITON_INTERPRET must be set before the kernels are defined. Prints one JSON object: for each check
what went wrong, or null. Experts run in float16: the interpreter has no bfloat16 products. It rounds wrongly to float8 (1.97
becomes 1.0), so torch converts for it. Fresh memory is full of NaN and of the largest integers, so what reads memory that nobody
has set gives itself away.
"""

import json
import os
import random
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from msgspec.structs import replace
from triton.runtime import interpreter

from common.kernels import fused_kernels, reference
from common.kernels.fused_kernels import FusedKernels
from common.kernels.interface import ExpertMatrices, Lanes, PeerArea
from common.kernels.torch_kernels import TorchKernels
from common.kernels.triton import experts, grouped_experts, layer, sampling, single_experts
from common.kernels.triton.routing import choose, place, route
from common.kernels.triton.tuning import ExpertShape, Tuned, tuned_for
from common.memory.kv_pool import KvPool
from common.memory.layout import KvLayout
from tests.support.fp8 import expected_of, random_matrices

FUSED, TWIN = FusedKernels(), TorchKernels()
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


def check_add_norm_over() -> None:
    """Two ranks' launches one after the other: the signals that the second would send are there before the first one asks."""
    tokens, hidden = 3, 48
    x, weight, parts = torch.randn(tokens, hidden), torch.randn(hidden), torch.randn(2, tokens, hidden)
    signals = torch.zeros(2, tokens, 2, dtype=torch.int32)
    signals[0, :, 1] = 1
    addresses, pads = (torch.tensor([each.data_ptr() for each in both]) for both in (parts, signals))
    for index in range(2):
        area = PeerArea(parts[index], addresses, pads, index)
        results = layer.add_norm_over(x, area, weight, 1e-6)
        for ours, theirs in zip(results, TWIN.add_norm(x, parts.sum(0), weight, 1e-6), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)
        # Each takes what was sent to it, and sends its own.
        assert signals[0].sum() == index * tokens
        assert signals[1].sum() == (1 - index) * tokens


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
            gate_up = ExpertMatrices((torch.randn(num_experts, 2 * width, hidden) / hidden**0.5).to(HALF))
            down = ExpertMatrices((torch.randn(num_experts, hidden, width) / width**0.5).to(HALF))
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


def check_choose() -> None:
    """It chooses as `route` does, and leaves the ids of padding alone."""
    for tokens, padding, num_experts, top_k in ((3, 0, 8, 2), (5, 2, 300, 8), (0, 4, 7, 3)):
        logits = torch.randn(tokens + padding, num_experts).to(HALF)
        num_tokens = torch.tensor([tokens])
        for norm_topk_prob in (True, False):
            ids = torch.full((2, tokens + padding, 2, top_k), 999, dtype=torch.int32)
            counts = torch.zeros(num_experts, dtype=torch.int32)
            routing = route(logits, ids[0, :, 1], counts, norm_topk_prob=norm_topk_prob, num_tokens=num_tokens)
            weights = choose(logits, ids[1, :, 1], norm_topk_prob=norm_topk_prob, num_tokens=num_tokens)
            assert torch.equal(ids[0], ids[1])
            assert (ids[:, tokens:] == 999).all()
            assert (ids[:, :, 0] == 999).all()
            assert torch.equal(weights[:tokens], routing.weights_TK[:tokens])


def check_add_up() -> None:
    for tokens, top_k, hidden in ((1, 1, 8), (4, 8, 200), (9, 3, 64)):
        delta = torch.randn(tokens, top_k, hidden).to(HALF)
        assert torch.equal(FUSED.add_up(delta), delta.float().sum(dim=1).to(HALF))
        assert FUSED.add_up(delta[:, 0]) is not None
        ids = torch.randint(-1, 2, (tokens, top_k), dtype=torch.int32)
        expected = (delta.float() * (ids >= 0)[:, :, None]).sum(dim=1).to(HALF)
        delta[ids < 0] = torch.nan
        assert torch.equal(layer.add_up(delta, ids), expected)


# ------------------------------------------------------------------------------------------------ tokens of many ranks


def any_lanes(rng: random.Random, most: int) -> tuple[int, Lanes | None]:
    """How many lanes there are, up to about `most`, and who of them hold tokens: groups may be empty, full, or anything between."""
    if rng.random() < 0.3:
        return rng.randint(0, most), None
    groups = rng.randint(1, 4)
    per_group = rng.randint(1, max(1, most // groups))
    num_tokens = [rng.choice((0, per_group, rng.randint(0, per_group))) for _ in range(groups)]
    return groups * per_group, Lanes(torch.tensor(num_tokens), per_group)


def any_ids(rng: random.Random, lanes: int, top_k: int, num_experts: int) -> torch.Tensor:
    """Each token's distinct experts, as some rank may have gathered them: any integer dtype, maybe strided."""
    dtypes = [torch.uint16, torch.int32, torch.int64] + [torch.uint8] * (num_experts <= 256)
    dtype, ids = rng.choice(dtypes), torch.rand(lanes, num_experts).argsort(dim=1)[:, :top_k]
    match rng.randrange(3):
        case 0:
            return ids.to(dtype).contiguous()
        case 1:
            return torch.stack([ids.flip(1), ids, ids.flip(1)], dim=1).to(dtype)[:, 1]
        case _:
            return ids.T.to(dtype).contiguous().T


def which_hold_tokens(num_lanes: int, lanes: Lanes | None) -> torch.Tensor:
    if lanes is None:
        return torch.ones(num_lanes, dtype=torch.bool)
    held = [lane < num for num in lanes.num_tokens_M.tolist() for lane in range(lanes.per_group)]
    return torch.tensor(held, dtype=torch.bool)


def check_place() -> None:
    """Every assignment of a token to an expert that is here has one place; nothing else has one."""
    rng = random.Random(1)
    for _ in range(40):
        num_experts = rng.choice((1, 7, 300))
        top_k = rng.randint(1, min(8, num_experts))
        first = rng.randrange(num_experts)
        here = rng.randint(1, num_experts - first)
        total, lanes = any_lanes(rng, 150)
        ids = any_ids(rng, total, top_k, num_experts)
        weights = torch.randn(total, top_k)
        routing = place(ids, weights, first_expert=first, num_experts=here, lanes=lanes)
        assert routing.weights_TK is weights
        local = ids.long() - first
        is_here = (local >= 0) & (local < here) & which_hold_tokens(total, lanes)[:, None]
        assert torch.equal(routing.ids_TK.long(), local.masked_fill(~is_here, -1))
        assert torch.equal(routing.counts_E.long(), local[is_here].bincount(minlength=here))
        for expert, (count, members) in enumerate(zip(routing.counts_E, routing.members_ET, strict=True)):
            expected = ((local == expert) & is_here).flatten().nonzero()[:, 0]
            assert torch.equal(members[:count].long().sort().values, expected)
            assert torch.equal(routing.places_TK.flatten()[members[:count].long()], torch.arange(count).int())


def check_run_experts(*, most: int, single_tokens: int, few_tokens: int) -> None:
    """Some of the experts over tokens of many ranks; what stands in lanes without a token is poison too."""
    rng = random.Random(2)

    def tuned(shape: ExpertShape) -> Tuned:
        return replace(tuned_for(shape), single_tokens=single_tokens, few_tokens=few_tokens)

    for turn in range(40):
        num_experts = rng.choice((1, 5, 12, 300))
        top_k, hidden, width = rng.randint(1, min(5, num_experts)), rng.choice((32, 200)), rng.choice((8, 24, 72))
        first = rng.randrange(num_experts)
        here = min(rng.randint(1, num_experts - first), 20)
        total, lanes = any_lanes(rng, most)
        ids = any_ids(rng, total, top_k, num_experts)
        if turn % 8 == 0 and num_experts - here >= top_k:
            ids = torch.where(ids.long() >= first, ids.long() + here, ids.long())  # all are elsewhere
        x, weights = torch.randn(total, hidden).to(HALF), torch.rand(total, top_k).to(HALF)
        gate_up = (torch.randn(here, 2 * width, hidden) / hidden**0.5).to(HALF)
        down = (torch.randn(here, hidden, width) / width**0.5).to(HALF)
        holds = which_hold_tokens(total, lanes)
        x[~holds], weights[~holds] = torch.nan, torch.nan
        with patch.object(fused_kernels, "tuned_for", tuned):
            ours = FUSED.run_experts(x, ids, weights, *stored(gate_up, down), first_expert=first, lanes=lanes)
        matrices = stored(gate_up.float(), down.float())
        theirs = TWIN.run_experts(x.float(), ids, weights.float(), *matrices, first_expert=first, lanes=lanes)
        case = f"{total=} {lanes=} {top_k=} {num_experts=} {first=} {here=} {hidden=} {width=} {ids=}"
        assert ours.dtype == HALF, case
        assert torch.allclose(ours.float(), theirs, atol=0.01), case
        is_idle = ~(((ids.long() >= first) & (ids.long() < first + here)).any(dim=1) & holds)
        assert (ours[is_idle] == 0).all(), case


def stored(gate_up: torch.Tensor, down: torch.Tensor) -> tuple[ExpertMatrices, ExpertMatrices]:
    return ExpertMatrices(gate_up), ExpertMatrices(down)


def check_nowhere() -> None:
    """Who goes nowhere costs nothing: its part of the outputs is as unset as it was, beside parts that are all set."""
    x, weights = torch.randn(6, 32).to(HALF), torch.rand(6, 3).to(HALF)
    # With an expert before the first one, so that one too low would be found, and its output be a number.
    gate_up, down = torch.randn(4, 16, 32).to(HALF) / 8, torch.randn(4, 32, 8).to(HALF) / 8
    ids = torch.rand(6, 10).argsort(dim=1)[:, :3]
    lanes = Lanes(torch.tensor([2, 0, 1]), 2)
    routing = place(ids, weights, first_expert=4, num_experts=3, lanes=lanes)
    is_here = routing.ids_TK >= 0
    assert 0 < is_here.sum() < 9
    for run in (single_experts.single_tokens, experts.few_tokens):
        out = run(x, routing, *stored(gate_up[1:], down[1:]))
        assert torch.equal(out.isnan().all(dim=2), ~is_here)
        assert torch.equal(out.isnan().any(dim=2), ~is_here)


# ------------------------------------------------------------------------------------------------ float8 experts


def convert_float(data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: object) -> np.ndarray:
    """The bits of floating numbers in another type, as GPUs convert them: to the nearest, and what is too large to the largest."""
    if tl.float8e4nv not in (source, target):
        return INTERPRETERS_OWN(data, source, target, rounding)
    types = {tl.float8e4nv: torch.float8_e4m3fn, tl.float16: torch.float16, tl.float32: torch.float32}
    numbers = torch.from_numpy(np.ascontiguousarray(data)).view(types[source])
    if target == tl.float8e4nv:
        numbers = numbers.clamp(-448, 448)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[types[target].itemsize]
    return numbers.to(types[target]).view(bits).numpy()


INTERPRETERS_OWN = interpreter._convert_float


def check_fp8(*, most: int, single_tokens: int, few_tokens: int, is_quantised: bool = True) -> None:
    """Some of the experts over tokens of many ranks: what quantised activations make of it, and no further off than FP8."""
    rng = random.Random(3)

    def tuned(shape: ExpertShape) -> Tuned:
        assert shape.fp8
        return replace(tuned_for(shape), single_tokens=single_tokens, few_tokens=few_tokens)

    for turn in range(8):
        num_experts = rng.choice((1, 5, 12))
        top_k, width = rng.randint(1, min(4, num_experts)), rng.choice((128, 384))
        hidden = rng.choice((128, 256 if is_quantised else 1152))
        first = rng.randrange(num_experts)
        here = rng.randint(1, num_experts - first)
        total, lanes = any_lanes(rng, most)
        ids = any_ids(rng, total, top_k, num_experts)
        holds = which_hold_tokens(total, lanes)
        x, weights = torch.randn(total, hidden).to(HALF), torch.rand(total, top_k).to(HALF)
        x[::3, :128] = 0  # a group of zeros
        x[1::3] *= 8
        gate_up, down = random_matrices(here, 2 * width, hidden), random_matrices(here, hidden, width)
        if turn % 2:
            x /= 4
        local = torch.where(holds[:, None], ids.long() - first, -1)
        expected = expected_of(x, local, weights, gate_up, down)
        x[~holds], weights[~holds] = torch.nan, torch.nan
        with patch.object(fused_kernels, "tuned_for", tuned):
            ours = FUSED.run_experts(x, ids, weights, gate_up, down, first_expert=first, lanes=lanes).float()
        nearest = expected.quantised if is_quantised else expected.exact
        case = f"{total=} {lanes=} {top_k=} {num_experts=} {first=} {here=} {hidden=} {width=} {ids=}"
        assert (ours - nearest).norm() <= 1e-3 * nearest.norm(), case
        assert ((ours - expected.exact).abs() <= expected.bound + 2e-3 * nearest.abs()).all(), case


# ------------------------------------------------------------------------------------------------ drawing


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
    "add_norm_over": check_add_norm_over,
    "norm_rotate_store": check_norm_rotate_store,
    "few_tokens": lambda: check_experts(experts.few_tokens),
    "single_tokens": lambda: check_experts(single_experts.single_tokens),
    # Graphs are smaller than what goes this way, so nothing is padded.
    "many_tokens": lambda: check_experts(grouped_experts.many_tokens, is_padded=False),
    "choose": check_choose,
    "add_up": check_add_up,
    "place": check_place,
    "nowhere": check_nowhere,
    "run_experts_single": lambda: check_run_experts(most=4, single_tokens=1000, few_tokens=1000),
    "run_experts_few": lambda: check_run_experts(most=40, single_tokens=-1, few_tokens=1000),
    "run_experts_many": lambda: check_run_experts(most=24, single_tokens=-1, few_tokens=-1),
    "fp8_single": lambda: check_fp8(most=9, single_tokens=1000, few_tokens=1000, is_quantised=False),
    "fp8_few": lambda: check_fp8(most=40, single_tokens=-1, few_tokens=1000),
    "fp8_many": lambda: check_fp8(most=90, single_tokens=-1, few_tokens=-1),
    "ties": check_ties,
    "draw": check_draw,
}


def prepare() -> None:
    """Make a process ready for checks, which run side by side, each on one core."""
    interpreter._convert_float = convert_float
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # which also fills fresh memory
    assert torch.empty(1).isnan().all(), "fresh memory is not poisoned"


def run(name: str) -> str | None:
    """Run a check; returns what went wrong."""
    torch.manual_seed(0)
    try:
        CHECKS[name]()
    except Exception:  # noqa: BLE001  whatever goes wrong is the check's result
        return traceback.format_exc()
    return None


def main() -> int:
    """Run all checks and print what came of each."""
    with ProcessPoolExecutor(initializer=prepare) as pool:
        results = dict(zip(CHECKS, pool.map(run, CHECKS), strict=True))
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
