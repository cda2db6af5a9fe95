"""500 requests of all shapes, 64 at once, with random aborts and disconnects, on a KV pool that is far too small for them.

Every request is answered once, every row is right, and in the end the recount of every page is exact.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deploy.stack import make_stack
from tests.support.http_client import Client, Reply, rows_in
from tests.support.judge import Judge, Tally
from tests.support.prompts import random_prompts

SHAPE = "plain"
REQUESTS = 500
AT_ONCE = 64
SHAPES = ["generate", "list", "n", "stream", "score", "completions", "stream n"]


class Load:
    """Runs random requests and judges what comes back."""

    def __init__(self, client: Client, judge: Judge, seed: int) -> None:
        self.client = client
        self.judge = judge
        self.rng = random.Random(seed)
        self.prompts = random_prompts(seed, 120, longest=60)
        self.tally = Tally()
        self.outcomes: Counter[str] = Counter()

    async def run(self) -> None:
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(index: int) -> None:
            async with gate:
                await self.request(index)

        await asyncio.gather(*(one(index) for index in range(REQUESTS)))

    async def request(self, index: int) -> None:
        shape = self.rng.choice(SHAPES)
        fate = self.rng.choices(["let be", "abort", "leave"], [7, 2, 1])[0]
        delay_s = self.rng.random() * 0.4
        work = asyncio.create_task(getattr(self, "send_" + shape.replace(" ", "_"))(f"request-{index:04d}"))
        if fate != "let be":
            # A random moment of the request's life; nothing waits for anything here.
            await asyncio.wait([work], timeout=delay_s)
        if fate == "leave" and not work.done():
            work.cancel()
            await asyncio.wait([work])
            self.outcomes["left"] += 1
            return
        if fate == "abort":
            status, _ = await self.client.post({"rid": f"request-{index:04d}"}, path="/abort_request")
            assert status == 200
        await work
        self.outcomes[shape] += 1

    # ---------------------------------------------------------------------------------------- shapes

    def body(self, rid: object, prompt: object, **sampling: Any) -> dict[str, Any]:
        params = {"max_new_tokens": self.rng.choice([1, 3, 10, 40]), "temperature": self.rng.choice([0, 1.0])}
        return {
            "rid": rid,
            "input_ids": prompt,
            "sampling_params": {**params, **sampling},
            "return_routed_experts": True,
            "routed_experts_dtype": self.rng.choice(["auto", "int32"]),
            "routed_experts_start_len": 0,
        }

    def prompt(self) -> list[int]:
        return self.rng.choice(self.prompts)

    async def post(self, body: dict[str, Any]) -> Any:
        status, reply = await self.client.post(body, msgpack=self.rng.random() < 0.5)
        assert status == 200, reply
        return reply

    async def send_generate(self, rid: str) -> None:
        prompt = self.prompt()
        self.check(await self.post(self.body(rid, prompt)), prompt)

    async def send_list(self, rid: str) -> None:
        prompts = [self.prompt() for _ in range(3)]
        replies = await self.post(self.body([f"{rid}-{i}" for i in range(3)], prompts))
        for reply, prompt in zip(replies, prompts, strict=True):
            self.check(reply, prompt)

    async def send_n(self, rid: str) -> None:
        prompt, n = self.prompt(), self.rng.choice([2, 3])
        replies = await self.post(self.body(rid, prompt, n=n))
        assert len(replies) == n
        for reply in replies:
            self.check(reply, prompt)

    async def send_score(self, rid: str) -> None:
        prompt = self.prompt()
        self.check(await self.post(self.body(rid, prompt, max_new_tokens=0)), prompt)

    async def send_stream(self, rid: str) -> None:
        prompt = self.prompt()
        *_, last, done = await self.client.stream(**self.body(rid, prompt))
        assert done == "[DONE]", last
        self.check(last, prompt)

    async def send_stream_n(self, rid: str) -> None:
        prompt = self.prompt()
        *events, done = await self.client.stream(**self.body(rid, prompt, n=2))
        assert done == "[DONE]"
        for index in (0, 1):
            self.check([event for event in events if event["index"] == index][-1], prompt)

    async def send_completions(self, rid: str) -> None:
        prompt = self.prompt()
        body = {"model": "m", "prompt": prompt, "max_tokens": 6, "rid": rid, "return_routed_experts": True}
        status, reply = await self.client.post(body, path="/v1/completions")
        assert status == 200, reply
        num_tokens = reply["usage"]["completion_tokens"]
        if "sglext" in reply:
            assert len(rows_in(reply["sglext"])) == len(prompt) + num_tokens - 1
        else:
            assert num_tokens == 0

    def check(self, body: dict[str, Any], prompt: list[int]) -> None:
        """Rows `[0, P+G-1)`, all right; none only for a request that was aborted before they existed."""
        reply = Reply(body)
        assert reply.meta["completion_tokens"] == len(reply.output_ids)
        if "routed_experts" not in reply.meta:
            assert reply.meta["finish_reason"]["type"] == "abort"
            assert reply.output_ids == []
            self.outcomes["aborted early"] += 1
            return
        if reply.meta["finish_reason"]["type"] == "abort":
            self.outcomes["aborted late"] += 1
        rows = reply.rows
        # A prompt that was only scored has the rows of all its tokens but the last.
        tokens = [*prompt, *reply.output_ids]
        if rows.shape[0] > 0:
            self.judge.add(self.tally, tokens[:-1], tokens[-1:], rows, greedy=False)
        else:
            assert len(prompt) == 1
            assert len(reply.output_ids) <= 1


async def test_five_hundred_requests(
    checkpoint_of: Callable[[str], Path], judge_of: Callable[[str], Judge], tmp_path: Path
):
    flags = [
        f"--model={checkpoint_of(SHAPE)}",
        "--device=cpu",
        "--cpu-threads=1",
        "--page-size=4",
        "--prefill.kv-pool-tokens=2048",
        "--prefill.chunked-prefill-tokens=96",
        "--decode.kv-pool-tokens=512",
        "--context-tokens=512",
    ]
    async with make_stack(flags, log_file=tmp_path / "log") as stack, Client(stack.url, timeout_s=120) as client:
        load = Load(client, judge_of(SHAPE), seed=1)
        await load.run()
        stats = await client.quiet_stats(deadline_s=60)
    load.tally.assert_clean()
    assert sum(load.outcomes[end] for end in (*SHAPES, "left")) == REQUESTS
    assert load.outcomes["left"] > 10
    assert load.outcomes["aborted early"] + load.outcomes["aborted late"] > 10
    assert stats["decode"]["swaps"] > 0
    assert stats["prefill"]["rows_refused"] == stats["decode"]["rows_refused"] == 0
