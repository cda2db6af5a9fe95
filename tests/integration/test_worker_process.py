"""A worker process whose engine process is stopped or killed, and one that is told to end: every request is answered."""

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from common.process import free_port
from tests.support.http_client import Client
from tests.support.processes import DEADLINE_S, Watched, started, until_listening

GREEDY = {"temperature": 0, "max_new_tokens": 20, "ignore_eos": True}
LONG: dict[str, Any] = {"input_ids": [1, 2, 3], "sampling_params": {**GREEDY, "max_new_tokens": 900}}


class WorkerProcess:
    """An aggregated worker: its frontend is our child, its engine the frontend's."""

    def __init__(self, process: "subprocess.Popen[bytes]", client: Client) -> None:
        self.process = process
        self.client = client
        [engine_pid] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        self.engine_pid = int(engine_pid)

    async def wait_health(self, status: int, name: str) -> None:
        """Ask until it says this of itself."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                found, body = await self.client.get("/health")
                if (found, body["status"]) == (status, name):
                    return

    async def wait_exit(self) -> int:
        return await asyncio.to_thread(self.process.wait, DEADLINE_S)


@asynccontextmanager
async def worker_process(checkpoint: Path, *flags: str) -> AsyncIterator[WorkerProcess]:
    port = free_port()
    own = [f"--model={checkpoint}", f"--port={port}", "--device=cpu", "--cpu-threads=1", "--page-size=4"]
    with started("deploy.aggregated_worker", *own, "--kv-pool-tokens=1024", *flags) as process:
        await asyncio.to_thread(until_listening, process)
        async with Client(f"http://127.0.0.1:{port}") as client:
            yield WorkerProcess(process, client)


@asynccontextmanager
async def begun(client: Client, **body: Any) -> AsyncIterator[aiohttp.ClientResponse]:
    """A stream whose first event has come."""
    async with client.session.post(client.url + "/generate", json={**body, "stream": True}) as response:
        assert response.status == 200
        assert (await response.content.readuntil(b"\n\n")).startswith(b"data: ")
        yield response


async def test_an_engine_that_is_stopped_and_a_worker_that_is_told_to_end(checkpoint_of: Callable[[str], Path]):
    async with worker_process(checkpoint_of("plain"), "--engine-deadline-s=3") as worker:
        client = worker.client
        expected = await client.generate(input_ids=[1, 2, 3], sampling_params=GREEDY)
        async with begun(client, **LONG) as stream:
            os.kill(worker.engine_pid, signal.SIGSTOP)
            waiting = asyncio.create_task(client.error({**LONG, "rid": "waiting"}))
            text = await stream.text()
            assert '"code":"deadline_exceeded"' in text
            assert '"stage":"engine"' in text
        error = await waiting
        assert (error["status"], error["stage"]) in [(504, "engine"), (503, "engine")]
        assert (await client.get("/health"))[0] == 503
        assert (await client.error(LONG))["status"] == 503
        os.kill(worker.engine_pid, signal.SIGCONT)
        await worker.wait_health(200, "ok")
        assert (await client.generate(input_ids=[1, 2, 3], sampling_params=GREEDY)).output_ids == expected.output_ids
        _, info = await client.get("/server_info")
        pages = info["stats"]["pages"]
        assert pages["running"] == pages["quarantined"] == pages["unaccounted"] == 0

        # Told to end, it answers what is open, and says meanwhile that it takes no more.
        async with begun(client, **LONG) as stream:
            os.kill(worker.engine_pid, signal.SIGSTOP)
            worker.process.terminate()
            await worker.wait_health(503, "draining")
            assert (await client.error(LONG))["code"] == "draining"
            os.kill(worker.engine_pid, signal.SIGCONT)
            assert (await stream.text()).endswith("data: [DONE]\n\n")
        assert await worker.wait_exit() == 0


async def test_what_is_open_at_the_end_of_the_shutdown_deadline_is_told_so(checkpoint_of: Callable[[str], Path]):
    async with worker_process(checkpoint_of("plain"), "--shutdown-deadline-s=0.5") as worker:
        async with begun(worker.client, **LONG) as stream:
            os.kill(worker.engine_pid, signal.SIGSTOP)
            worker.process.terminate()
            text = await stream.text()
        assert '"message":"the worker is shutting down"' in text
        assert await worker.wait_exit() == 0


async def test_an_engine_that_is_killed(checkpoint_of: Callable[[str], Path]):
    async with worker_process(checkpoint_of("plain")) as worker:
        engine = Watched(worker.engine_pid)
        async with begun(worker.client, **LONG) as stream:
            whole = asyncio.create_task(worker.client.error({**LONG, "rid": "whole"}))
            while (await worker.client.get("/v1/loads"))[1]["open_requests"] < 2:
                assert not whole.done()
            os.kill(worker.engine_pid, signal.SIGKILL)
            text = await stream.text()
        error = await whole
        assert (error["status"], error["code"], error["stage"]) == (502, "leg_failed", "engine")
        assert '"code":"leg_failed"' in text
        assert "[DONE]" not in text
        assert await worker.wait_exit() == 1
        engine.wait_gone()
