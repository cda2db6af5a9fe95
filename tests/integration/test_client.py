"""The client with a real pair: conversations by deltas, and rollouts that were ended and go on, against uninterrupted requests."""

import random
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.answers import Ids, Progress
from deploy.client import TandemClient
from deploy.connection import NO_RETRIES
from deploy.demo_model import write_demo_model
from deploy.replies import Reply
from deploy.stack import Stack, running_stack
from tests.support.judge import Judge, Tally

FLAGS = ["--device=cpu", "--cpu-threads=1"]
NUM_TURNS, NEW_TOKENS, OUTPUT_TOKENS = 20, 75, 25
DEEP: dict[str, Any] = {"num_hidden_layers": 12, "mlp_only_layers": [], "num_experts": 32, "num_experts_per_tok": 16}
"""192 bytes a position, half of what Qwen3-30B-A3B has: a turn's rows weigh as much as those of 50 tokens there."""
SEED = 4
"""Of a conversation in which no two experts at the edge of the top-k are so close that float32 rounding could swap them."""
SHAPE = "plain"
PROMPT = list(range(40, 77))


def is_transformers_own(judge: Judge, token_ids: list[int], num_output: int, rows: Ids, *, greedy: bool) -> None:
    """Check the rows of a whole sequence, and the tokens of its end."""
    tally = Tally()
    num_prompt = len(token_ids) - num_output
    judge.add(tally, token_ids[:num_prompt], token_ids[num_prompt:], rows, greedy=greedy)
    tally.assert_clean()


# ------------------------------------------------------------------------------------------------ conversations


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep")
    write_demo_model(folder, **DEEP)
    return folder


async def test_twenty_turns_have_the_rows_of_one_request_and_its_bytes(deep_model: Path, tmp_path: Path) -> None:
    flags = [f"--model={deep_model}", *FLAGS, "--kv-pool-tokens=4096", "--context-tokens=2500"]
    rng = random.Random(SEED)
    with running_stack(flags, log_file=tmp_path / "log") as stack:
        async with TandemClient(stack.url, deadline_s=120, retries=NO_RETRIES) as client:
            session = client.session()
            for turn in range(NUM_TURNS):
                sampling = {"max_new_tokens": OUTPUT_TOKENS, "ignore_eos": True, "sampling_seed": turn}
                await session.turn([rng.randrange(500) for _ in range(NEW_TOKENS)], sampling_params=sampling)
            # Else it would be answered with the very rows that the turns have left in the cache.
            await client.flush_cache()
            whole = await client.generate(input_ids=session.token_ids, sampling_params={"max_new_tokens": 0})
    num_tokens = NUM_TURNS * (NEW_TOKENS + OUTPUT_TOKENS)
    assert len(session.token_ids) == num_tokens
    assert session.rows.shape == (num_tokens - 1, 12, 16)
    assert np.array_equal(np.sort(session.rows), np.sort(np.asarray(whole.rows)))
    assert session.bytes_received <= 1.1 * whole.num_bytes
    is_transformers_own(Judge(deep_model), session.token_ids, 0, session.rows, greedy=False)


async def computed_tokens(client: TandemClient) -> dict[str, int]:
    """How many tokens each worker has computed so far, by its URL."""
    workers = (await client.server_info())["workers"]
    return {worker["url"]: worker["info"]["stats"]["tokens_computed"] for worker in workers}


async def test_a_conversation_stays_with_its_pair(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    flags = [f"--model={checkpoint_of(SHAPE)}", *FLAGS, "--prefill=2", "--decode=2", "--kv-pool-tokens=1024"]
    sampling = {"max_new_tokens": 4, "ignore_eos": True}
    used: list[set[str]] = []
    with running_stack(flags, log_file=tmp_path / "log") as stack:
        async with TandemClient(stack.url, deadline_s=120, retries=NO_RETRIES) as client:
            roles = {worker["url"]: worker["worker_type"] for worker in await client.workers()}
            prefill, decode = ({url for url in roles if roles[url] == role} for role in ("prefill", "decode"))
            # Where a conversation goes follows from its id and the workers' ports, so the next one may go to the same pair.
            while (not used or set.union(*used) != prefill | decode) and len(used) < 50:
                session = client.session(f"conversation {len(used)}")
                before = await computed_tokens(client)
                for turn in range(NUM_TURNS):
                    reply = await session.turn([turn, 40, 41, 42], sampling_params=sampling)
                after = await computed_tokens(client)
                used.append({url for url, num_tokens in after.items() if num_tokens > before[url]})
                assert reply.meta["cached_tokens"] > 0
    assert all(len(urls & prefill) == len(urls & decode) == 1 for urls in used), used
    assert set.union(*used) == prefill | decode


# ------------------------------------------------------------------------------------------------ partial rollouts


@pytest.fixture(scope="module")
def stack(checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    flags = [f"--model={checkpoint_of(SHAPE)}", *FLAGS, "--kv-pool-tokens=2048", "--context-tokens=1000"]
    with running_stack(flags, log_file=tmp_path_factory.mktemp("stack") / "log") as running:
        yield running


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[TandemClient]:
    async with TandemClient(stack.url, deadline_s=120, retries=NO_RETRIES) as opened:
        yield opened


async def ended_after(client: TandemClient, num_tokens: int, **asked: Any) -> Reply:
    """Stream, and have the request ended when so many tokens have come."""
    last: Reply | None = None
    is_told = False
    async for event in client.stream(rid="rollout", **asked):
        if isinstance(event, Reply):
            last = event
        elif isinstance(event, Progress) and len(event.output_ids) >= num_tokens and not is_told:
            is_told = True
            await client.abort("rollout")
    assert last is not None
    return last


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_a_rollout_that_was_ended_goes_on_as_if_it_had_not_been(
    client: TandemClient, judge_of: Callable[[str], Judge], temperature: float
) -> None:
    sampling = {"max_new_tokens": 400, "temperature": temperature, "ignore_eos": True, "sampling_seed": 9}
    uninterrupted = await client.generate(input_ids=PROMPT, sampling_params=sampling)
    reply = await ended_after(client, 5, input_ids=PROMPT, sampling_params=sampling)
    assert reply.is_partial
    assert 5 <= len(reply.output_ids) < 400
    num_held = len(PROMPT) + len(reply.output_ids) - 1
    assert np.asarray(reply.rows).shape[0] == num_held
    reply = await client.resume(reply, PROMPT, sampling_params=sampling)
    assert not reply.is_partial
    assert (reply.output_ids, reply.text) == (uninterrupted.output_ids, uninterrupted.text)
    assert np.array_equal(np.asarray(reply.rows), np.asarray(uninterrupted.rows))
    assert np.asarray(reply.rows).shape[0] == len(PROMPT) + 400 - 1
    is_transformers_own(
        judge_of(SHAPE), [*PROMPT, *reply.output_ids], 400, np.asarray(reply.rows), greedy=temperature == 0
    )
