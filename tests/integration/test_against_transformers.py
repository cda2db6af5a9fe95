"""The promise over real processes: router, HTTP, ZMQ and NIXL, a pairwise set of configurations, 16 requests at once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.stack import make_stack
from tests.support.http_client import Client
from tests.support.judge import Judge, Tally
from tests.support.prompts import random_prompts

# Every two values of two parameters meet in one of these.
PAIRWISE = [
    # shape, chunk, page, overlap
    ("plain", 7, 1, True),
    ("mixed", 64, 1, False),
    ("wide", 8192, 1, True),
    ("plain", 64, 16, True),
    ("mixed", 8192, 16, True),
    ("wide", 7, 16, False),
    ("plain", 8192, 16, False),
    ("mixed", 7, 16, True),
    ("wide", 64, 16, True),
]


def test_the_set_is_pairwise():
    """The list above leaves no pair of values out."""
    columns = list(zip(*PAIRWISE, strict=True))
    for i, first in enumerate(columns):
        for second in columns[i + 1 :]:
            assert len(set(zip(first, second, strict=True))) == len(set(first)) * len(set(second))


@pytest.mark.parametrize(("shape", "chunk_tokens", "page_size", "overlap"), PAIRWISE)
async def test_rows_and_tokens(
    checkpoint_of: Callable[[str], Path],
    judge_of: Callable[[str], Judge],
    tmp_path: Path,
    shape: str,
    chunk_tokens: int,
    page_size: int,
    overlap: bool,
):
    prompts = random_prompts(5, 52)
    bodies = [
        {
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": 1 if i % 4 == 0 else 2 + i % 11, "temperature": 0},
            "return_routed_experts": True,
            "routed_experts_dtype": "auto",
        }
        for i, prompt in enumerate(prompts)
    ]
    flags = [
        f"--model={checkpoint_of(shape)}",
        "--device=cpu",
        "--cpu-threads=1",
        f"--page-size={page_size}",
        f"--prefill.chunked-prefill-tokens={chunk_tokens}",
        "--overlap" if overlap else "--no-overlap",
    ]
    tally = Tally()
    async with make_stack(flags, log_file=tmp_path / "log") as stack, Client(stack.url) as client:
        before = await client.quiet_stats()
        replies = await client.run_all(bodies)
        after = await client.quiet_stats()
    for prompt, reply in zip(prompts, replies, strict=True):
        assert reply.rows.dtype == ("uint16" if shape == "wide" else "uint8")
        judge_of(shape).add(tally, prompt, reply.output_ids, reply.rows)
    tally.assert_clean()
    assert tally.requests == 52

    # The KV really moved by NIXL, all of it, and the decode worker computed no prompt token.
    def grown(role: str, counter: str) -> int:
        return after[role][counter] - before[role][counter]

    num_pages = sum(-(-len(prompt) // page_size) for prompt in prompts)
    assert grown("prefill", "kv_bytes") == grown("decode", "kv_bytes") > 0
    assert grown("prefill", "kv_bytes") % num_pages == 0
    generated = sum(len(reply.output_ids) - 1 for reply in replies)
    assert generated <= grown("decode", "tokens_computed") <= generated + len(prompts) * overlap
    cached = sum(reply.meta["cached_tokens"] for reply in replies)
    assert cached > 0
    assert grown("prefill", "tokens_computed") == sum(map(len, prompts)) - cached
