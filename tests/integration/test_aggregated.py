"""`deploy.up --aggregated`: one worker behind the router, with the contract that a pair has; and the worker's own URL."""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.replay.command import main as replay
from deploy.stack import Stack, running_stack
from tests.support.http_client import Client, Reply, rows_in
from tests.support.judge import Judge, Tally
from tests.support.prompts import random_prompts

SHAPE = "mixed"
G = 5
PROMPT = [*range(60, 99)]
GREEDY = {"temperature": 0, "max_new_tokens": G, "ignore_eos": True}


@pytest.fixture(scope="module")
def stack(checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    flags = [
        f"--model={checkpoint_of(SHAPE)}",
        "--aggregated",
        "--device=cpu",
        "--cpu-threads=1",
        "--page-size=4",
        "--kv-pool-tokens=1024",
        "--aggregated.chunked-prefill-tokens=96",
    ]
    with running_stack(flags, log_file=tmp_path_factory.mktemp("stack") / "log") as running:
        yield running


@pytest.fixture
async def client(stack: Stack):
    async with Client(stack.url) as opened:
        yield opened
        assert list(await opened.quiet_stats()) == ["aggregated"]


@pytest.fixture
async def worker(stack: Stack):
    """The worker's own URL, past the router."""
    async with Client(stack.plan.commands[0].url) as opened:
        yield opened


@pytest.fixture
def judge(judge_of: Callable[[str], Judge]) -> Judge:
    return judge_of(SHAPE)


def check(judge: Judge, fields: dict[str, Any], prompt: list[int], output_ids: list[int], start: int = 0) -> None:
    tally = Tally()
    rows = rows_in(fields)
    if fields["routed_experts_dtype"] == "int32":
        assert rows.shape[1] == 6
        rows = rows[:, fields["routed_experts_moe_layer_ids"]]
    judge.add(tally, prompt, output_ids, rows, start=start)
    assert (tally.requests, tally.wrong, tally.ties) == (1, 0, 0)


@pytest.mark.parametrize("start", [0, len(PROMPT) // 2, len(PROMPT)])
@pytest.mark.parametrize("form", ["int32", "auto", "msgpack"])
async def test_generate(client: Client, worker: Client, judge: Judge, form: str, start: int):
    """Whole and streamed, by the router and by the worker itself: the same tokens, and all rows in one block."""
    body: dict[str, Any] = {
        "input_ids": PROMPT,
        "sampling_params": GREEDY,
        "return_routed_experts": True,
        "routed_experts_start_len": start,
        "routed_experts_dtype": "int32" if form == "int32" else "auto",
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    expected = judge.reference.generate(PROMPT, G)
    for served_by in (client, worker):
        replies = [await served_by.generate(msgpack=form == "msgpack", **body)]
        *events, done = await served_by.stream(**body)
        assert (done, len(events)) == ("[DONE]", G + 1)
        replies.append(Reply(events[-1]))
        for reply in replies:
            assert reply.output_ids == expected
            assert reply.meta["routed_experts_start_len"] == start
            assert len(reply.meta["input_token_logprobs"]) == len(PROMPT)
            assert len(reply.meta["output_token_logprobs"]) == G
            assert reply.meta["prefill_forward_duration"] > 0
            check(judge, reply.meta, PROMPT, expected, start)


async def test_lists_and_samples(client: Client, judge: Judge):
    prompts = random_prompts(3, 4, longest=60)
    body: dict[str, Any] = {
        "input_ids": prompts,
        "sampling_params": {"temperature": 1.0, "max_new_tokens": 6, "n": 3, "ignore_eos": True, "sampling_seed": 5},
        "return_routed_experts": True,
    }
    status, replies = await client.post(body, msgpack=True)
    assert (status, len(replies)) == (200, 12)
    tally = Tally()
    for index, reply in enumerate(map(Reply, replies)):
        tokens = [*prompts[index // 3], *reply.output_ids]
        rows = reply.rows
        judge.add(tally, tokens[:-1], tokens[-1:], rows, greedy=False)
    tally.assert_clean()
    *events, done = await client.stream(**{**body, "input_ids": prompts[0]})
    last = {event["index"]: event for event in events}
    assert done == "[DONE]"
    assert [last[index]["output_ids"] for index in range(3)] == [reply["output_ids"] for reply in replies[:3]]


async def test_openai_routes(client: Client, judge: Judge):
    expected = judge.reference.generate(PROMPT, G)
    body: dict[str, Any] = {
        "model": "m",
        "max_tokens": G,
        "temperature": 0,
        "ignore_eos": True,
        "return_routed_experts": True,
    }
    status, reply = await client.post({**body, "prompt": PROMPT, "n": 2}, path="/v1/completions")
    assert (status, len(reply["choices"])) == (200, 2)
    check(judge, reply["sglext"], PROMPT, expected)
    *chunks, done = await client.stream(path="/v1/completions", **body, prompt=PROMPT)
    assert done == "[DONE]"
    check(judge, chunks[-1]["sglext"], PROMPT, expected)
    chat = {**body, "messages": [{"role": "user", "content": "Hello there."}], "return_meta_info": True}
    status, reply = await client.post(chat, path="/v1/chat/completions")
    assert status == 200
    num_rows = len(rows_in(reply["choices"][0]["meta_info"]))
    assert num_rows == reply["usage"]["prompt_tokens"] + reply["usage"]["completion_tokens"] - 1
    assert (await client.get("/v1/models"))[0] == 200


async def test_a_scored_prompt_and_a_stop_string(client: Client, worker: Client):
    for served_by in (client, worker):
        body: dict[str, Any] = {
            "input_ids": PROMPT,
            "sampling_params": {"max_new_tokens": 0},
            "return_routed_experts": True,
        }
        *events, _ = await served_by.stream(**body)
        for scored in (await served_by.generate(**body), Reply(events[-1])):
            assert scored.output_ids == []
            assert len(scored.rows) == len(PROMPT) - 1
        whole = await served_by.generate(text="a b c", sampling_params={**GREEDY, "max_new_tokens": 30})
        stop = whole.body["text"][5:7]
        reply = await served_by.generate(
            text="a b c",
            sampling_params={**GREEDY, "max_new_tokens": 30, "stop": stop},
            return_routed_experts=True,
        )
        assert reply.meta["finish_reason"] == {"type": "stop", "matched": stop}
        assert len(reply.output_ids) < 30
        assert len(reply.rows) == reply.meta["prompt_tokens"] + len(reply.output_ids) - 1


@pytest.mark.parametrize("at_router", [True, False])
async def test_aborts_flushes_and_clients_that_leave(client: Client, worker: Client, at_router: bool):
    served_by = client if at_router else worker
    long: dict[str, Any] = {
        "input_ids": PROMPT,
        "sampling_params": {**GREEDY, "max_new_tokens": 900},
        "return_routed_experts": True,
    }
    running = asyncio.create_task(served_by.generate(rid="one", **long))
    leaving = asyncio.create_task(served_by.generate(rid="two", **long))
    # The router says so when no worker knows the request yet; then it is asked again.
    while (await worker.get("/v1/loads"))[1]["running_requests"] < 2:
        assert not running.done()
    assert (await served_by.post({}, path="/flush_cache"))[0] == 400
    leaving.cancel()
    assert (await served_by.post({"rid": "one"}, path="/abort_request"))[0] == 200
    reply = await running
    assert reply.meta["finish_reason"]["type"] == "abort"
    assert len(reply.rows) == max(0, len(PROMPT) + len(reply.output_ids) - 1)
    await client.quiet_stats()
    assert (await served_by.post({}, path="/flush_cache"))[0] == 200
    assert (await served_by.generate(input_ids=PROMPT, sampling_params=GREEDY)).meta["cached_tokens"] == 0
    assert (await served_by.generate(input_ids=PROMPT, sampling_params=GREEDY)).meta["cached_tokens"] == 36


async def test_errors_name_no_other_leg(client: Client, worker: Client):
    for served_by in (client, worker):
        error = await served_by.error({"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 5000}})
        assert (error["status"], error["leg"]) == (400, None)
        error = await served_by.error({"input_ids": PROMPT, "sampling_params": {"n": 300}})
        assert (error["status"], error["leg"]) == (400, None)
        assert "sampling_params.n" in error["message"]
    room = {"bootstrap_host": "h", "bootstrap_port": 1, "bootstrap_room": 7}
    error = await worker.error({"input_ids": PROMPT, **room})
    assert (error["status"], error["leg"]) == (400, None)
    assert "bootstrap_room" in error["message"]


async def test_what_it_says_of_itself(client: Client, worker: Client):
    for path in ("/health", "/health_generate", "/server_info", "/model_info", "/v1/loads", "/metrics"):
        for served_by in (client, worker):
            assert (await served_by.get(path))[0] == 200, path
    _, info = await worker.get("/server_info")
    assert (info["disaggregation_mode"], info["disaggregation_bootstrap_port"]) == ("null", None)
    _, workers = await client.get("/workers")
    assert [one["worker_type"] for one in workers["workers"]] == ["aggregated"]
    assert 'role="aggregated"' in (await worker.get("/metrics"))[1]


async def test_replay_finds_nothing_wrong_at_either_address(
    client: Client, worker: Client, checkpoint_of: Callable[[str], Path], tmp_path: Path
):
    workload = tmp_path / "workload.jsonl"
    lines = [{"prompt": "The river was wide."}, *({"input_ids": prompt} for prompt in random_prompts(6, 10))]
    workload.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for served_by in (client, worker):
        flags = [f"--url={served_by.url}", f"--workload={workload}", f"--reference={checkpoint_of(SHAPE)}"]
        assert await asyncio.to_thread(replay, flags) == 0


async def test_a_pool_that_is_too_small_for_all_of_them(client: Client, judge: Judge):
    prompts = random_prompts(4, 24, longest=60)
    bodies = [
        {
            "input_ids": prompt,
            "sampling_params": {**GREEDY, "max_new_tokens": 100},
            "return_routed_experts": True,
            "routed_experts_dtype": "auto",
        }
        for prompt in prompts
    ]
    replies = await client.run_all(bodies, concurrency=24)
    tally = Tally()
    for prompt, reply in zip(prompts, replies, strict=True):
        judge.add(tally, prompt, reply.output_ids, reply.rows)
    tally.assert_clean()
    assert (await client.quiet_stats())["aggregated"]["swaps"] > 0
