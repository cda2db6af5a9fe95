"""Real workers that join a router by themselves, and leave it under load, without a request lost.

The router tries nothing again, so that whatever goes wrong once is seen.
"""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.process import free_port
from tests.support.http_client import Client, Reply
from tests.support.judge import Judge, Tally
from tests.support.processes import DEADLINE_S, REPOSITORY, end, until
from tests.support.prompts import random_prompts

AT_ONCE = 6


@dataclass
class Router:
    """A router process without workers, and those that are told to join it."""

    client: Client
    checkpoint: Path
    log: Path
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)
    ports: dict[str, int] = field(default_factory=dict)

    def start(self, module: str, *flags: str) -> "subprocess.Popen[bytes]":
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", module, *flags]
            process = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    async def worker(self, module: str, *flags: str) -> tuple["subprocess.Popen[bytes]", str]:
        """Start a worker and wait until the router has it; gives its process and its URL."""
        port = free_port()
        process = self.start(
            module,
            *(f"--model={self.checkpoint}", f"--port={port}", f"--register={self.client.url}"),
            *("--register-lease-s=3", "--device=cpu", "--cpu-threads=1", "--page-size=4", *flags),
        )
        url = f"http://127.0.0.1:{port}"
        await self.until(process, lambda workers: url in workers)
        return process, url

    async def workers(self) -> dict[str, dict[str, Any]]:
        _, answer = await self.client.get("/workers")
        return {worker["url"]: worker for worker in answer["workers"]}

    async def until_logged(self, words: str) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while words not in await asyncio.to_thread(self.log.read_text):
                pass

    async def until(
        self, process: "subprocess.Popen[bytes]", holds: Callable[[dict[str, dict[str, Any]]], bool]
    ) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not holds(await self.workers()):
                assert process.poll() is None, self.log.read_text()


@asynccontextmanager
async def router_without_workers(checkpoint: Path, log: Path) -> AsyncIterator[Router]:
    port = free_port()
    async with Client(f"http://127.0.0.1:{port}") as client:
        router = Router(client, checkpoint, log)
        try:
            router.start("router", f"--port={port}", "--max-retries=0", "--health-interval-s=0.2")
            await router.until_logged("listening on")
            yield router
        finally:
            for process in router.processes:
                end(process)


class Load:
    """Requests without a pause, so many at once, until it is told to stop; each must be answered, and its rows be right."""

    def __init__(self, client: Client, judge: Judge) -> None:
        self._client = client
        self._judge = judge
        self._prompts = random_prompts(7, 12, longest=40)
        self._is_over = False
        self.tally = Tally()
        self.num_answered = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._one_after_the_other(index)) for index in range(AT_ONCE)]
        try:
            yield
        finally:
            self._is_over = True
            await asyncio.gather(*tasks)

    async def _one_after_the_other(self, index: int) -> None:
        while not self._is_over:
            prompt = self._prompts[index % len(self._prompts)]
            index += AT_ONCE
            body = {
                "input_ids": prompt,
                "sampling_params": {"max_new_tokens": 20, "temperature": 0, "ignore_eos": True},
                "return_routed_experts": True,
                "routed_experts_dtype": "auto",
            }
            status, answer = await self._client.post(body)
            assert status == 200, answer
            reply = Reply(answer)
            self._judge.add(self.tally, prompt, reply.output_ids, reply.rows)
            self.num_answered += 1


async def test_workers_join_and_leave_under_load_and_no_request_is_lost(
    checkpoint_of: Callable[[str], Path], judge_of: Callable[[str], Judge], tmp_path: Path
) -> None:
    async with router_without_workers(checkpoint_of("plain"), tmp_path / "log") as router:
        client = router.client
        error = await client.error({"input_ids": [1, 2, 3]})
        assert (error["status"], error["code"]) == (503, "no_healthy_pair")
        prefill, prefill_url = await router.worker("prefill_worker", f"--bootstrap-port={free_port()}")
        removed, removed_url = await router.worker("decode_worker")

        load = Load(client, judge_of("plain"))
        async with load.running():
            # One more joins, and the first is removed; it hears of it at its next renewal, and serves on for whoever asks it.
            ending, ending_url = await router.worker("decode_worker")
            await router.until(ending, lambda workers: workers[ending_url]["outstanding_requests"] > 0)
            entry = (await router.workers())[removed_url]
            async with client.session.delete(f"{client.url}/workers/{entry['id']}") as response:
                assert response.status == 200, await response.text()
            await router.until_logged("HTTP 410")
            assert set(await router.workers()) == {prefill_url, ending_url}
            assert removed.poll() is None

            # Another one joins, and the one before is told to end: it leaves by itself, and first ends what it has.
            last, last_url = await router.worker("decode_worker")
            await router.until(last, lambda workers: workers[last_url]["outstanding_requests"] > 0)
            ending.terminate()
            assert await asyncio.to_thread(ending.wait, DEADLINE_S) == 0
            assert set(await router.workers()) == {prefill_url, last_url}
            answered = load.num_answered
            await until(lambda: load.num_answered >= answered + 2 * AT_ONCE)
        load.tally.assert_clean()
        await client.quiet_stats()

        # Who is killed is missed when its lease has passed.
        prefill.kill()
        await router.until(last, lambda workers: set(workers) == {last_url})
        error = await client.error({"input_ids": [1, 2, 3]})
        assert (error["status"], error["code"]) == (503, "no_healthy_pair")
