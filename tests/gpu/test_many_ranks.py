"""Workers of two ranks on two GPUs: NCCL, padded steps, CUDA graphs. Skipped where there are fewer.

In float32 with torch's kernels transformers is the oracle. In bfloat16 sums are rounded in another order than on one GPU, so there
one engine says what nearly all rows must be, and every row must be one that a router could have chosen.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch

from deploy.demo_model import write_demo_model
from deploy.replay.command import ReplayOptions, replay
from deploy.stack import Stack, running_stack
from tests.support.checkpoints import ON_GPU
from tests.support.http_client import Client, Reply
from tests.support.judge import Judge, Tally
from tests.support.prompts import random_prompts

# With "cpu" the tests in float32 run anywhere.
DEVICE: Final = "cuda"

SPLITS = {"tp2": ["--tp=2"], "tp2-ep": ["--tp=2", "--ep"], "dp2": ["--dp=2"], "dp2-ep": ["--dp=2", "--ep"]}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2 and DEVICE == "cuda", reason="needs two CUDA devices"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many-ranks")
    write_demo_model(folder, **ON_GPU)
    return folder


@pytest.fixture(scope="module")
def start(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    @contextmanager
    def started(*flags: str) -> Iterator[Stack]:
        log_file = tmp_path_factory.mktemp("stack") / "log"
        common = [f"--model={checkpoint}", f"--device={DEVICE}", "--kv-pool-tokens=32768", "--cpu-threads=1"]
        try:
            with running_stack([*common, *flags], log_file=log_file) as stack:
                yield stack
        finally:
            # Shown by pytest beside a failure.
            print(log_file.read_text(errors="replace")[-6000:] if log_file.exists() else "nothing was started")

    return started


def ask(stack: Stack, prompts: Sequence[list[int]], max_new_tokens: int, concurrency: int) -> list[Reply]:
    """Greedy answers with their rows."""
    bodies = [
        {
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": max_new_tokens, "temperature": 0, "ignore_eos": True},
            "return_routed_experts": True,
            "routed_experts_dtype": "auto",
        }
        for prompt in prompts
    ]

    async def run() -> list[Reply]:
        async with Client(stack.url) as client:
            replies = await client.run_all(bodies, concurrency=concurrency)
            await client.quiet_stats()
            return replies

    return asyncio.run(run())


@pytest.mark.parametrize("name", SPLITS)
def test_in_float32_as_transformers(start: Callable[..., Any], checkpoint: Path, name: str):
    prompts = random_prompts(41, 32)
    with start("--aggregated", "--dtype=float32", "--kernels=torch", *SPLITS[name]) as stack:
        replies = ask(stack, prompts, 12, 16)
    tally, judge = Tally(), Judge(checkpoint)
    for prompt, reply in zip(prompts, replies, strict=True):
        judge.add(tally, prompt, reply.output_ids, reply.rows)
    tally.assert_clean()


FULL = ["--aggregated", "--dtype=bfloat16", "--chunked-prefill-tokens=16", "--max-running-requests=48"]
PROMPTS = [prompt[:24] for prompt in random_prompts(42, 110)]


@pytest.fixture(scope="module")
def alone(start: Callable[..., Any]) -> list[Reply]:
    """What one engine answers."""
    with start(*FULL) as stack:
        return ask(stack, PROMPTS, 40, 110)


@pytest.mark.parametrize("graphs", ["--cuda-graphs", "--no-cuda-graphs"])
@pytest.mark.parametrize("name", ["tp2", "dp2", "dp2-ep"])
def test_full_ranks_in_padded_steps(start: Callable[..., Any], alone: list[Reply], name: str, graphs: str):
    """More running requests than the chunks of all groups: every rank is full, and no row is bad or another token's."""
    with start(*FULL, *SPLITS[name], graphs) as stack:
        replies = ask(stack, PROMPTS, 40, 110)
        summary = replay(ReplayOptions(url=stack.url, concurrency=64))
    assert summary.is_good
    assert summary.bad_rows == 0
    same = total = 0
    for prompt, ours, theirs in zip(PROMPTS, replies, alone, strict=True):
        # From the first token that differs on, the two answer different questions.
        common = next(
            (i for i, pair in enumerate(zip(ours.output_ids, theirs.output_ids, strict=True)) if len({*pair}) > 1), 40
        )
        num_rows = len(prompt) + max(0, common - 1)
        agreement = (np.sort(ours.rows[:num_rows]) == np.sort(theirs.rows[:num_rows])).all(axis=-1)
        same, total = same + int(agreement.sum()), total + agreement.size
    assert same >= 0.9 * total
