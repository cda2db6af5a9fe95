"""One stack, many shapes of /generate: replies, streams, lists, bad input, clients that leave; at the end nothing is held."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.stack import Stack, running_stack
from tests.support.http_client import Client, Reply, expand
from tests.support.judge import Judge, Tally

SHAPE = "mixed"
PROMPT = list(range(40, 77))
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0}
ROWS: dict[str, Any] = {"return_routed_experts": True, "routed_experts_dtype": "auto"}


@pytest.fixture(scope="module")
def stack(checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    flags = [f"--model={checkpoint_of(SHAPE)}", "--device=cpu", "--cpu-threads=1", "--kv-pool-tokens=1024"]
    with running_stack([*flags, "--context-tokens=900"], log_file=tmp_path_factory.mktemp("stack") / "log") as running:
        yield running


@pytest.fixture
async def client(stack: Stack):
    """Each test must leave the workers empty-handed."""
    async with Client(stack.url) as opened:
        yield opened
        await opened.quiet_stats()


def judged(judge: Judge, reply: Reply, prompt: list[int], *, start: int = 0, greedy: bool = True) -> None:
    tally = Tally()
    judge.add(tally, prompt, reply.output_ids, reply.rows, start=start, greedy=greedy)
    tally.assert_clean()


@pytest.fixture
def judge(judge_of: Callable[[str], Judge]) -> Judge:
    return judge_of(SHAPE)


async def test_json_int32_covers_all_hidden_layers(client: Client, judge: Judge):
    reply = await client.generate(input_ids=PROMPT, sampling_params=GREEDY, return_routed_experts=True)
    compact = await client.generate(input_ids=PROMPT, sampling_params=GREEDY, **ROWS, msgpack=True)
    judged(judge, compact, PROMPT)
    assert compact.meta["routed_experts_layer_ids"] == [1, 5]
    assert reply.meta["routed_experts_dtype"] == "int32"
    assert reply.meta["routed_experts_layer_ids"] == [0, 1, 2, 3, 4, 5]
    assert np.array_equal(reply.rows, expand(compact.rows, [1, 5], 6))
    assert reply.meta["prompt_tokens"] == len(PROMPT)
    assert reply.meta["completion_tokens"] == len(reply.output_ids) == 6
    assert reply.meta["finish_reason"] == {"type": "length", "length": 6}
    for timing in (
        "pd_prefill_forward_duration",
        "pd_transfer_duration",
        "pd_transfer_exposed_duration",
        "pd_transfer_total_mb",
        "pd_transfer_speed_gb_s",
    ):
        assert reply.meta[timing] > 0


@pytest.mark.parametrize("start", [0, len(PROMPT) // 2, len(PROMPT)])
async def test_start_len(client: Client, judge: Judge, start: int):
    reply = await client.generate(input_ids=PROMPT, sampling_params=GREEDY, **ROWS, routed_experts_start_len=start)
    assert reply.meta["routed_experts_start_len"] == start
    judged(judge, reply, PROMPT, start=start)


async def test_text_prompt_and_text_out(client: Client):
    reply = await client.generate(text="The river was", sampling_params=GREEDY)
    assert isinstance(reply.body["text"], str)
    assert "routed_experts" not in reply.meta


async def test_list(client: Client, judge: Judge):
    prompts = [PROMPT, PROMPT[:5], [7]]
    params = [{"max_new_tokens": n, "temperature": 0} for n in (1, 2, 9)]
    status, replies = await client.post(
        {"input_ids": prompts, "sampling_params": params, "rid": ["a", "b", "c"], **ROWS}
    )
    assert status == 200
    assert [reply["meta_info"]["id"] for reply in replies] == ["a", "b", "c"]
    for prompt, reply in zip(prompts, replies, strict=True):
        judged(judge, Reply(reply), prompt)


async def test_stream_ends_with_rows(client: Client, judge: Judge):
    events = await client.stream(input_ids=PROMPT, sampling_params=GREEDY, **ROWS)
    *parts, last, done = events
    assert done == "[DONE]"
    assert len(parts) == 6
    assert [len(part["output_ids"]) for part in parts] == [1, 2, 3, 4, 5, 6]
    assert all("routed_experts" not in part["meta_info"] for part in parts)
    judged(judge, Reply(last), PROMPT)
    whole = await client.generate(input_ids=PROMPT, sampling_params=GREEDY)
    assert last["text"] == whole.body["text"]
    assert last["output_ids"] == whole.output_ids


async def test_stream_of_a_list(client: Client, judge: Judge):
    prompts = [PROMPT, [3, 4]]
    events = await client.stream(input_ids=prompts, sampling_params=GREEDY, **ROWS)
    for index, prompt in enumerate(prompts):
        mine = [event for event in events[:-1] if event["index"] == index]
        judged(judge, Reply(mine[-1]), prompt)


async def test_a_prompt_is_only_scored(client: Client, judge: Judge):
    reply = await client.generate(input_ids=PROMPT, sampling_params={"max_new_tokens": 0}, **ROWS)
    assert reply.output_ids == []
    assert reply.rows.shape[0] == len(PROMPT) - 1
    expected = judge.trace(PROMPT).expert_ids[:-1]
    assert np.array_equal(np.sort(reply.rows), np.sort(expected))


async def test_a_scored_prompt_with_every_row_held_already(client: Client):
    body: dict[str, Any] = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 0}}
    body["routed_experts_start_len"] = len(PROMPT)
    reply = await client.generate(**body, **ROWS)
    assert reply.meta["routed_experts"] == ""
    assert reply.rows.shape[0] == 0


@pytest.mark.parametrize(("host", "named"), [("a b", "bootstrap_host"), ("192.0.2.1", "192.0.2.1:1")])
async def test_a_wrong_bootstrap_address_is_the_clients_mistake(stack: Stack, host: str, named: str):
    """One that cannot be an address, and one beyond this host, which nobody dials without a secret."""
    [decode] = [command for command in stack.plan.commands if command.role == "decode"]
    async with Client(decode.url) as worker:
        body = {"input_ids": PROMPT, "bootstrap_host": host, "bootstrap_port": 1, "bootstrap_room": 5}
        error = await worker.error(body)
        assert error["status"] == 400
        assert named in error["message"]
        assert (await worker.get("/health_generate"))[0] == 200


async def test_sampling_repeats_itself_and_follows_its_seed(client: Client, judge: Judge):
    params = {"max_new_tokens": 12, "temperature": 1.0, "ignore_eos": True}

    async def sampled(seed: int | None) -> Reply:
        body = params if seed is None else {**params, "sampling_seed": seed}
        return await client.generate(input_ids=PROMPT, sampling_params=body, return_logprob=True, **ROWS)

    first, second, other = await asyncio.gather(sampled(1), sampled(1), sampled(2))
    drawn, drawn_again = await asyncio.gather(sampled(None), sampled(None))
    assert first.output_ids == second.output_ids != other.output_ids
    assert drawn.output_ids != drawn_again.output_ids
    for reply in (first, other, drawn):
        judged(judge, reply, PROMPT, greedy=False)
    logits = judge.trace([*PROMPT, *first.output_ids[:-1]]).logits[len(PROMPT) - 1 :]
    logprobs = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    expected = logprobs[np.arange(12), first.output_ids]
    got = [item[0] for item in first.meta["output_token_logprobs"]]
    assert [item[1] for item in first.meta["output_token_logprobs"]] == first.output_ids
    assert np.allclose(got, expected, atol=1e-3)


async def test_stop_token_ends_the_rows_too(client: Client, judge: Judge):
    whole = await client.generate(input_ids=PROMPT, sampling_params={**GREEDY, "ignore_eos": True})
    for index in (0, 3):
        stop = whole.output_ids[index]
        if stop in whole.output_ids[:index]:
            continue
        params = {**GREEDY, "ignore_eos": True, "stop_token_ids": [stop]}
        reply = await client.generate(input_ids=PROMPT, sampling_params=params, **ROWS)
        assert reply.output_ids == whole.output_ids[: index + 1]
        assert reply.meta["finish_reason"] == {"type": "stop", "matched": stop}
        judged(judge, reply, PROMPT)


BAD: list[tuple[str, Any]] = [
    ("input_ids", {"input_ids": []}),
    ("text", {"text": ""}),
    ("input_ids", {"input_ids": [10**6]}),
    ("input_ids", {"input_ids": [-1]}),
    ("max_new_tokens", {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 890}}),
    ("input_ids", {"input_ids": [1] * 1000}),
    ("routed_experts_start_len", {"input_ids": PROMPT, "return_routed_experts": True, "routed_experts_start_len": -1}),
    ("routed_experts_start_len", {"input_ids": PROMPT, "return_routed_experts": True, "routed_experts_start_len": 38}),
    ("temperature", {"input_ids": PROMPT, "sampling_params": {"temperature": -1}}),
    ("top_p", {"input_ids": PROMPT, "sampling_params": {"top_p": 0}}),
    ("routed_experts_dtype", {"input_ids": PROMPT, "routed_experts_dtype": "float32"}),
    ("JSON", b"{not json"),
    ("text", {}),
]


@pytest.mark.parametrize(("field", "body"), BAD)
async def test_bad_input_names_its_field(client: Client, field: str, body: object):
    """400 with the field's name; the fixture then sees that nothing is held, and the server goes on."""
    error = await client.error(body)
    assert error["status"] == 400
    assert field in error["message"]
    assert (await client.generate(input_ids=[1], sampling_params=GREEDY)).output_ids


async def test_a_worker_needs_a_room(stack: Stack):
    for command in stack.plan.commands:
        if command.role != "router":
            async with Client(command.url) as worker:
                error = await worker.error({"input_ids": PROMPT, "sampling_params": GREEDY})
                assert error["status"] == 400
                assert "bootstrap_room" in error["message"]
                assert (await worker.get("/health_generate"))[0] == 200
                assert "tandem_kv_pages" in (await worker.get("/metrics"))[1]


async def test_clients_that_leave_free_everything(client: Client):
    """Connections closed before and during replies, streaming or not; the fixture counts the pages."""

    async def leave(streaming: bool) -> None:
        body = {
            "input_ids": PROMPT,
            "sampling_params": {"max_new_tokens": 800, "ignore_eos": True},
            "stream": streaming,
        }
        async with client.session.post(f"{client.url}/generate", json=body) as response:
            await response.content.readany()
            assert streaming

    async def leave_early() -> None:
        task = asyncio.create_task(leave(streaming=False))
        while (await client.worker_stats())["decode"]["running_requests"] == 0:
            pass
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    await leave_early()
    await client.quiet_stats()
    await asyncio.gather(*(leave(streaming=True) for _ in range(8)))


async def test_more_requests_than_the_pool_holds_wait_their_turn(client: Client, judge: Judge):
    """Ten requests that each take more than a third of the pool: all are answered, rightly."""
    body = {"sampling_params": {"max_new_tokens": 400, "temperature": 0, "ignore_eos": True}, **ROWS}
    prompts = [[i, *PROMPT] for i in range(10)]
    for prompt, reply in zip(prompts, await client.run_all([{**body, "input_ids": p} for p in prompts]), strict=True):
        judged(judge, reply, prompt)


async def test_control_routes(client: Client):
    assert (await client.get("/health"))[0] == 200
    assert (await client.get("/health_generate"))[0] == 200
    status, workers = await client.get("/workers")
    assert status == 200
    assert [worker["worker_type"] for worker in workers["workers"]] == ["prefill", "decode"]
    assert (await client.get("/nowhere"))[0] == 404
