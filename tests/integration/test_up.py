"""The launcher as an operator sees it: one line on stdout, exit codes, and no process left behind, however it ends.

Its children are stand-ins that start in a moment; the real workers under it are the business of the end-to-end tests.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest

from common.process import free_port
from deploy.launch_plan import plan_launch
from deploy.stack import ChildError, Stack, StackError, running_stack
from tests.support.processes import DEADLINE_S, REPOSITORY, Watched, end, read_line, started_pids
from tests.support.stub_stack import stub_roles


class Launcher:
    """A launcher process with its output."""

    def __init__(self, folder: Path, *flags: str, model: Path | None = None) -> None:
        self.port = free_port()
        self.log = folder / "stderr.log"
        command = [sys.executable, "-m", "tests.support.stub_stack", f"--model={model or folder}", "--device=cpu"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, f"--port={self.port}", *flags],
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                cwd=REPOSITORY,
            )

    def wait_ready(self) -> dict[str, Watched]:
        assert read_line(self.process) == f"ready http://127.0.0.1:{self.port}", self.log.read_text()
        return {name: Watched(pid) for name, pid in started_pids(self.log.read_text()).items()}

    def wait_exit(self) -> tuple[int, str, str]:
        """Exit code, the rest of stdout, stderr."""
        out, _ = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode, out.decode(), self.log.read_text()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def launcher(checkpoint: Path) -> Iterator[Launcher]:
    launcher = Launcher(checkpoint)
    yield launcher
    end(launcher.process)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_every_child_in_order_and_exits_0(launcher: Launcher, number: signal.Signals) -> None:
    children = launcher.wait_ready()
    assert set(children) == {"prefill-0", "decode-0", "router"}
    launcher.process.send_signal(number)
    code, out, log = launcher.wait_exit()
    assert (code, out) == (0, ""), log
    for child in children.values():
        child.wait_gone()
    stops = [log.index(f"stopped {name}") for name in ("router", "prefill-0", "decode-0")]
    assert stops == sorted(stops)


@pytest.mark.parametrize("name", ["prefill-0", "decode-0", "router"])
def test_a_child_that_dies_takes_the_others_with_it_and_is_named(launcher: Launcher, name: str) -> None:
    children = launcher.wait_ready()
    os.kill(children[name].pid, signal.SIGKILL)
    code, out, log = launcher.wait_exit()
    assert (code, out) == (1, "")
    assert f"error: {name} was killed by SIGKILL" in log.splitlines()
    for child in children.values():
        child.wait_gone()


def test_with_restart_a_child_that_dies_comes_back_alone(checkpoint: Path) -> None:
    launcher = Launcher(checkpoint, "--restart")
    try:
        children = launcher.wait_ready()
        os.kill(children["decode-0"].pid, signal.SIGKILL)
        children["decode-0"].wait_gone()
        while (again := started_pids(launcher.log.read_text()))["decode-0"] == children["decode-0"].pid:
            assert launcher.process.poll() is None
        children["decode-0"] = Watched(again["decode-0"])
        assert again == {name: child.pid for name, child in children.items()}
        launcher.process.terminate()
        code, out, log = launcher.wait_exit()
        assert (code, out) == (0, ""), log
        assert "decode-0 was killed by SIGKILL; it is started again in 0.2 s" in log
        for child in children.values():
            child.wait_gone()
    finally:
        end(launcher.process)


def test_no_child_outlives_a_launcher_that_was_killed(launcher: Launcher) -> None:
    children = launcher.wait_ready()
    launcher.process.kill()
    for child in children.values():
        child.wait_gone()


def test_a_second_signal_does_not_wait_for_a_stopped_child(launcher: Launcher) -> None:
    children = launcher.wait_ready()
    # A stopped process never gets to handle SIGTERM, so the first signal alone would take the whole deadline.
    os.kill(children["router"].pid, signal.SIGSTOP)
    launcher.process.terminate()
    while "told to stop" not in launcher.log.read_text():
        assert launcher.process.poll() is None
    launcher.process.terminate()
    code, _, _ = launcher.wait_exit()
    assert code == 0
    for child in children.values():
        child.wait_gone()


def test_a_port_in_use_is_one_line_and_exit_code_2(checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        launcher = Launcher(checkpoint, f"--port={port}")
        assert launcher.wait_exit() == (2, "", f"error: port {port} on 127.0.0.1 is in use\n")


def test_a_missing_checkpoint_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    code, out, log = Launcher(tmp_path, model=tmp_path / "nothing").wait_exit()
    assert (code, out) == (2, "")
    assert log.startswith("error: --model ")
    assert log.count("\n") == 1


@pytest.mark.parametrize(("fault", "expected"), [("usage", 2), ("crash", 1)])
def test_a_child_that_cannot_start_ends_the_launcher(checkpoint: Path, fault: str, expected: int) -> None:
    code, out, log = Launcher(checkpoint, f"--decode.fault={fault}").wait_exit()
    assert (code, out) == (expected, "")
    assert f"error: decode-0 exited with code {2 if fault == 'usage' else 3}" in log


def test_a_stack_that_never_answers_is_given_up_at_the_deadline(checkpoint: Path) -> None:
    code, out, log = Launcher(checkpoint, "--prefill.fault=unhealthy", "--startup-deadline-s=1").wait_exit()
    assert (code, out) == (1, "")
    assert "error: not ready: 1 s have passed, still waiting for prefill-0's /health: 500 unhealthy" in log


def test_a_stack_is_ready_when_the_router_knows_all_workers(checkpoint: Path) -> None:
    flags = [f"--model={checkpoint}", "--prefill=2", "--router.unseen=7"]
    with (
        running_stack(flags, roles=stub_roles(), log_file=checkpoint / "stack.log") as stack,
        urlopen(f"{stack.url}/misbehaved") as response,
    ):
        assert json.load(response) == 7


def test_a_stack_can_be_run_by_a_test(checkpoint: Path) -> None:
    log = checkpoint / "stack.log"
    with running_stack([f"--model={checkpoint}", "--prefill=2"], roles=stub_roles(), log_file=log) as stack:
        children = [Watched(stack.pid(name)) for name in ("prefill-0", "prefill-1", "decode-0", "router")]
        assert stack.url.startswith("http://127.0.0.1:")
    for child in children:
        child.wait_gone()
    assert stack.read_log().count("the stub has stopped") == 4


async def test_a_stack_in_an_event_loop_names_the_child_that_dies(checkpoint: Path) -> None:
    plan = plan_launch([f"--model={checkpoint}", f"--port={free_port()}"], stub_roles())
    async with Stack(plan, log_file=checkpoint / "stack.log") as stack:
        os.kill(stack.pid("decode-0"), signal.SIGTERM)
        with pytest.raises(ChildError, match="decode-0 exited with code 0"):
            await stack.wait()


async def test_a_stack_that_does_not_start_leaves_nothing(checkpoint: Path) -> None:
    flags = [f"--model={checkpoint}", f"--port={free_port()}", "--decode.fault=crash"]
    stack = Stack(plan_launch(flags, stub_roles()), log_file=checkpoint / "stack.log")
    with pytest.raises(StackError, match="decode-0 exited with code 3"):
        async with stack:
            pass
    for name in ("prefill-0", "router"):
        with pytest.raises(ProcessLookupError):
            os.kill(stack.pid(name), 0)
