"""1P+1D on a GPU, eager, over the loopback: the same promise as on a CPU. Skipped without a GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.in_process_pair import InProcessPair, options_of
from tests.support.judge import Judge, Tally
from tests.support.prompts import random_prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("chunk_tokens", "page_size", "overlap"), [(7, 1, True), (64, 16, True), (8192, 16, False)])
def test_rows_and_tokens_equal_transformers(
    checkpoint_of: Callable[[str], Path],
    judge_of: Callable[[str], Judge],
    shape: str,
    chunk_tokens: int,
    page_size: int,
    overlap: bool,
):
    """float32 on the GPU against float32 on the CPU: sums are taken in another order, so ties may be a few more."""
    pair = InProcessPair(
        checkpoint_of(shape), chunk_tokens=chunk_tokens, page_size=page_size, overlap=overlap, device="cuda"
    )
    prompts = random_prompts(21, 52)
    tally = Tally()
    for answer in pair.run([(prompt, options_of(1 + i % 12)) for i, prompt in enumerate(prompts)]):
        assert answer.rows is not None
        judge_of(shape).add(tally, answer.prompt, answer.output_ids, answer.rows)
    assert tally.wrong == 0
    assert tally.ties <= 3
    pair.check_pages()


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2}])
def test_swapping_and_samples_change_nothing(checkpoint_of: Callable[[str], Path], settings: dict[str, Any]):
    """A tiny pool against a large one on the same GPU."""
    requests = [
        (prompt, options_of(20 + i, ignore_eos=True, seed=i, n=1 + i % 3, **settings))
        for i, prompt in enumerate(random_prompts(22, 12, longest=24))
    ]
    large = InProcessPair(checkpoint_of("wide"), page_size=4, device="cuda")
    tiny = InProcessPair(checkpoint_of("wide"), page_size=4, device="cuda", pool_tokens=200)
    expected, answers = large.run(requests), tiny.run(requests)
    assert tiny.decode.role.stats(0).swaps > 0
    for answer, other in zip(answers, expected, strict=True):
        assert answer.output_ids == other.output_ids
        assert np.array_equal(answer.rows, other.rows)  # type: ignore[arg-type]
    tiny.check_pages()


def test_logprobs(checkpoint_of: Callable[[str], Path], judge_of: Callable[[str], Judge]):
    pair = InProcessPair(checkpoint_of("plain"), device="cuda", chunk_tokens=16)
    prompt = random_prompts(23, 2)[1][:50]
    [answer] = pair.run([(prompt, options_of(4, logprobs={"logprob_start_len": 10, "top_logprobs_num": 2}))])
    logits = torch.from_numpy(judge_of("plain").trace([*prompt, *answer.output_ids[:-1]]).logits)
    expected = torch.log_softmax(logits.double(), dim=-1).numpy()
    assert answer.prompt_logprobs is not None
    got = [logprob for logprob in answer.prompt_logprobs.logprobs if logprob is not None]
    assert np.allclose(got, [expected[p - 1, prompt[p]] for p in range(10, 50)], atol=1e-3)
