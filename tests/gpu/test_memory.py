"""Memory that a worker gives back is there for others, and its graphs work afterwards as they did before.

NIXL and the transfer are no part of this: one engine, in this process.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.messages import RequestOptions, SamplingParams
from common.orders import Continue, Done, MemoryKind, Order, Pause, ReleaseMemory, ResumeMemory, WarmUp
from deploy.demo_model import write_demo_model
from tests.support.aggregated import InProcessAggregated, WholeAnswer
from tests.support.checkpoints import ON_GPU
from tests.support.prompts import random_prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GIB = 2**30
POOL_TOKENS = 2**21
MOST_LEFT_BYTES = GIB // 2
"""What the libraries on the device may have taken for themselves since before there was an engine."""
CYCLES: list[tuple[MemoryKind, ...]] = [("weights", "kv_cache"), ("kv_cache",), ("weights",), ("kv_cache", "weights")]


def free_bytes() -> int:
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


def told(worker: InProcessAggregated, *orders: Order) -> None:
    answers: list[Done] = []
    for order in orders:
        worker.loop.order(order, answers.append)
    worker.turn()
    assert [done.error for done in answers] == [None] * len(orders)


def serve(worker: InProcessAggregated) -> list[WholeAnswer]:
    requests = [
        (
            prompt,
            RequestOptions(
                sampling=SamplingParams(max_new_tokens=3 + i, temperature=float(i % 2), seed=i, ignore_eos=True),
                return_logprob=True,
                return_routed_experts=True,
            ),
        )
        for i, prompt in enumerate(random_prompts(7, 20, longest=100))
    ]
    return worker.run(requests)


def check_same(answers: Sequence[WholeAnswer], expected: Sequence[WholeAnswer]) -> None:
    for ours, theirs in zip(answers, expected, strict=True):
        assert ours.output_ids == theirs.output_ids
        assert ours.logprobs == theirs.logprobs
        assert ours.rows is not None
        assert theirs.rows is not None
        assert np.array_equal(ours.rows, theirs.rows)


def test_memory_goes_and_comes_and_graphs_change_no_bit(tmp_path: Path):
    write_demo_model(tmp_path, **ON_GPU)
    torch.zeros(1, device="cuda")
    before = free_bytes()
    options: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "chunk_tokens": 64, "pool_tokens": POOL_TOKENS}
    worker = InProcessAggregated(tmp_path, prefix_cache=False, **options)
    forward = worker.engine._forward
    expected = serve(worker)
    assert forward._graphs is not None
    pool_bytes = forward.kv_pool.pages.nbytes
    assert pool_bytes > 2 * GIB, "else there would be nothing to see"
    assert before - free_bytes() > pool_bytes
    left: list[int] = []
    for kinds in CYCLES:
        told(worker, Pause(1), ReleaseMemory(2, kinds))
        assert forward._graphs is None
        taken = before - free_bytes()
        print(f"released {kinds}: {taken / GIB:.2f} GiB taken, of the pool's {pool_bytes / GIB:.2f}")
        if "kv_cache" in kinds:
            assert taken < pool_bytes / 2
        if len(kinds) == 2:
            left.append(taken)
        told(worker, ResumeMemory(3, kinds), WarmUp(4), Continue(5))
        assert forward._graphs is not None
        assert before - free_bytes() > pool_bytes
        check_same(serve(worker), expected)
    assert max(left) < MOST_LEFT_BYTES
    assert left[1] < left[0] + 2**26, "nothing is left behind each time"
    worker.check_pages()
