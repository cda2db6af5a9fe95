"""A worker of four ranks as processes: they serve together, and none outlives another. The ranks are stand-ins."""

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from common.process import free_port
from deploy.process_tree import children_of
from tests.support.http_client import Client
from tests.support.processes import DEADLINE_S, Watched, started, until_listening

REQUEST: dict[str, Any] = {"input_ids": [1], "sampling_params": {"max_new_tokens": 9, "temperature": 0}}
NUM_RANKS = 4


class Ranks:
    """A worker, and the processes of its ranks in order."""

    def __init__(self, process: "subprocess.Popen[bytes]", client: Client) -> None:
        self.process = process
        self.client = client
        self.pids = children_of(process.pid)
        self.watched = [Watched(pid) for pid in self.pids]

    async def exit_code(self) -> int:
        """Wait until nothing is left of it."""
        code = await asyncio.to_thread(self.process.wait, DEADLINE_S)
        for watched in self.watched:
            await asyncio.to_thread(watched.wait_gone)
        return code

    @asynccontextmanager
    async def open_request(self, group: int) -> AsyncIterator[Any]:
        """A stream whose first event has come, from this group."""
        body = {**REQUEST, "stream": True, "data_parallel_rank": group}
        async with self.client.session.post(self.client.url + "/generate", json=body) as response:
            assert f'"output_ids":[{group}]'.encode() in await response.content.readuntil(b"\n\n")
            yield response


def words_of(pid: int) -> list[str]:
    """A process's command line."""
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def stub_worker(checkpoint: Path, port: int, *flags: str) -> "AbstractContextManager[subprocess.Popen[bytes]]":
    own = [f"--model={checkpoint}", f"--port={port}", f"--tp={NUM_RANKS}"]
    return started("tests.support.stub_ranks_worker", *own, *flags)


@asynccontextmanager
async def worker_of(checkpoint: Path, *flags: str) -> AsyncIterator[Ranks]:
    port = free_port()
    with stub_worker(checkpoint, port, *flags) as process:
        await asyncio.to_thread(until_listening, process)
        async with Client(f"http://127.0.0.1:{port}") as client:
            yield Ranks(process, client)


async def test_ranks_start_in_order_and_end_with_their_worker(checkpoint_of: Callable[[str], Path]):
    async with worker_of(checkpoint_of("plain"), "--dp=2") as worker:
        words = [words_of(pid) for pid in worker.pids]
        assert [word[4] for word in words] == ["0", "1", "2", "3"]
        assert len({word[3] for word in words}) == 1
        assert (await worker.client.get("/health"))[1]["dp_size"] == 2
        worker.process.terminate()
        assert await worker.exit_code() == 0


@pytest.mark.parametrize(("dp", "others"), [(2, "run"), (1, "run"), (2, "hang")])
async def test_when_a_rank_is_killed_the_worker_goes_down_at_once(
    checkpoint_of: Callable[[str], Path], dp: int, others: str
):
    async with worker_of(checkpoint_of("plain"), f"--dp={dp}", "--shutdown-deadline-s=600") as worker:
        async with worker.open_request(0) as stream:
            if others == "hang":
                for pid in (worker.pids[0], worker.pids[3]):
                    os.kill(pid, signal.SIGSTOP)
            os.kill(worker.pids[2], signal.SIGKILL)
            text = await stream.text()
        assert '"code":"leg_failed"' in text
        assert '"stage":"engine"' in text
        assert "[DONE]" not in text
        assert await worker.exit_code() == 1


async def test_a_rank_that_is_stopped_makes_the_worker_unhealthy(checkpoint_of: Callable[[str], Path]):
    async with worker_of(checkpoint_of("plain"), "--dp=2", "--engine-deadline-s=2.1") as worker:
        async with worker.open_request(1) as stream:
            os.kill(worker.pids[2], signal.SIGSTOP)
            text = await stream.text()
            assert '"code":"deadline_exceeded"' in text
            assert '"stage":"engine"' in text
        status, health = await worker.client.get("/health")
        assert (status, health["status"]) == (503, "unhealthy")
        for group in range(2):
            error = await worker.client.error({**REQUEST, "data_parallel_rank": group})
            assert (error["status"], error["code"]) == (503, "engine_stuck")
        os.kill(worker.pids[2], signal.SIGCONT)
        await worker.client.until_good("/health")


async def test_whoever_does_not_end_in_time_is_killed(checkpoint_of: Callable[[str], Path]):
    async with worker_of(checkpoint_of("plain"), "--dp=2", "--shutdown-deadline-s=0.5") as worker:
        os.kill(worker.pids[3], signal.SIGSTOP)
        worker.process.terminate()
        assert await worker.exit_code() == 0


async def test_a_rank_that_is_killed_while_the_worker_drains_ends_it_at_once(checkpoint_of: Callable[[str], Path]):
    async with worker_of(checkpoint_of("plain"), "--dp=2", "--shutdown-deadline-s=600") as worker:
        async with worker.open_request(0) as stream:
            os.kill(worker.pids[1], signal.SIGSTOP)
            worker.process.terminate()
            while (await worker.client.get("/health"))[1]["status"] != "draining":
                pass
            os.kill(worker.pids[2], signal.SIGKILL)
            assert '"stage":"engine"' in await stream.text()
        assert await worker.exit_code() == 0


def test_options_that_one_rank_cannot_use(checkpoint_of: Callable[[str], Path]):
    with stub_worker(checkpoint_of("plain"), free_port(), "--weight-version=refuse-3") as process:
        text = process.communicate(timeout=DEADLINE_S)[0].decode()
        assert process.returncode == 2
    assert text.count("error: rank 3 cannot use this") == 1
    assert "Traceback" not in text
