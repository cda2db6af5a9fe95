"""The real stack on two GPUs: prefill on one, decode on the other, NIXL between them. Skipped where there are fewer.

One request at a time, the pair's steps have the shapes that one engine's have. So its tokens, logprobs and rows must be that
engine's, bit for bit (R17), in bfloat16 too, where transformers could not be the oracle: KV that had not arrived whole would show.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pytest
import torch

from common.config import EngineOptions, ModelOptions
from common.engine.build import build_engine
from common.engine.engine import Engine
from common.engine.loop import Loop
from common.messages import Generate, RequestOptions, SamplingParams
from deploy.aggregated import AggregatedWorker
from deploy.demo_model import write_demo_model
from deploy.replay.command import ReplayOptions, replay
from deploy.stack import Stack, running_stack
from tests.support.aggregated import WholeAnswer
from tests.support.checkpoints import ON_GPU
from tests.support.http_client import Client
from tests.support.prompts import random_prompts
from tests.support.recorder import Leg, Recorder

# With "cpu" and "float32" the same tests run anywhere.
DEVICE: Final[Literal["cpu", "cuda"]] = "cuda"
DTYPE: Final[Literal["float32", "bfloat16"]] = "bfloat16"

CHUNK_TOKENS = 1024
"""More than any prompt has: each is one step."""
KV_POOL_TOKENS = 32768
MAX_RUNNING_REQUESTS = 32

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two-gpus")
    write_demo_model(folder, **ON_GPU)
    return folder


@pytest.fixture(scope="module")
def stack(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    flags = [
        f"--model={checkpoint}",
        f"--device={DEVICE}",
        f"--dtype={DTYPE}",
        f"--kv-pool-tokens={KV_POOL_TOKENS}",
        f"--max-running-requests={MAX_RUNNING_REQUESTS}",
        f"--chunked-prefill-tokens={CHUNK_TOKENS}",
        # Behind a cached prefix, the pair's steps would be smaller than the one engine's.
        "--no-prefix-cache",
    ]
    log_file = tmp_path_factory.mktemp("stack") / "log"
    try:
        with running_stack(flags, log_file=log_file) as running:
            yield running
    finally:
        # Shown by pytest beside a failure.
        print(log_file.read_text(errors="replace")[-4000:] if log_file.exists() else "nothing was started")


def make_engine(checkpoint: Path) -> Engine:
    options = EngineOptions(
        device=DEVICE, kv_pool_tokens=KV_POOL_TOKENS, max_running_requests=MAX_RUNNING_REQUESTS, cpu_threads=1
    )
    model = ModelOptions(model=str(checkpoint), dtype=DTYPE)
    return build_engine(model, options, chunked_prefill_tokens=CHUNK_TOKENS)


def run_alone(engine: Engine, requests: list[tuple[list[int], RequestOptions]]) -> list[WholeAnswer]:
    """Run each request to its end before the next one begins."""
    recorder = Recorder()
    role = AggregatedWorker(
        engine, chunked_prefill_tokens=CHUNK_TOKENS, prefix_cache=False, reply=recorder, verify_rows=True
    )
    loop = Loop(engine, role, overlap=True)
    for i, (prompt, options) in enumerate(requests):
        recorder.legs[f"r{i}"] = Leg()
        role.handle(Generate(rid=f"r{i}", input_ids=prompt, options=options))
        while loop.turn():
            role.poll()
    return [WholeAnswer(prompt, recorder.legs[f"r{i}"]) for i, (prompt, _) in enumerate(requests)]


def requests_of(seed: int, count: int) -> list[tuple[list[int], RequestOptions]]:
    """Prompts of 1 to 200 tokens, up to 24 new ones; greedy, drawn, and drawn from a part of the vocabulary in turn."""
    return [
        (
            prompt,
            RequestOptions(
                sampling=SamplingParams(
                    max_new_tokens=1 + (7 * i) % 24,
                    temperature=float(i % 3 > 0),
                    top_p=0.9 if i % 3 == 2 else 1.0,
                    seed=i,
                    ignore_eos=True,
                ),
                return_logprob=True,
                return_routed_experts=True,
            ),
        )
        for i, prompt in enumerate(random_prompts(seed, count, longest=200))
    ]


def body_of(prompt: list[int], options: RequestOptions) -> dict[str, Any]:
    """The same request for the router."""
    sampling = options.sampling
    return {
        "input_ids": prompt,
        "sampling_params": {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "sampling_seed": sampling.seed,
            "ignore_eos": sampling.ignore_eos,
        },
        "return_logprob": options.return_logprob,
        "return_routed_experts": options.return_routed_experts,
        "routed_experts_dtype": "auto",
    }


def test_each_worker_has_a_gpu_of_its_own(stack: Stack):
    gpus = [
        command.environment.get("CUDA_VISIBLE_DEVICES") for command in stack.plan.commands if command.role != "router"
    ]
    assert len(gpus) == 2
    assert DEVICE == "cpu" or len({*gpus} - {None, ""}) == 2


def test_one_at_a_time_a_pair_is_one_engine(stack: Stack, checkpoint: Path):
    """Tokens, logprobs and every row of 12 requests, and the bytes that NIXL has moved for them."""
    asyncio.run(compare_with_one_engine(stack, checkpoint))


async def compare_with_one_engine(stack: Stack, checkpoint: Path) -> None:
    requests = requests_of(31, 12)
    async with Client(stack.url) as client:
        before = await client.quiet_stats()
        replies = await client.run_all([body_of(*request) for request in requests], concurrency=1)
        after = await client.quiet_stats()

    expected = run_alone(make_engine(checkpoint), requests)
    for (prompt, _), reply, alone in zip(requests, replies, expected, strict=True):
        case = f"{len(prompt)} prompt tokens, {len(alone.output_ids)} new ones"
        assert reply.meta["cached_tokens"] == 0, case
        assert reply.output_ids == alone.output_ids, case
        assert [item[0] for item in reply.meta["output_token_logprobs"]] == alone.logprobs, case
        assert alone.rows is not None
        assert reply.rows.dtype == alone.rows.dtype
        assert reply.rows.shape == alone.rows.shape, case
        assert np.array_equal(reply.rows, alone.rows), case

    sent, received = (after[role]["kv_bytes"] - before[role]["kv_bytes"] for role in ("prefill", "decode"))
    num_pages = sum(-(-len(prompt) // 16) for prompt, _ in requests)
    assert sent == received > 0
    assert sent % num_pages == 0


def test_the_reference_workload_has_no_bad_row(stack: Stack):
    """The shipped workload, 16 requests at once; every row is there, in range, and without repetitions."""
    summary = replay(ReplayOptions(url=stack.url, concurrency=16))
    assert summary.problems == []
    assert summary.failed_requests == 0
    assert summary.range_checked
    assert summary.rows is not None
    assert summary.rows.rows > 0
    assert summary.bad_rows == 0
    assert summary.is_good


def test_nothing_is_held_at_the_end(stack: Stack):
    async def look() -> None:
        async with Client(stack.url) as client:
            await client.quiet_stats()

    asyncio.run(look())
