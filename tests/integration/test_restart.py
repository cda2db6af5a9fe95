"""A stack whose children die, hang and come back: with stand-ins for what the launcher does, and once with real workers."""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from deploy.stack import ChildError, ChildFenced, Stack, StackError, make_stack, running_stack
from tests.support.http_client import Client, Reply
from tests.support.judge import Judge, Tally
from tests.support.processes import DEADLINE_S, Watched, until
from tests.support.stub_stack import stub_roles

NAMES = ("prefill-0", "decode-0", "router")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def stub_stack(checkpoint: Path, *flags: str) -> Stack:
    return make_stack(
        [f"--model={checkpoint}", "--startup-deadline-s=60", *flags],
        roles=stub_roles(),
        log_file=checkpoint / "stack.log",
    )


def kinds(stack: Stack, name: str) -> list[str]:
    return [event.kind for event in stack.events if event.name == name]


async def misbehave(stack: Stack, name: str, *, text: str = "busy", status: int = 503, count: int = 1000) -> None:
    """Have a stand-in answer its next health checks like this."""
    answer: dict[str, str | int] = {"status": status, "text": text, "count": count}
    url = f"{url_of(stack, name)}/misbehave"
    async with aiohttp.ClientSession() as session, session.post(url, params=answer) as response:
        assert response.status == 200


async def until_misbehaved(stack: Stack, name: str, count: int) -> None:
    async with aiohttp.ClientSession() as session, asyncio.timeout(DEADLINE_S):
        while True:
            async with session.get(f"{url_of(stack, name)}/misbehaved") as response:
                if await response.json() >= count:
                    return


def url_of(stack: Stack, name: str) -> str:
    return next(command.url for command in stack.plan.commands if command.name == name)


async def test_a_killed_child_comes_back_at_its_address_and_nobody_else_is_touched(checkpoint: Path) -> None:
    async with stub_stack(checkpoint, "--restart") as stack:
        before = {name: stack.pid(name) for name in NAMES}
        for num_starts, name in ((2, "decode-0"), (2, "prefill-0"), (2, "router"), (3, "decode-0")):
            os.kill(stack.pid(name), signal.SIGKILL)
            await stack.wait_started(name, num_starts)
            assert stack.pid(name) != before[name]
            before[name] = stack.pid(name)
            assert before == {name: stack.pid(name) for name in NAMES}
            async with aiohttp.ClientSession() as session, session.get(f"{url_of(stack, name)}/health") as response:
                assert response.status == 200
        assert [stack.num_starts(name) for name in NAMES] == [2, 3, 2]
        life = ["ended", "restarted", "ready"]
        assert kinds(stack, "decode-0") == ["started", "ready", *life, *life]
        times = [event.at for event in stack.events]
        assert times == sorted(times)
        assert "decode-0 was killed by SIGKILL" in [event.detail for event in stack.events]


@pytest.mark.parametrize(("max_restarts", "num_starts"), [(0, 1), (2, 3)])
async def test_a_child_that_dies_again_and_again_is_given_up(
    checkpoint: Path, max_restarts: int, num_starts: int
) -> None:
    stack = stub_stack(checkpoint, "--restart", f"--max-restarts={max_restarts}", "--decode.fault=crash")
    with pytest.raises(ChildError, match="decode-0 exited with code 3"):
        async with stack:
            pass
    assert stack.num_starts("decode-0") == num_starts
    with pytest.raises(ChildError):
        await stack.wait_started("decode-0", 100)


async def test_a_child_that_refuses_its_options_is_not_tried_again(checkpoint: Path) -> None:
    stack = stub_stack(checkpoint, "--restart", "--decode.fault=usage")
    with pytest.raises(ChildError, match="decode-0 exited with code 2"):
        async with stack:
            pass
    assert stack.num_starts("decode-0") == 1


async def test_a_child_that_refuses_only_when_started_again_is_tried_again(checkpoint: Path) -> None:
    refusing = checkpoint / "refusing"
    async with stub_stack(checkpoint, "--restart", f"--decode.refusing-file={refusing}") as stack:
        refusing.touch()
        os.kill(stack.pid("decode-0"), signal.SIGKILL)
        await until(lambda: "decode-0 exited with code 2" in [event.detail for event in stack.events])
        refusing.unlink()
        await stack.wait_started("decode-0", 3)


async def test_a_port_that_is_still_held_is_waited_for(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The bootstrap port is the engine's, which ends a moment after its frontend."""
    caplog.set_level(logging.INFO, "deploy.child")
    async with stub_stack(checkpoint, "--restart") as stack:
        _, bootstrap = next(command.addresses for command in stack.plan.commands if command.name == "prefill-0")
        with socket.create_server(bootstrap):
            os.kill(stack.pid("prefill-0"), signal.SIGKILL)
            await until(lambda: "prefill-0 is not started again yet: port" in caplog.text)
            assert stack.num_starts("prefill-0") == 1
        await stack.wait_started("prefill-0", 2)


async def test_an_engine_that_is_still_there_is_waited_for(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It holds its device's memory until it is gone."""
    caplog.set_level(logging.INFO, "deploy.child")
    async with stub_stack(checkpoint, "--restart", "--decode.lasting-child") as stack:
        [engine] = stack.engine_pids("decode-0")
        os.kill(stack.pid("decode-0"), signal.SIGKILL)
        await until(lambda: "decode-0 is not started again yet: its engine is still there" in caplog.text)
        assert stack.num_starts("decode-0") == 1
        os.kill(engine, signal.SIGKILL)
        await stack.wait_started("decode-0", 2)
        os.kill(stack.engine_pids("decode-0")[0], signal.SIGKILL)


@pytest.mark.parametrize("name", NAMES)
async def test_a_stopped_child_is_killed_and_started_again(checkpoint: Path, name: str) -> None:
    async with stub_stack(checkpoint, "--restart", "--fence-deadline-s=1") as stack:
        pids = {each: stack.pid(each) for each in NAMES}
        stopped = Watched(stack.pid(name))
        os.kill(stopped.pid, signal.SIGSTOP)
        await stack.wait_started(name, 2)
        stopped.wait_gone()
        assert kinds(stack, name) == ["started", "ready", "fenced", "ended", "restarted", "ready"]
        assert {each for each in NAMES if stack.pid(each) != pids[each]} == {name}


async def test_a_child_that_says_503_for_long_is_killed(checkpoint: Path) -> None:
    async with stub_stack(checkpoint, "--restart", "--fence-deadline-s=1") as stack:
        await misbehave(stack, "decode-0")
        await stack.wait_started("decode-0", 2)
        (fenced,) = [event for event in stack.events if event.kind == "fenced"]
        assert (fenced.name, fenced.detail) == ("decode-0", "not healthy for 1 s, last answer: 503 busy")


async def test_a_child_that_recovers_in_time_is_left_alone(checkpoint: Path) -> None:
    async with stub_stack(checkpoint, "--restart", "--fence-deadline-s=30") as stack:
        await misbehave(stack, "decode-0", count=2)
        await until_misbehaved(stack, "decode-0", 2)
        await misbehave(stack, "decode-0", status=200)
        await until_misbehaved(stack, "decode-0", 3)
        assert kinds(stack, "decode-0") == ["started", "ready"]


@pytest.mark.parametrize(("name", "status"), [("router", "draining"), ("decode-0", "crowded")])
async def test_a_child_that_goes_on_with_what_it_has_is_left_alone(checkpoint: Path, name: str, status: str) -> None:
    async with stub_stack(checkpoint, "--restart", "--fence-deadline-s=1") as stack:
        await misbehave(stack, name, text=f'{{"status": "{status}"}}')
        await until_misbehaved(stack, name, 4)
        assert kinds(stack, name) == ["started", "ready"]
        await misbehave(stack, name, text='{"status": "unhealthy"}')
        await stack.wait_started(name, 2)


async def test_a_restarted_child_that_never_gets_well_is_tried_again(checkpoint: Path) -> None:
    sick = checkpoint / "sick"
    flags = ["--restart", "--startup-deadline-s=8", f"--decode.sick-file={sick}"]
    async with stub_stack(checkpoint, *flags) as stack:
        sick.touch()
        os.kill(stack.pid("decode-0"), signal.SIGKILL)
        await until(lambda: "fenced" in kinds(stack, "decode-0"))
        sick.unlink()
        await stack.wait_started("decode-0", 3)
        (fenced,) = [event for event in stack.events if event.kind == "fenced"]
        assert fenced.detail == "not healthy 8 s after its start, last answer: 500 sick"


async def test_without_restart_a_silent_child_is_the_stacks_end(checkpoint: Path) -> None:
    async with stub_stack(checkpoint, "--fence-deadline-s=1") as stack:
        await misbehave(stack, "decode-0")
        message = "decode-0 was fenced: not healthy for 1 s, last answer: 503 busy"
        with pytest.raises(ChildFenced, match=message):
            await stack.wait()


async def test_a_stop_during_the_pause_starts_nobody(checkpoint: Path) -> None:
    stack = stub_stack(checkpoint, "--restart")
    async with stack:
        os.kill(stack.pid("decode-0"), signal.SIGKILL)
        await until(lambda: "ended" in kinds(stack, "decode-0"))
    assert stack.num_starts("decode-0") == 1
    assert asyncio.all_tasks() == {asyncio.current_task()}


def test_a_stack_outside_of_event_loops_is_watched_too(checkpoint: Path) -> None:
    with running_stack(
        [f"--model={checkpoint}", "--restart"], roles=stub_roles(), log_file=checkpoint / "log"
    ) as stack:
        os.kill(stack.pid("decode-0"), signal.SIGKILL)
        asyncio.run(stack.wait_started("decode-0", 2))
        assert stack.names("decode") == ["decode-0"]
        with pytest.raises(StackError, match="router has no engine process"):
            stack.engine_pids("router")
        with pytest.raises(StackError, match="decode-0: no start number 3 within"):
            asyncio.run(stack.wait_started("decode-0", 3, deadline_s=0.1))


async def test_real_workers_come_back_and_serve(
    checkpoint_of: Callable[[str], Path], judge_of: Callable[[str], Judge], tmp_path: Path
) -> None:
    """The prefill worker's engine is killed, then the decode worker is stopped with its engine: each time all is as before."""
    prompt = [*range(30, 70)]
    body: dict[str, Any] = {
        "input_ids": prompt,
        "sampling_params": {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True},
        "return_routed_experts": True,
        "routed_experts_dtype": "auto",
    }
    flags = [
        f"--model={checkpoint_of('plain')}",
        "--device=cpu",
        "--cpu-threads=1",
        "--restart",
        "--fence-deadline-s=8",
    ]
    async with make_stack(flags, log_file=tmp_path / "log") as stack, Client(stack.url) as client:
        pids = {name: stack.pid(name) for name in NAMES}

        async def check(restarted: str) -> None:
            await stack.wait_started(restarted, 2)
            async with asyncio.timeout(DEADLINE_S):
                # Until the router has seen it too it says so, and nothing else.
                while (answer := await client.post(body))[0] != 200:
                    assert answer[1]["error"]["code"] == "no_healthy_pair", answer
            reply = Reply(answer[1])
            tally = Tally()
            judge_of("plain").add(tally, prompt, reply.output_ids, reply.rows)
            tally.assert_clean()
            changed = [name for name in NAMES if stack.pid(name) != pids[name]]
            assert changed == [restarted], stack.read_log()
            pids[restarted] = stack.pid(restarted)

        await client.generate(**body)
        os.kill(stack.engine_pids("prefill-0")[0], signal.SIGKILL)
        await check("prefill-0")

        stopped = [Watched(stack.engine_pids("decode-0")[0]), Watched(stack.pid("decode-0"))]
        for process in stopped:
            os.kill(process.pid, signal.SIGSTOP)
        await check("decode-0")
        for process in stopped:
            process.wait_gone()
