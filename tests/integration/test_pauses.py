"""A real pair that is paused while it has much to do: what goes on is what nobody interrupted, and what ends has the right rows."""

import asyncio
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.stack import make_stack
from tests.support.http_client import Client, Reply
from tests.support.judge import Judge, Tally
from tests.support.prompts import random_prompts

SHAPE = "plain"
NEW_TOKENS = 48
PROMPTS = [prompt for prompt in random_prompts(11, 80, longest=64) if len(prompt) > 20][:24]
FLAGS = [
    "--device=cpu",
    "--cpu-threads=1",
    "--page-size=4",
    "--max-running-requests=10",
    "--prefill.chunked-prefill-tokens=16",
    "--prefill.kv-pool-tokens=1024",
    "--decode.kv-pool-tokens=768",
    "--context-tokens=256",
    "--allow-mixed-versions",
]
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "sampling_seed": 5},
    {"temperature": 0, "repetition_penalty": 1.2, "frequency_penalty": 0.5, "min_new_tokens": 30},
    {"temperature": 0.9, "top_p": 0.9, "sampling_seed": 9, "presence_penalty": 0.7},
    {"temperature": 1.0, "sampling_seed": 3, "n": 2},
    {"temperature": 0, "stop": "to be found"},
]


@asynccontextmanager
async def paused_stack(checkpoint: Path, log_file: Path) -> AsyncIterator[Client]:
    async with (
        make_stack([f"--model={checkpoint}", *FLAGS], log_file=log_file) as stack,
        Client(stack.url) as client,
    ):
        start = await client.quiet_stats()
        yield client
        end = await client.quiet_stats()
        for role, stats in end.items():
            assert stats["pages"]["total"] == start[role]["pages"]["total"]
            assert stats["rows_refused"] == stats["failed_steps"] == 0


def body_of(number: int) -> dict[str, Any]:
    """One of many requests, each of another kind."""
    prompt, sampling = PROMPTS[number], SAMPLINGS[number % len(SAMPLINGS)]
    return {
        "rid": f"request-{number}",
        "input_ids": prompt,
        "sampling_params": {"max_new_tokens": NEW_TOKENS, "ignore_eos": True, **sampling},
        "return_routed_experts": True,
        "routed_experts_dtype": "auto",
        "routed_experts_start_len": (0, 7, len(prompt))[number % 3],
        "return_logprob": number % 2 == 0,
        "top_logprobs_num": 2,
        "stream": number % 4 >= 2,
    }


async def ask(client: Client, body: dict[str, Any]) -> list[Reply]:
    """All samples' answers; of a stream their last events."""
    if not body["stream"]:
        status, reply = await client.post(body)
        assert status == 200, reply
        return [Reply(one) for one in (reply if isinstance(reply, list) else [reply])]
    *events, done = await client.stream(**body)
    assert done == "[DONE]", done
    shown: dict[int, str] = {}
    ends = {}
    for event in events:
        index = event.get("index", 0)
        assert event["text"].startswith(shown.get(index, "")), "a text that was shown is not taken back"
        shown[index] = event["text"]
        if event["meta_info"]["finish_reason"] is not None:
            ends[index] = Reply(event)
    return [ends[index] for index in sorted(ends)]


async def with_a_stop_string(client: Client, body: dict[str, Any]) -> dict[str, Any]:
    """Choose a stop string in the middle of what comes without one."""
    sampling = dict(body["sampling_params"])
    if sampling.pop("stop", None) is None:
        return body
    [reply] = await ask(client, {**body, "sampling_params": sampling})
    text = reply.body["text"]
    begin = next(i for i in range(len(text) // 2, len(text) - 3) if "\N{REPLACEMENT CHARACTER}" not in text[i : i + 3])
    return {**body, "sampling_params": {**sampling, "stop": text[begin : begin + 3]}}


async def until_moved(client: Client, working: "asyncio.Future[Any]", num_tokens: int) -> None:
    """Wait until the decode worker has computed so many more tokens, or the work is done."""

    async def computed() -> int:
        return int((await client.worker_stats())["decode"]["tokens_computed"])

    begun = await computed()
    while not working.done() and await computed() - begun < num_tokens:
        pass


async def pausing(client: Client, mode: str, work: Awaitable[Any], rng: random.Random, rounds: int) -> tuple[int, int]:
    """Pause and go on at random moments while others work.

    Gives how often that was, and how many samples went on from tokens that they had.
    """
    working, num_pauses = asyncio.ensure_future(work), 0
    for _ in range(rounds):
        await until_moved(client, working, rng.randrange(1, 80))
        if working.done():
            break
        num_pauses += 1
        status, report = await client.post({"mode": mode}, path="/pause_generation")
        assert status == 200, report
        status, report = await client.post({}, path="/continue_generation")
        assert status == 200, report
    await working
    _, metrics = await client.get("/metrics")
    return num_pauses, int(
        sum(float(n) for n in re.findall(r'tandem_router_resumed_total{what="tokens"} (\S+)', metrics))
    )


def judged(judge: Judge, tally: Tally, body: dict[str, Any], reply: Reply) -> None:
    sampling = body["sampling_params"]
    greedy = sampling["temperature"] == 0 and "repetition_penalty" not in sampling
    start = body["routed_experts_start_len"]
    judge.add(tally, body["input_ids"], reply.output_ids, reply.rows, start=start, greedy=greedy)


def check_equal(reply: Reply, expected: Reply) -> None:
    """Everything that a client sees is what it would have been."""
    assert reply.output_ids == expected.output_ids
    assert reply.body["text"] == expected.body["text"]
    assert reply.meta["finish_reason"] == expected.meta["finish_reason"]
    assert reply.meta["prompt_tokens"] == expected.meta["prompt_tokens"]
    assert reply.meta["completion_tokens"] == expected.meta["completion_tokens"]
    assert reply.meta["weight_versions"] == expected.meta["weight_versions"]
    np.testing.assert_array_equal(np.sort(reply.rows, -1), np.sort(expected.rows, -1))
    for name in ("output_token_logprobs", "output_top_logprobs"):
        assert (name in reply.meta) == (name in expected.meta)
    ours, theirs = (each.meta.get("output_token_logprobs", []) for each in (reply, expected))
    np.testing.assert_allclose([one[0] for one in ours], [one[0] for one in theirs], rtol=1e-3, atol=1e-4)
    assert [token_id for _, token_id, _ in ours] == [token_id for _, token_id, _ in theirs]


@pytest.mark.parametrize("mode", ["retract", "in_place"])
async def test_what_is_paused_goes_on_as_if_nothing_had_happened(
    checkpoint_of: Callable[[str], Path], judge_of: Callable[[str], Judge], tmp_path: Path, mode: str
) -> None:
    judge, tally = judge_of(SHAPE), Tally()
    async with paused_stack(checkpoint_of(SHAPE), tmp_path / "log") as client:
        bodies = [await with_a_stop_string(client, body_of(number)) for number in range(len(PROMPTS))]
        expected = [await ask(client, body) for body in bodies]
        all_replies: list[list[Reply]] = []

        async def work() -> None:
            all_replies.extend(await asyncio.gather(*(ask(client, body) for body in bodies)))

        num_pauses, num_resumed = await pausing(client, mode, work(), random.Random(1), rounds=30)
    assert num_pauses >= 8
    assert num_resumed >= 8 if mode == "retract" else num_resumed == 0
    for body, replies, undisturbed in zip(bodies, all_replies, expected, strict=True):
        for reply, one in zip(replies, undisturbed, strict=True):
            check_equal(reply, one)
            judged(judge, tally, body, reply)
    tally.assert_clean()


async def test_abort_mode_answers_with_what_there_is(
    checkpoint_of: Callable[[str], Path], judge_of: Callable[[str], Judge], tmp_path: Path
) -> None:
    judge, tally, num_aborted = judge_of(SHAPE), Tally(), 0
    bodies = [body_of(number) for number in range(len(PROMPTS))]
    rng = random.Random(2)
    async with paused_stack(checkpoint_of(SHAPE), tmp_path / "log") as client:
        for _ in range(4):
            working = asyncio.gather(*(ask(client, body) for body in bodies))
            await until_moved(client, working, rng.randrange(1, 200))
            status, report = await client.post({}, path="/pause_generation")
            assert status == 200, report
            # All end while generation is paused.
            for body, replies in zip(bodies, await working, strict=True):
                for reply in replies:
                    reason = reply.meta["finish_reason"]
                    num_aborted += reason["type"] == "abort" and reason["cause"] == "requested"
                    if reply.output_ids:
                        judged(judge, tally, body, reply)
                    else:
                        assert "routed_experts" not in reply.meta
            waiting = asyncio.create_task(ask(client, bodies[0]))
            status, report = await client.post({}, path="/continue_generation")
            assert status == 200, report
            [reply] = await waiting
            assert len(reply.output_ids) == NEW_TOKENS
    assert num_aborted > len(bodies)
    tally.assert_clean()


async def test_whoever_comes_while_generation_is_paused_waits(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    async with paused_stack(checkpoint_of(SHAPE), tmp_path / "log") as client:
        expected = await ask(client, body_of(0))
        assert (await client.post({"mode": "in_place"}, path="/pause_generation"))[0] == 200
        status, _ = await client.get("/health_generate")
        assert status == 503
        waiting = asyncio.create_task(ask(client, body_of(0)))
        while "tandem_router_running_requests 1.0" not in (await client.get("/metrics"))[1]:
            pass
        # Whatever had begun before would say the name that the weights had.
        renamed = {"new_version": "another", "abort_all_requests": False}
        assert (await client.post(renamed, path="/update_weight_version"))[0] == 200
        assert (await client.post({}, path="/continue_generation"))[0] == 200
        [reply] = await waiting
        assert [version for *_, version in reply.meta["weight_versions"]] == ["another"]
        assert reply.output_ids == expected[0].output_ids
