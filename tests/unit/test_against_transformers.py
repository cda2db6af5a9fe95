"""The promise: rows and greedy tokens equal transformers' own, in every configuration, over the loopback transfer.

The full product runs on the racing device, which shows overlap bugs that a CPU hides; a part of it also on the plain one.
"""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from common.engine.build import EngineParts
from common.engine.fake import RacingDevice, RacingEngine
from common.routed_experts.capture import RoutedExpertsCapturer
from tests.support.in_process_pair import InProcessPair, options_of
from tests.support.judge import Judge, Tally
from tests.support.prompts import random_prompts

NUM_PROMPTS = 52
WHOLE = 8192


def run_and_judge(pair: InProcessPair, judge: Judge, *, seed: int = 0) -> Tally:
    """Run random prompts, 16 at once, every fourth with G = 1, and compare everything with the reference."""
    prompts = random_prompts(seed, NUM_PROMPTS)
    requests = [(prompt, options_of(1 if i % 4 == 0 else 2 + i % 11)) for i, prompt in enumerate(prompts)]
    tally = Tally()
    answers = pair.run(requests)
    for answer in answers:
        assert answer.rows is not None
        judge.add(tally, answer.prompt, answer.output_ids, answer.rows, start=answer.start)
    assert tally.requests == NUM_PROMPTS
    pair.check_pages()
    hits = sum(answer.cached_tokens for answer in answers)
    assert (hits > 0) == (pair.prefill.role.stats(0).pages.cached > 0)
    return tally


RACING = EngineParts(device=RacingDevice(), engine=RacingEngine)


@pytest.mark.parametrize(
    ("chunk_tokens", "page_size", "overlap"), list(itertools.product([7, 64, WHOLE], [1, 16], [True, False]))
)
def test_full_product_on_the_racing_device(
    checkpoint_of: Callable[[str], Path],
    judge_of: Callable[[str], Judge],
    shape: str,
    chunk_tokens: int,
    page_size: int,
    overlap: bool,
):
    pair = InProcessPair(
        checkpoint_of(shape),
        chunk_tokens=chunk_tokens,
        page_size=page_size,
        overlap=overlap,
        parts=RACING,
    )
    run_and_judge(pair, judge_of(shape)).assert_clean()
    assert pair.prefill.engine.num_tokens_computed < sum(len(prompt) for prompt in random_prompts(0, NUM_PROMPTS))


@pytest.mark.parametrize(("chunk_tokens", "overlap"), [(7, True), (WHOLE, False)])
def test_on_the_plain_cpu(
    checkpoint_of: Callable[[str], Path], judge_of: Callable[[str], Judge], shape: str, chunk_tokens: int, overlap: bool
):
    pair = InProcessPair(checkpoint_of(shape), chunk_tokens=chunk_tokens, overlap=overlap)
    run_and_judge(pair, judge_of(shape), seed=1).assert_clean()


def test_decode_computes_no_prompt_token(checkpoint_of: Callable[[str], Path]):
    """All of the decode engine's work is one token for each generated token but the last."""
    pair = InProcessPair(checkpoint_of("plain"), overlap=False)
    answers = pair.run([(prompt, options_of(6, ignore_eos=True)) for prompt in random_prompts(2, 12)])
    assert pair.decode.engine.num_tokens_computed == sum(len(answer.output_ids) - 1 for answer in answers) == 12 * 5


def test_start_len(checkpoint_of: Callable[[str], Path], judge_of: Callable[[str], Judge]):
    """Rows from s on, for s at both ends and in the middle; s == P leaves the generated rows alone."""
    pair = InProcessPair(checkpoint_of("plain"))
    prompt = random_prompts(3, 2)[1]
    tally = Tally()
    for start in (0, 1, len(prompt) // 2, len(prompt) - 1, len(prompt)):
        [answer] = pair.run([(prompt, options_of(5, start_len=start))])
        assert answer.rows is not None
        judge_of("plain").add(tally, prompt, answer.output_ids, answer.rows, start=start)
    tally.assert_clean()


class SharingCapturer(RoutedExpertsCapturer):
    """Breaks R3: hands out the buffer itself instead of an owned copy."""

    def take(self, num_tokens: int):
        return self.buffer[:num_tokens]


@pytest.mark.parametrize("verify_rows", [True, False])
def test_without_owned_copies_the_racing_device_fails(
    checkpoint_of: Callable[[str], Path], judge_of: Callable[[str], Judge], verify_rows: bool
):
    """The check can fail: without R3's copy, the rows are refused, or wrong where nobody checks them."""
    broken = RACING._replace(capturer=SharingCapturer)
    pair = InProcessPair(checkpoint_of("plain"), parts=broken, verify_rows=verify_rows)
    if verify_rows:
        pair.submit("r", [1, 2, 3], options_of(4))
        pair.settle()
        failed = pair.prefill.legs["r"].failed
        assert failed is not None
        assert failed.error.code == "routed_experts_bad"
        pair.check_pages()
    else:
        with pytest.raises(AssertionError):
            run_and_judge(pair, judge_of("plain")).assert_clean()


def test_a_wrong_row_and_a_wrong_token_are_found(
    checkpoint_of: Callable[[str], Path], judge_of: Callable[[str], Judge]
):
    """The judge can fail: one id changed in one row, or one token changed, is one wrong request."""
    pair = InProcessPair(checkpoint_of("plain"))
    [answer] = pair.run([([5, 6, 7, 8], options_of(4, ignore_eos=True))])
    assert answer.rows is not None
    rows = answer.rows.copy()
    unused = next(e for e in range(16) if e not in rows[2, 1])
    rows[2, 1, 0] = unused
    tally = Tally()
    judge_of("plain").add(tally, answer.prompt, answer.output_ids, rows)
    assert (tally.wrong, tally.ties) == (1, 0)
    tally = Tally()
    tokens = [*answer.output_ids[:-1], (answer.output_ids[-1] + 1) % 500]
    judge_of("plain").add(tally, answer.prompt, tokens, answer.rows)
    assert (tally.wrong, tally.ties) == (1, 0)
