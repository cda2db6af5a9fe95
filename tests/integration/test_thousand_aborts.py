"""A thousand requests and more, each ended at a random moment of its life, until every stage has been met often enough.

None hangs, whatever they had of tokens and rows is right, and in the end no page is missing.
"""

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deploy.stack import make_stack
from tests.support.http_client import Client, Reply
from tests.support.judge import Judge, Tally
from tests.support.prompts import random_prompts

SHAPE = "plain"
AT_ONCE = 24
ENOUGH_ABORTED = 1000
ENOUGH_IN_A_STAGE = 50
AT_MOST = 4000
NEW_TOKENS = 24
STAGES = ("while queued", "in prefill", "in transfer", "in decode", "reply")
"""What the answer says of the moment; `reply`: it was asked for while the request was open, and the answer came whole."""

FLAGS = [
    "--device=cpu",
    "--cpu-threads=1",
    "--page-size=4",
    "--max-running-requests=6",
    "--prefill.chunked-prefill-tokens=16",
    "--prefill.kv-pool-tokens=1024",
    "--no-prefix-cache",
    "--decode.kv-pool-tokens=384",
    "--context-tokens=256",
]


class Aborts:
    """Sends requests, ends them, and keeps what came back."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.rng = random.Random(5)
        self.prompts = [prompt for prompt in random_prompts(5, 120, longest=64) if len(prompt) > 32]
        self.stages: Counter[str] = Counter()
        self.num_sent = 0
        self.num_left = 0
        self.answers: list[tuple[list[int], dict[str, Any]]] = []
        self._life_s = 0.5
        """About how long a request lives that is let be."""
        self._hits: dict[str, list[float]] = defaultdict(list)
        """When requests were ended that were in a stage then, counted from their beginning."""

    async def run(self) -> None:
        """Keep so many requests open until there were enough of all."""
        await asyncio.gather(*(self._keep_one_open() for _ in range(AT_ONCE)))

    def is_enough(self) -> bool:
        """Whether every stage was met often enough, and all together."""
        num_aborted = self.stages.total() - self.stages["reply"] + self.num_left
        return num_aborted >= ENOUGH_ABORTED and all(self.stages[stage] >= ENOUGH_IN_A_STAGE for stage in STAGES)

    async def _keep_one_open(self) -> None:
        while not self.is_enough() and self.num_sent < AT_MOST:
            self.num_sent += 1
            await self._one(f"request-{self.num_sent:05d}")

    async def _one(self, rid: str) -> None:
        prompt = self.rng.choice(self.prompts)
        clock = asyncio.get_running_loop().time
        begun = clock()
        asking = asyncio.create_task(self._ask(rid, prompt))
        delay_s = self._moment_s()
        # A random moment of the request's life; nothing waits for anything here.
        await asyncio.wait([asking], timeout=delay_s)
        fate = self.rng.choices(["abort", "leave", "let be"], [16, 3, 1])[0]
        if fate == "leave" and not asking.done():
            asking.cancel()
            await asyncio.wait([asking])
            self.num_left += 1
            return
        num_open = 0
        if fate == "abort" and not asking.done():
            status, aborted = await self.client.post({"rid": rid}, path="/abort_request")
            assert status == 200, aborted
            num_open = aborted["aborted"]
        reply = await asking
        self.answers.append((prompt, reply))
        reason = reply["meta_info"]["finish_reason"]
        if reason["type"] == "abort":
            stage = reason["message"].removeprefix("aborted by request ")
        elif num_open:
            stage = "reply"
        else:
            self._life_s += 0.1 * (clock() - begun - self._life_s)
            return
        self.stages[stage] += 1
        self._hits[stage].append(delay_s)

    def _moment_s(self) -> float:
        """Choose when to end a request: at any time of its life, or about when one was in the stage that is rarest so far."""
        rarest = min(STAGES, key=lambda stage: self.stages[stage])
        if self._hits[rarest] and self.rng.random() < 0.7:
            return self.rng.choice(self._hits[rarest][-20:]) * self.rng.uniform(0.9, 1.1)
        return self.rng.uniform(0, 1.1 * self._life_s)

    async def _ask(self, rid: str, prompt: list[int]) -> dict[str, Any]:
        body: dict[str, Any] = {
            "rid": rid,
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True},
            "return_routed_experts": True,
            "routed_experts_dtype": "auto",
        }
        reply: dict[str, Any]
        if self.rng.random() < 0.5:
            *_, reply, done = await self.client.stream(**body)
            assert done == "[DONE]", done
        else:
            status, reply = await self.client.post(body, msgpack=self.rng.random() < 0.5)
            assert status == 200, reply
        return reply


def judge_answers(judge: Judge, answers: list[tuple[list[int], dict[str, Any]]]) -> Tally:
    """Compare what each answer has of tokens and rows with the reference."""
    tally = Tally()
    for prompt, body in answers:
        reply = Reply(body)
        is_aborted = reply.meta["finish_reason"]["type"] == "abort"
        assert is_aborted == (len(reply.output_ids) < NEW_TOKENS)
        if reply.output_ids:
            judge.add(tally, prompt, reply.output_ids, reply.rows)
        else:
            assert "routed_experts" not in reply.meta
    return tally


async def test_a_thousand_aborts(
    checkpoint_of: Callable[[str], Path], judge_of: Callable[[str], Judge], tmp_path: Path
) -> None:
    flags = [f"--model={checkpoint_of(SHAPE)}", *FLAGS]
    async with make_stack(flags, log_file=tmp_path / "log") as stack, Client(stack.url) as client:
        start = await client.quiet_stats()
        aborts = Aborts(client)
        await aborts.run()
        end = await client.quiet_stats()
    assert aborts.is_enough(), (aborts.stages, aborts.num_left, aborts.num_sent)
    judge_answers(judge_of(SHAPE), aborts.answers).assert_clean()
    for role, stats in end.items():
        assert stats["pages"] == start[role]["pages"]
        assert stats["rows_refused"] == stats["failed_steps"] == 0
