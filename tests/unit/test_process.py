"""Entry, end and children of a process; the ends are real ones, waited for through pipes and pidfds."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from common import process
from common.errors import UsageError
from common.process import (
    PARENT_PID_VARIABLE,
    ProcessMark,
    ensure_port_free,
    free_port,
    free_port_runs,
    free_ports,
    is_gone,
    own_mark,
    run_main,
    spawn,
    spawn_async,
    stop_process,
    stop_process_async,
)
from tests.support.processes import DEADLINE_S, REPOSITORY, Watched, end, read_line

PARENT = """
import subprocess, sys
from common.process import spawn
child = spawn("{module}", ["sleep"], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


def run(code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env={"PYTHONPATH": str(REPOSITORY), **environment},
        check=False,
    )


def raise_usage_error(argv: list[str]) -> int:
    raise UsageError("--port 0: too\nlow")


def raise_interrupt(argv: list[str]) -> int:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("main", "code"),
    [(lambda argv: None, 0), (lambda argv: 7, 7), (raise_usage_error, 2), (raise_interrupt, 130)],
)
def test_run_main_exits_with_the_code(main, code: int) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run_main(main)
    assert exit_info.value.code == code


def test_a_usage_error_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_main(raise_usage_error)
    assert capsys.readouterr() == ("", "error: --port 0: too low\n")


def test_a_child_dies_with_a_parent_that_was_killed() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(module="tests.support.child")],
        stdout=subprocess.PIPE,
        bufsize=0,
        cwd=REPOSITORY,
    )
    try:
        child = Watched(int(read_line(parent)))
        parent.kill()
        child.wait_gone()
    finally:
        end(parent)


def test_a_child_whose_parent_died_too_early_exits_by_itself() -> None:
    code = "from common.process import die_with_parent; die_with_parent(); print('alive')"
    # Our own parent cannot be the new process's parent, which is what an orphan finds.
    orphan = run(code, **{PARENT_PID_VARIABLE: "1"})
    assert (orphan.returncode, orphan.stdout) == (1, "")


def test_without_a_spawning_parent_nothing_is_arranged() -> None:
    assert run("from common.process import die_with_parent; die_with_parent(); print('alive')").stdout == "alive\n"


def test_the_parents_pid_is_not_inherited_further() -> None:
    child = spawn("tests.support.child", ["environment"], stdout=subprocess.PIPE)
    out, _ = child.communicate(timeout=DEADLINE_S)
    assert PARENT_PID_VARIABLE not in out.decode()
    assert child.returncode == 0


def test_stop_asks_first_and_kills_at_the_deadline(tmp_path: Path) -> None:
    for argument, deadline_s, expected in (("sleep", DEADLINE_S, -signal.SIGTERM), ("stubborn", 0.05, -signal.SIGKILL)):
        child = spawn("tests.support.child", [argument], stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        assert stop_process(child, deadline_s) == expected
        end(child)


async def test_stop_in_an_event_loop_does_the_same() -> None:
    for argument, deadline_s, expected in (("sleep", DEADLINE_S, -signal.SIGTERM), ("stubborn", 0.05, -signal.SIGKILL)):
        child = await spawn_async("tests.support.child", [argument], stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert await child.stdout.readline() == b"up\n"
        assert await stop_process_async(child, deadline_s) == expected
        assert await stop_process_async(child, deadline_s) == expected, "stopping twice is harmless"


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UsageError, match=f"^port {port} on 127.0.0.1 is in use$"):
            ensure_port_free("127.0.0.1", port)


def test_an_address_of_another_machine_cannot_be_listened_on() -> None:
    with pytest.raises(UsageError, match=r"^cannot listen on 192\.0\.2\.1:80"):
        ensure_port_free("192.0.2.1", 8080)


def test_free_ports_are_free_and_different() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    for port in [*ports, free_port()]:
        ensure_port_free("127.0.0.1", port)


def test_runs_of_ports_are_consecutive_free_and_apart() -> None:
    lengths = [1, 4, 1, 8, 2]
    runs = [range(start, start + length) for start, length in zip(free_port_runs(lengths), lengths, strict=True)]
    ports = [port for run in runs for port in run]
    assert len(set(ports)) == sum(lengths)
    for port in ports:
        ensure_port_free("127.0.0.1", port)


def test_a_run_with_a_port_in_use_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(process, "_LISTENING_PORTS", range(port - 2, port + 2))
        assert free_port_runs([2]) == [port - 2]
        with pytest.raises(UsageError, match="no 3 consecutive free ports on 127"):
            free_port_runs([3])


# ------------------------------------------------------------------------------------------------ who is alive


def mark_of(pid: int) -> ProcessMark:
    started = process._start_of(pid)
    assert started is not None
    return replace(own_mark(), pid=pid, started_ticks=started)


def test_a_process_is_gone_when_it_has_ended_and_not_before():
    """Stopped is not gone; a zombie is, which nobody has waited for yet."""
    child = spawn("tests.support.child", ["sleep"], stdout=subprocess.PIPE)
    assert read_line(child) == "up"
    mark = mark_of(child.pid)
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
    assert not is_gone(mark)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert is_gone(mark), "it is a zombie"
    end(child)
    assert is_gone(mark)


def test_another_process_with_the_same_number_is_not_the_same():
    assert not is_gone(own_mark())
    assert is_gone(replace(own_mark(), started_ticks=own_mark().started_ticks + 1))


@pytest.mark.parametrize("field", [{"boot_id": "elsewhere"}, {"pid_namespace": 1}])
def test_of_a_process_elsewhere_nothing_is_known(field: dict[str, Any]):
    """No process here has that number; it may run all the same."""
    assert not is_gone(replace(own_mark(), pid=2**22 + 1, **field))
