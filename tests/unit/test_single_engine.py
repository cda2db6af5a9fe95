"""PD equals one engine: tokens, logprobs and rows, greedy and sampled, whatever the chunks, the overlap and the neighbours.

The oracle is `tests.support.single_engine`, which shares model and sampler with the pair and nothing of what lies between.
"""

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.messages import RequestOptions
from tests.support.in_process_pair import Answer, InProcessPair, options_of
from tests.support.prompts import random_prompts
from tests.support.single_engine import SingleAnswer, SingleEngine

NUM_PROMPTS = 32
WHOLE = 8192

SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 20},
    {"temperature": 0.9, "min_p": 0.05},
    {"temperature": 1.1, "top_p": 0.95, "top_k": 50, "min_p": 0.01},
    {"temperature": 5.0, "top_k": 3, "stop_token_ids": tuple(range(0, 500, 2))},
]


def requests_of(seed: int) -> list[tuple[list[int], RequestOptions]]:
    """Prompts that share prefixes, each with another mix of sampling parameters and another length of output."""
    return [
        (prompt, options_of(1 + i % 8, **SAMPLING[i % len(SAMPLING)], seed=2**62 + 1000 * i, ignore_eos=i % 2 == 0))
        for i, prompt in enumerate(random_prompts(seed, NUM_PROMPTS, longest=150))
    ]


@pytest.fixture(scope="module")
def singles_of(checkpoint_of: Callable[[str], Path]) -> Callable[[str], list[SingleAnswer]]:
    """The oracle's answers, computed once a shape."""

    @cache
    def run(shape: str) -> list[SingleAnswer]:
        single = SingleEngine(checkpoint_of(shape))
        return [single.run(prompt, options) for prompt, options in requests_of(7)]

    return run


def assert_same(answer: Answer, single: SingleAnswer) -> None:
    assert answer.output_ids == single.output_ids
    np.testing.assert_allclose(answer.logprobs, single.logprobs, rtol=0, atol=1e-4)
    assert answer.rows is not None
    assert answer.rows.dtype == single.rows.dtype
    # As sets: the order of two experts of all but equal weight may depend on the batch's shape.
    np.testing.assert_array_equal(np.sort(answer.rows), np.sort(single.rows))


@pytest.mark.parametrize("shape", ["mixed", "wide"])
@pytest.mark.parametrize(
    ("chunk_tokens", "overlap", "concurrency"),
    [(7, True, 16), (7, False, 5), (WHOLE, True, 3), (WHOLE, False, 16), (WHOLE, True, 1)],
)
def test_a_pair_equals_a_single_engine(
    checkpoint_of: Callable[[str], Path],
    singles_of: Callable[[str], list[SingleAnswer]],
    shape: str,
    chunk_tokens: int,
    overlap: bool,
    concurrency: int,
):
    pair = InProcessPair(checkpoint_of(shape), chunk_tokens=chunk_tokens, overlap=overlap)
    answers = pair.run(requests_of(7), concurrency=concurrency)
    for answer, single in zip(answers, singles_of(shape), strict=True):
        assert_same(answer, single)
    pair.check_pages()
    assert any(answer.cached_tokens for answer in answers)


def test_one_batch_of_all_in_another_order(
    checkpoint_of: Callable[[str], Path], singles_of: Callable[[str], list[SingleAnswer]]
):
    """Other neighbours, other cache hits: the same answers."""
    order = np.random.default_rng(3).permutation(NUM_PROMPTS)
    requests = requests_of(7)
    pair = InProcessPair(checkpoint_of("wide"), chunk_tokens=64, page_size=1)
    answers = pair.run([requests[i] for i in order], concurrency=NUM_PROMPTS)
    for answer, index in zip(answers, order, strict=True):
        assert_same(answer, singles_of("wide")[index])


def test_the_comparison_can_fail(checkpoint_of: Callable[[str], Path], singles_of: Callable[[str], list[SingleAnswer]]):
    """Another seed gives other tokens and rows, a changed id another row: the equality above is not that of constants."""
    single = SingleEngine(checkpoint_of("wide"))
    pair = InProcessPair(checkpoint_of("wide"))
    prompt = random_prompts(7, 2)[1][:30]
    sampled = [options_of(8, temperature=1.0, seed=seed, ignore_eos=True) for seed in (1, 2)]
    [answer] = pair.run([(prompt, sampled[0])])
    same, other = (single.run(prompt, options) for options in sampled)
    assert_same(answer, same)
    with pytest.raises(AssertionError):
        assert_same(answer, other)
    assert answer.rows is not None
    assert (answer.rows[: len(prompt)] == other.rows[: len(prompt)]).all()
    assert (answer.rows[len(prompt) :] != other.rows[len(prompt) :]).any()
    answer.rows[4, 1, 0] = next(e for e in range(300) if e not in answer.rows[4, 1])
    with pytest.raises(AssertionError):
        assert_same(answer, same)


def test_the_oracle_covers_what_it_should(singles_of: Callable[[str], list[SingleAnswer]]):
    """Lengths of 1 and more, answers that stop early, and no two answers alike."""
    asked = [options.sampling.max_new_tokens for _, options in requests_of(7)]
    lengths = [len(single.output_ids) for single in singles_of("wide")]
    assert 1 in lengths
    assert max(lengths) == 8
    assert any(length < most for length, most in zip(lengths, asked, strict=True))
    long = [tuple(s.output_ids) for s in singles_of("wide") if len(s.output_ids) > 3]
    assert all(a != b for a, b in itertools.combinations(long, 2))
