"""Workers of several ranks as real processes: gloo inside, NIXL between them, whatever is split on either side."""

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.stack import make_stack
from tests.fault.stack_requests import until_so
from tests.support.http_client import Client, Reply
from tests.support.judge import Judge, Tally
from tests.support.prompts import random_prompts

COMMON = ["--device=cpu", "--cpu-threads=1", "--page-size=4", "--kv-pool-tokens=4096", "--context-tokens=1024"]

SERVES_AGAIN_WITHIN_S = 30.0

MIXES = {
    "tp2 to 1": ["--prefill.tp=2"],
    "1 to tp2": ["--decode.tp=2"],
    "tp2 to tp4, whole experts": ["--prefill.tp=2", "--prefill.ep", "--decode.tp=4", "--decode.ep"],
    "dp2 to dp2": ["--prefill.dp=2", "--decode.dp=2"],
    "tp4 dp2 to tp2": ["--prefill.tp=4", "--prefill.dp=2", "--decode.tp=2"],
}


def bodies_of(prompts: list[list[int]], max_new_tokens: int) -> list[dict[str, Any]]:
    return [
        {
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": max_new_tokens, "temperature": 0, "ignore_eos": True},
            "return_routed_experts": True,
            "routed_experts_dtype": "auto",
        }
        for prompt in prompts
    ]


@pytest.mark.parametrize("name", MIXES)
async def test_pairs_of_different_splits(
    checkpoint_of: Callable[[str], Path], judge_of: Callable[[str], Judge], tmp_path: Path, name: str
):
    shape = "mixed" if "dp2" in name else "plain"
    prompts = random_prompts(51, 32)
    flags = [f"--model={checkpoint_of(shape)}", "--prefill.chunked-prefill-tokens=64", *COMMON, *MIXES[name]]
    async with make_stack(flags, log_file=tmp_path / "log") as stack, Client(stack.url) as client:
        start = await client.quiet_stats()
        replies = await client.run_all(bodies_of(prompts, 9), concurrency=16)
        end = await client.quiet_stats()
    tally, judge = Tally(), judge_of(shape)
    for prompt, reply in zip(prompts, replies, strict=True):
        judge.add(tally, prompt, reply.output_ids, reply.rows)
    tally.assert_clean()
    for role, stats in end.items():
        pages = stats["pages"]
        assert pages["unaccounted"] == pages["quarantined"] == pages["running"] == 0
        assert pages["total"] == start[role]["pages"]["total"]
        assert stats["rows_refused"] == stats["failed_steps"] == 0
    assert end["prefill"]["kv_bytes"] == end["decode"]["kv_bytes"] > 0


@pytest.mark.parametrize(
    ("role", "flags", "victim"),
    [
        ("decode", ["--decode.tp=2"], 1),
        ("decode", ["--decode.dp=2"], 0),
        ("prefill", ["--prefill.tp=4", "--prefill.dp=2"], 3),
    ],
)
async def test_a_rank_that_is_killed_takes_its_worker_down_and_nothing_else(
    checkpoint_of: Callable[[str], Path],
    judge_of: Callable[[str], Judge],
    tmp_path: Path,
    role: str,
    flags: list[str],
    victim: int,
):
    """Every request ends, with the right answer or with an error that names leg and stage; then the worker serves again."""
    prompts = random_prompts(52, 60)
    argv = [f"--model={checkpoint_of('plain')}", "--restart", "--prefill.chunked-prefill-tokens=16", "--lease-s=5"]
    argv += [*COMMON, *flags]
    async with make_stack(argv, log_file=tmp_path / "log") as stack, Client(stack.url) as client:
        name = f"{role}-0"
        pids = stack.engine_pids(name)
        assert len(pids) == (4 if "--prefill.tp=4" in flags else 2)
        asking = [asyncio.create_task(client.post(body)) for body in bodies_of(prompts, 40)]
        await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        os.kill(pids[victim], signal.SIGKILL)
        answers = await asyncio.wait_for(asyncio.gather(*asking), 60)
        await stack.wait_started(name, 2)
        assert not any(is_running(pid) for pid in pids)

        async def is_healthy() -> bool:
            return (await client.get("/health_generate"))[0] == 200

        async with asyncio.timeout(SERVES_AGAIN_WITHIN_S):
            await until_so(is_healthy)
        again = await client.run_all(bodies_of(prompts[:4], 6), concurrency=4)
        end = await client.quiet_stats()

    failed = [body["error"] for status, body in answers if status != 200]
    assert failed, "the rank was killed too late to matter"
    assert all(error["leg"] in ("prefill", "decode") and error["stage"] for error in failed)
    tally, judge = Tally(), judge_of("plain")
    whole = [(prompt, Reply(body)) for prompt, (status, body) in zip(prompts, answers, strict=True) if status == 200]
    for prompt, reply in [*whole, *zip(prompts, again, strict=False)]:
        judge.add(tally, prompt, reply.output_ids, reply.rows)
    tally.assert_clean()
    for stats in end.values():
        assert stats["pages"]["unaccounted"] == stats["pages"]["quarantined"] == stats["pages"]["running"] == 0


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


async def test_a_rank_that_is_stopped_takes_its_worker_down_too(checkpoint_of: Callable[[str], Path], tmp_path: Path):
    """The others wait for it inside of a step. Every request ends by the engine's deadline, and the launcher fences the worker."""
    flags = ["--prefill.dp=2", "--engine-deadline-s=3", "--fence-deadline-s=2", "--lease-s=5"]
    argv = [f"--model={checkpoint_of('plain')}", "--restart", *COMMON, *flags]
    async with make_stack(argv, log_file=tmp_path / "log") as stack, Client(stack.url) as client:
        pids = stack.engine_pids("prefill-0")
        os.kill(pids[1], signal.SIGSTOP)
        asking = [client.post(body) for body in bodies_of(random_prompts(53, 24), 8)]
        answers = await asyncio.wait_for(asyncio.gather(*asking), 60)
        errors = [body["error"] for status, body in answers if status != 200]
        assert errors
        assert all(error["leg"] in ("prefill", "decode") and error["stage"] for error in errors)
        await stack.wait_started("prefill-0", 2)
        assert not any(is_running(pid) for pid in pids)
        await client.quiet_stats()
