"""The sampler against slow twins: the hash with Python's integers, the filters with exact fractions, the draws with counts."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.engine import sampler
from common.engine.batch import sampling_of
from common.engine.sampler import SamplingBatch
from common.engine.step_layout import lay_out, split_ints
from common.kernels import reference
from common.kernels.reference import exponential_noise
from common.kernels.torch_kernels import TorchKernels
from common.memory.request_table import RequestTable
from common.messages import Generate, RequestOptions, SamplingParams
from common.scheduling.request import Request
from common.scheduling.step_plan import StepEntry, StepPlan

MASK = 2**64 - 1
GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def sample(logits_SV: torch.Tensor, batch: SamplingBatch) -> tuple[torch.Tensor, torch.Tensor]:
    return sampler.sample(logits_SV, batch, TorchKernels())


def batch_of(params: Sequence[SamplingParams], positions: Sequence[int]) -> SamplingBatch:
    """As a step that draws at these positions makes it; all of a row's context is one page."""
    table = RequestTable(len(params), 1, torch.device("cpu"))
    entries = []
    for param, position in zip(params, positions, strict=True):
        request = Request.of(Generate(rid="r", input_ids=[0], options=RequestOptions(sampling=param)))
        request.row = table.allocate([0], request.message.options, seed=request.seed, num_prompt_tokens=1)
        entries.append(StepEntry(request, position - 1, position, 1))
    layout = lay_out(StepPlan(tuple(entries)), table, 2**32)
    _, draws = split_ints(torch.from_numpy(layout.ints), layout.num_tokens, layout.num_draws)
    return sampling_of(layout, draws, torch.from_numpy(layout.params_3S))


# ------------------------------------------------------------------------------------------------ the hash


def mix(x: int) -> int:
    """splitmix64's finaliser, on Python's unbounded integers."""
    x = ((x ^ (x >> 30)) * MIX_1) & MASK
    x = ((x ^ (x >> 27)) * MIX_2) & MASK
    return x ^ (x >> 31)


def unmix(x: int) -> int:
    """Its inverse."""
    x ^= (x >> 31) ^ (x >> 62)
    x = (x * pow(MIX_2, -1, 2**64)) & MASK
    x ^= (x >> 27) ^ (x >> 54)
    x = (x * pow(MIX_1, -1, 2**64)) & MASK
    return x ^ (x >> 30) ^ (x >> 60)


def signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def uniform_bits(seed: int, position: int, token_id: int) -> int:
    """The 23 bits that candidate `token_id` gets."""
    stream = mix((seed + mix((position * GOLDEN) & MASK)) & MASK)
    return mix((stream + (token_id + 1) * GOLDEN) & MASK) >> 41


def test_the_twin_is_splitmix64():
    """The generator's published outputs for seed 1234567."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [mix((1234567 + k * GOLDEN) & MASK) for k in range(1, 5)] == published


@given(st.lists(st.integers(0, MASK), min_size=1, max_size=20))
def test_mix_is_the_twins(values: list[int]):
    got = reference._mix(torch.tensor([signed(value) for value in values]))
    assert got.tolist() == [signed(mix(value)) for value in values]
    assert [unmix(mix(value)) for value in values] == values


@given(st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**31)), min_size=1, max_size=6))
def test_noise_is_made_of_the_twins_bits(draws: list[tuple[int, int]]):
    seeds, positions = zip(*draws, strict=True)
    noise_SV = exponential_noise(torch.tensor(seeds), torch.tensor(positions), 30)
    bits = [[uniform_bits(seed, position, token) for token in range(30)] for seed, position in draws]
    expected = -torch.log(torch.tensor([[(b + 0.5) / 2**23 for b in row] for row in bits], dtype=torch.float32))
    assert torch.equal(noise_SV, expected)


@pytest.mark.parametrize(("bits", "noise"), [(0, -math.log(2**-24)), (2**23 - 1, 2**-24), (2**22, math.log(2))])
def test_noise_is_positive_and_finite_at_its_ends(bits: int, noise: float):
    """A seed whose first candidate gets exactly these bits, found by running the hash backwards."""
    position = 17
    stream = (unmix(bits << 41) - GOLDEN) & MASK
    seed = (unmix(stream) - mix(position * GOLDEN & MASK)) & MASK
    assert uniform_bits(seed, position, 0) == bits
    value = float(exponential_noise(torch.tensor([signed(seed)]), torch.tensor([position]), 1))
    assert 0 < value < math.inf
    assert value == pytest.approx(noise, rel=1e-3)


def test_noise_is_exponential():
    """Mean 1, variance 1, and half of it under log 2, over half a million values."""
    seeds = torch.arange(50).repeat_interleave(10)
    noise = exponential_noise(seeds, torch.arange(10).repeat(50), 1000)
    assert bool((noise > 0).all())
    assert bool(noise.isfinite().all())
    assert float(noise.mean()) == pytest.approx(1, abs=0.01)
    assert float(noise.var()) == pytest.approx(1, abs=0.02)
    assert float((noise < math.log(2)).float().mean()) == pytest.approx(0.5, abs=0.005)


# ------------------------------------------------------------------------------------------------ the filters


def allowed(weights: Sequence[int], top_k: int, top_p: Fraction, min_p: Fraction) -> list[int]:
    """The tokens that may be drawn: the top k, of these the likeliest whose mass reaches top-p, of these min-p."""
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    kept = order[:top_k] if top_k > 0 else order
    mass = sum(weights[token] for token in kept)
    chosen, before = [], 0
    for token in kept:
        inside = before < top_p * mass and weights[token] >= min_p * weights[order[0]]
        if token == order[0] or inside:
            chosen.append(token)
        before += weights[token]
    return sorted(token for token in chosen if weights[token] > 0)


TOTAL = 4096


@st.composite
def dyadic_weights(draw: st.DrawFn, size: int) -> list[int]:
    """Weights with the sum 4096: as probabilities, float32 holds all their sums exactly, so that no rounding excuses anything.

    Many are whole 64ths, as the filters' limits are, so that limits are often met exactly.
    """
    unit = draw(st.sampled_from([1, 64, 256]))
    cuts = sorted(
        unit * cut for cut in draw(st.lists(st.integers(0, TOTAL // unit), min_size=size - 1, max_size=size - 1))
    )
    return [high - low for low, high in zip([0, *cuts], [*cuts, TOTAL], strict=True)]


FILTERS = st.tuples(
    st.sampled_from([-1, 1, 2, 3, 5, 8, 100]),
    st.integers(0, 64).map(lambda n: Fraction(n, 64)),
    st.integers(0, 64).map(lambda n: Fraction(n, 64)),
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_filters_keep_what_the_twin_keeps(data: st.DataObject):
    rows = data.draw(st.lists(st.tuples(dyadic_weights(8), FILTERS), min_size=1, max_size=4))
    params = [SamplingParams(top_k=k, top_p=float(p), min_p=float(m)) for _, (k, p, m) in rows]
    probs_SV = torch.tensor([weights for weights, _ in rows], dtype=torch.float32) / TOTAL
    kept_SV = sampler._filter(probs_SV, batch_of(params, [0] * len(rows)))
    for (weights, filters), probs_V, kept_V in zip(rows, probs_SV, kept_SV, strict=True):
        expected = allowed(weights, *filters)
        assert kept_V.nonzero()[:, 0].tolist() == expected
        assert torch.equal(kept_V[expected], probs_V[expected])


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "kept"),
    [
        (-1, Fraction(1), Fraction(0), [0, 1, 2, 3]),
        (3, Fraction(1), Fraction(0), [0, 1, 2]),
        (3, Fraction(6, 7), Fraction(0), [1, 2]),
        (-1, Fraction(6, 7), Fraction(0), [0, 1, 2]),
        (-1, Fraction(1, 2), Fraction(0), [2]),
        (-1, Fraction(33, 64), Fraction(0), [1, 2]),
        (-1, Fraction(1), Fraction(1, 2), [1, 2]),
        (-1, Fraction(1), Fraction(33, 64), [2]),
        (-1, Fraction(0), Fraction(0), [2]),
        (1, Fraction(1, 64), Fraction(1), [2]),
    ],
)
def test_the_filters_on_a_known_row(top_k: int, top_p: Fraction, min_p: Fraction, kept: list[int]):
    """By hand: 1/8, 1/4, 1/2, 1/8, of which top-k 3 leaves 7/8; top-p is a part of what is left."""
    weights = [512, 1024, 2048, 512]
    assert allowed(weights, top_k, top_p, min_p) == kept
    params = SamplingParams(top_k=top_k, top_p=float(top_p), min_p=float(min_p))
    kept_V = sampler._filter(torch.tensor([weights]) / TOTAL, batch_of([params], [0]))[0]
    assert kept_V.nonzero()[:, 0].tolist() == kept


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-40, 10), min_size=2, max_size=40), FILTERS)
def test_a_row_without_filters_passes_beside_one_with(logits: list[float], filters: tuple[int, Fraction, Fraction]):
    """A draw depends on nothing but its own row (R17): a neighbour's filters take no token away, however unlikely it is."""
    top_k, top_p, min_p = filters
    probs_V = torch.softmax(torch.tensor(logits, dtype=torch.float32), dim=-1)
    neighbour = SamplingParams(top_k=top_k, top_p=float(top_p), min_p=float(min_p))
    kept_SV = sampler._filter(probs_V.expand(2, -1).clone(), batch_of([SamplingParams(), neighbour], [0, 0]))
    assert torch.equal(kept_SV[0], probs_V)


def test_only_allowed_tokens_are_drawn_and_all_of_them():
    weights = [100, 1, 60, 40, 30, 25, 0, 256]
    logits_V = torch.log(torch.tensor(weights, dtype=torch.float32))
    for top_k, top_p, min_p in ((4, 1.0, 0.0), (-1, 0.7, 0.0), (-1, 1.0, 0.11), (5, 0.9, 0.2), (1, 1.0, 0.0)):
        params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p, seed=5)
        tokens_S, _ = sample(logits_V.expand(2000, -1), batch_of([params] * 2000, range(2000)))
        expected = allowed(weights, top_k, Fraction(str(top_p)), Fraction(str(min_p)))
        assert sorted(set(tokens_S.tolist())) == expected


# ------------------------------------------------------------------------------------------------ the draws

DRAWS = 6000


def chi_square(counts: np.ndarray, probs: np.ndarray) -> float:
    expected = probs * counts.sum()
    assert counts[expected == 0].sum() == 0
    seen = expected > 0
    return float(((counts[seen] - expected[seen]) ** 2 / expected[seen]).sum())


@pytest.mark.parametrize("over", ["seeds", "positions"])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"), [(1.0, -1, 1.0, 0.0), (0.6, -1, 1.0, 0.0), (1.7, 8, 0.9, 0.05)]
)
def test_draws_follow_the_probabilities(over: str, temperature: float, top_k: int, top_p: float, min_p: float):
    """Counts over many seeds, and over many positions of one seed; 12 tokens, so 60 is far out of reach of chance."""
    logits = np.random.default_rng(1).normal(size=12)
    scaled = np.exp(logits / temperature - (logits / temperature).max())
    weights = [round(w) for w in scaled / scaled.sum() * 10**9]
    kept = allowed(weights, top_k, Fraction(str(top_p)), Fraction(str(min_p)))
    probs = np.zeros(12)
    probs[kept] = scaled[kept] / scaled[kept].sum()

    seeds, positions = (range(DRAWS), [9] * DRAWS) if over == "seeds" else ([2**60 + 9] * DRAWS, range(DRAWS))
    params = [
        SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed) for seed in seeds
    ]
    tokens_S, _ = sample(torch.tensor(logits, dtype=torch.float32).expand(DRAWS, -1), batch_of(params, list(positions)))
    counts = np.bincount(tokens_S.numpy(), minlength=12)
    assert chi_square(counts, probs) < 60
    # The check can fail: five hundredths moved from one token to another are noticed.
    skewed = probs.copy()
    skewed[kept[0]] += 0.05
    skewed[kept[1]] -= 0.05
    if skewed.min() >= 0:
        assert chi_square(counts, skewed) > 60


def test_neighbouring_seeds_and_positions_are_independent():
    """Pairs of draws at (seed, p) and (seed + 1, p), and at (seed, p) and (seed, p + 1): a flat table of pairs."""
    num = 8000
    logits = torch.zeros(num, 4)
    for seed_step, position_step in ((1, 0), (0, 1), (1, 1)):
        draws = [
            sample(
                logits,
                batch_of(
                    [SamplingParams(seed=s + step * seed_step) for s in range(0, 2 * num, 2)],
                    [2 * (s % 50) + step * position_step for s in range(num)],
                ),
            )[0]
            for step in (0, 1)
        ]
        counts = np.bincount((draws[0] * 4 + draws[1]).numpy(), minlength=16)
        assert chi_square(counts, np.full(16, 1 / 16)) < 60


MIXES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 5},
    {"temperature": 2.0, "min_p": 0.1},
    {"temperature": 1.2, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=10, unique=True), st.integers(0, 2**62))
def test_a_draw_depends_on_seed_and_position_alone(chosen: list[int], base: int):
    """Ten draws at once; then any of them, in any order and company: the same tokens and logprobs."""
    logits_SV = torch.from_numpy(np.random.default_rng(2).normal(size=(10, 64)).astype(np.float32)) * 3
    params = [SamplingParams(**MIXES[i % len(MIXES)], seed=base + i) for i in range(10)]
    positions = [100 * i for i in range(10)]
    tokens_S, logprobs_S = sample(logits_SV, batch_of(params, positions))
    some_tokens, some_logprobs = sample(
        logits_SV[chosen], batch_of([params[i] for i in chosen], [positions[i] for i in chosen])
    )
    assert some_tokens.tolist() == tokens_S[chosen].tolist()
    assert some_logprobs.tolist() == logprobs_S[chosen].tolist()


def test_seed_and_position_both_matter():
    logits_SV = torch.zeros(300, 50)
    by_seed, _ = sample(logits_SV, batch_of([SamplingParams(seed=s) for s in range(300)], [4] * 300))
    by_position, _ = sample(logits_SV, batch_of([SamplingParams(seed=4)] * 300, range(300)))
    assert len(set(by_seed.tolist())) > 40
    assert len(set(by_position.tolist())) > 40
    assert by_seed[4] == by_position[4]


# ------------------------------------------------------------------------------------------------ greedy, logprobs


@pytest.mark.parametrize("mixed", [False, True])
def test_greedy_is_the_argmax(mixed: bool):
    """Also beside sampled rows, and for a temperature that is all but zero."""
    logits = np.random.default_rng(3).normal(size=(40, 70)).astype(np.float32)
    temperatures = [0.0, 1e-7, 1.0 if mixed else 0.0]
    params = [SamplingParams(temperature=temperatures[i % 3], seed=i) for i in range(40)]
    batch = batch_of(params, range(40))
    assert batch.all_greedy == (not mixed)
    tokens = sample(torch.from_numpy(logits), batch)[0].numpy()
    greedy = [i for i in range(40) if temperatures[i % 3] < 1]
    np.testing.assert_array_equal(tokens[greedy], logits.argmax(axis=1)[greedy])
    if mixed:
        assert (tokens != logits.argmax(axis=1)).any()


def test_the_logprob_is_the_models_own():
    """log softmax of the unscaled logits, in float64, whatever temperature and filters were."""
    logits = np.random.default_rng(4).normal(size=(60, 90)) * 4
    params = [SamplingParams(**MIXES[i % len(MIXES)], seed=i) for i in range(60)]
    tokens_S, logprobs_S = sample(torch.tensor(logits, dtype=torch.float32), batch_of(params, range(60)))
    log_softmax = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(logprobs_S.numpy(), log_softmax[np.arange(60), tokens_S.numpy()], atol=1e-4)
    assert logprobs_S.dtype == torch.float32
    assert tokens_S.dtype == torch.int64
