"""A real stack whose workers give their memory back and take it again: what is asked meanwhile waits, and then all is right."""

import asyncio
import gzip
import json
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save

from common.engine.profiles import STEP
from deploy.demo_model import write_demo_model
from deploy.stack import Stack, running_stack
from tests.support.checkpoints import SHAPES
from tests.support.http_client import Client, Reply
from tests.support.judge import Judge, Tally
from tests.support.prompts import random_prompts
from tests.support.trainer import halves

SHAPE = "mixed"
PROMPTS = [prompt for prompt in random_prompts(91, 24, longest=50) if len(prompt) > 1][:12]
SPLITS = {"one-rank": [], "two-ranks": ["--prefill.tp=2"], "two-groups": ["--prefill.dp=2", "--prefill.ep"]}
HALF = "/update_weights_from_tensor?weight_version=newer"
FLAGS = [
    "--device=cpu",
    "--cpu-threads=1",
    "--page-size=4",
    "--prefill.kv-pool-tokens=1024",
    "--decode.kv-pool-tokens=1024",
    "--prefill.chunked-prefill-tokens=32",
]


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with other weights."""
    folder = tmp_path_factory.mktemp("newer") / "newer"
    write_demo_model(folder, **(SHAPES[SHAPE] | {"seed": 93}))
    return folder


@pytest.fixture(scope="module", params=SPLITS)
def stack(
    request: pytest.FixtureRequest,
    checkpoint_of: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Stack]:
    flags = [f"--model={checkpoint_of(SHAPE)}", *FLAGS, *SPLITS[str(request.param)]]
    with running_stack(flags, log_file=tmp_path_factory.mktemp("stack") / "log") as running:
        yield running


def worker_url(stack: Stack, role: str) -> str:
    return next(command.url for command in stack.plan.commands if command.role == role)


def body_of(prompt: list[int]) -> dict[str, Any]:
    return {
        "input_ids": prompt,
        "sampling_params": {"max_new_tokens": 7, "temperature": 0, "ignore_eos": True},
        "return_routed_experts": True,
        "routed_experts_dtype": "auto",
    }


def judge_all(judge: Judge, replies: list[Reply]) -> None:
    tally = Tally()
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        judge.add(tally, prompt, reply.output_ids, reply.rows)
    tally.assert_clean()


async def serve(client: Client) -> list[Reply]:
    return await client.run_all([body_of(prompt) for prompt in PROMPTS])


async def healths(client: Client) -> list[tuple[int, str, list[str]]]:
    """What each worker says of itself."""
    said = []
    for worker in (await client.get("/server_info"))[1]["workers"]:
        async with Client(worker["url"]) as direct:
            status, health = await direct.get("/health")
        said.append((status, health["status"], worker["info"]["memory_released"]))
    return said


async def test_a_trainer_takes_the_memory_and_gives_it_back(
    stack: Stack, checkpoint_of: Callable[[str], Path], judge_of: Callable[[str], Judge], newer: Path
):
    async with Client(stack.url) as client:
        judge_all(judge_of(SHAPE), await serve(client))
        before = await client.quiet_stats()
        await client.told("/pause_generation", mode="retract")
        await client.told("/release_memory_occupation")
        assert await healths(client) == [(503, "released", ["weights", "kv_cache"])] * 2

        waiting = asyncio.create_task(serve(client))
        status, answer = await client.post({"model_path": str(newer)}, path="/update_weights_from_disk")
        assert (status, answer["success"]) == (400, False)
        assert "released" in answer["message"]
        await client.told("/resume_memory_occupation", tags=["weights"])
        assert await healths(client) == [(503, "released", ["kv_cache"])] * 2
        await client.told("/update_weights_from_disk", model_path=str(newer))
        await client.told("/resume_memory_occupation")
        assert await healths(client) == [(200, "ok", [])] * 2
        assert not waiting.done()
        await client.told("/continue_generation")

        judge_all(Judge(newer), await waiting)
        judge_all(Judge(newer), await serve(client))
        after = await client.quiet_stats()
        for role, stats in after.items():
            assert stats["pages"]["total"] == before[role]["pages"]["total"]
            assert stats["failed_steps"] == stats["rows_refused"] == 0
            for counter in ("kv_bytes", "kv_writes", "dropped_messages", "steps", "rows_committed"):
                assert stats[counter] >= before[role][counter]
            assert stats["kv_bytes"] > before[role]["kv_bytes"]
        await client.told("/update_weights_from_disk", model_path=str(checkpoint_of(SHAPE)))


async def test_an_idle_pair_needs_no_pause(
    stack: Stack, checkpoint_of: Callable[[str], Path], judge_of: Callable[[str], Judge], newer: Path
):
    """Each worker is told by itself, as some trainers do it; and its weights come in two halves while its KV is away."""
    bodies = [save(half) for half in halves(load_file(newer / "model.safetensors"))]
    async with Client(stack.url) as client, AsyncExitStack() as opened:
        workers = [await opened.enter_async_context(Client(worker_url(stack, role))) for role in ("prefill", "decode")]
        judge_all(judge_of(SHAPE), await serve(client))
        for worker in workers:
            status, answer = await worker.post(bodies[0], path=HALF)
            assert (status, "pause generation" in answer["message"]) == (400, True)
            await worker.until_good("/flush_cache")
            await worker.told("/release_memory_occupation")
        assert await healths(client) == [(503, "released", ["weights", "kv_cache"])] * 2
        for worker in workers:
            status, answer = await worker.get("/health_generate")
            assert (status, answer["error"]["code"]) == (503, "memory_released")
            for path in ("/flush_cache", "/v1/loads", "/metrics", "/get_server_info"):
                assert (await worker.get(path))[0] == 200
            for path in ("/pause_generation", "/continue_generation", "/flush_cache"):
                await worker.told(path)
            status, answer = await worker.post(bodies[0], path=HALF)
            assert (status, "the weights' memory is released" in answer["message"]) == (400, True)
            await worker.told("/resume_memory_occupation", tags=["weights"])
            for body in bodies:
                status, answer = await worker.post(body, path=HALF)
                assert (status, answer["success"]) == (200, True), answer
            await worker.until_good("/flush_cache")
        assert await healths(client) == [(503, "released", ["kv_cache"])] * 2
        for worker in workers:
            await worker.told("/resume_memory_occupation", tags=["kv_cache", "cuda_graph"])
        assert await healths(client) == [(200, "ok", [])] * 2
        # The router asks them again before it turns somebody away.
        judge_all(Judge(newer), await serve(client))
        await client.quiet_stats()
        await client.told("/update_weights_from_disk", model_path=str(checkpoint_of(SHAPE)))


@pytest.mark.parametrize("paused", ["before", "between"])
async def test_a_pause_outlives_the_release(stack: Stack, judge_of: Callable[[str], Judge], paused: str):
    async with Client(stack.url) as client, Client(worker_url(stack, "decode")) as worker:
        if paused == "before":
            await worker.told("/pause_generation")
        await worker.told("/release_memory_occupation", tags=["kv_cache"])
        if paused == "between":
            await worker.told("/pause_generation")
        await worker.told("/resume_memory_occupation")
        waiting = asyncio.create_task(serve(client))
        while (await worker.get("/v1/loads"))[1]["queued_requests"] < len(PROMPTS):
            assert not waiting.done()
        assert (await worker.get("/v1/loads"))[1]["running_requests"] == 0
        await worker.told("/continue_generation")
        judge_all(judge_of(SHAPE), await waiting)


@pytest.mark.parametrize("roles", [["prefill"], ["decode"], ["prefill", "decode", "decode"]])
async def test_one_worker_alone_is_back_as_after_a_restart(
    stack: Stack, judge_of: Callable[[str], Judge], roles: list[str]
):
    """The other one has known it under another name, and goes on serving."""
    async with Client(stack.url) as client:
        judge_all(judge_of(SHAPE), await serve(client))
        for role in roles:
            await client.quiet_stats()
            async with Client(worker_url(stack, role)) as worker:
                await worker.told("/pause_generation")
                await worker.told("/release_memory_occupation", tags=["kv_cache"])
                assert (await worker.post(body_of(PROMPTS[0])))[0] in (400, 503)
                await worker.told("/resume_memory_occupation")
                await worker.told("/continue_generation")
            # The router asks how they are when it lets requests through.
            await client.told("/continue_generation")
            judge_all(judge_of(SHAPE), await serve(client))
        await client.quiet_stats()


async def test_while_a_request_runs_the_memory_stays(stack: Stack, judge_of: Callable[[str], Judge]):
    body = body_of(PROMPTS[0])
    body["sampling_params"]["max_new_tokens"] = 900
    async with Client(stack.url) as client, Client(worker_url(stack, "decode")) as worker:
        waiting = asyncio.create_task(client.generate(**body))
        while (await worker.get("/v1/loads"))[1]["running_requests"] == 0:
            assert not waiting.done()
        status, answer = await worker.post({}, path="/release_memory_occupation")
        assert (status, answer["error"]["code"]) == (400, "memory_refused")
        assert (await worker.get("/health"))[0] == 200
        assert not waiting.done()
        await worker.told("/abort_request", abort_all=True)
        tally, reply = Tally(), await waiting
        assert reply.meta["finish_reason"]["type"] == "abort"
        judge_of(SHAPE).add(tally, PROMPTS[0], reply.output_ids, reply.rows)
        tally.assert_clean()
        await worker.told("/release_memory_occupation")
        await worker.told("/resume_memory_occupation")


async def test_while_a_request_is_open_the_memory_stays(stack: Stack, judge_of: Callable[[str], Judge]):
    async with Client(stack.url) as client, Client(worker_url(stack, "decode")) as worker:
        await worker.told("/pause_generation", mode="in_place")
        waiting = asyncio.create_task(client.generate(**body_of(PROMPTS[0])))
        while (await worker.get("/v1/loads"))[1]["open_requests"] == 0:
            assert not waiting.done()
        status, answer = await worker.post({}, path="/release_memory_occupation")
        assert (status, answer["error"]["code"]) == (400, "memory_refused")
        assert (await worker.get("/health"))[0] == 200
        await worker.told("/continue_generation")
        await client.told("/continue_generation")
        tally = Tally()
        reply = await waiting
        judge_of(SHAPE).add(tally, PROMPTS[0], reply.output_ids, reply.rows)
        tally.assert_clean()


async def test_every_rank_of_every_worker_writes_a_profile(stack: Stack, tmp_path: Path):
    folder = tmp_path / "profiles"
    async with Client(stack.url) as client:
        await client.told("/start_profile", output_dir=str(folder))
        assert (await client.post({}, path="/start_profile"))[0] == 400
        await serve(client)
        await client.told("/stop_profile")
        assert (await client.post({}, path="/stop_profile"))[0] == 400
        num_ranks = sum(worker["info"]["tp_size"] for worker in (await client.get("/server_info"))[1]["workers"])
    names = sorted(path.name for path in folder.iterdir())
    prefill = ["engine"] if num_ranks == 2 else ["engine-0", "engine-1"]
    assert names == ["decode-engine.trace.json.gz", *(f"prefill-{name}.trace.json.gz" for name in prefill)]
    for path in folder.iterdir():
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        assert STEP in {event.get("name") for event in events}
