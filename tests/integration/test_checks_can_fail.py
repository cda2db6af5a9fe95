"""The checks can fail: a worker that loses its rows is found out by the server, and, where that does not look, by replay."""

import json
from collections.abc import Callable
from pathlib import Path

import msgspec

from common.process import spawn
from deploy.roles import tandem_roles
from deploy.stack import make_stack, running_stack
from tests.support.http_client import Client


def with_prefill(module: str):
    roles = tandem_roles()
    return {**roles, "prefill": msgspec.structs.replace(roles["prefill"], module=module)}


async def test_unwritten_rows_are_refused(checkpoint_of: Callable[[str], Path], tmp_path: Path):
    """Commits suppressed: an error that names the missing rows, and no reply."""
    flags = [f"--model={checkpoint_of('plain')}", "--device=cpu", "--cpu-threads=1"]
    roles = with_prefill("tests.fault.unwritten_rows")
    async with make_stack(flags, roles=roles, log_file=tmp_path / "log") as stack, Client(stack.url) as client:
        body = {"input_ids": [1, 2, 3, 4, 5], "return_routed_experts": True, "routed_experts_start_len": 2}
        error = await client.error(body)
        assert error["status"] in (500, 502)
        assert error["code"] == "routed_experts_missing"
        assert error["leg"] == "prefill"
        assert "3 of 3 routed-expert rows were never written, at positions 2 to 4" in error["message"]
        stats = await client.quiet_stats()
        assert stats["prefill"]["rows_refused"] == 1


def test_zero_rows_are_refused_by_the_server_or_found_by_replay(checkpoint_of: Callable[[str], Path], tmp_path: Path):
    """Zeros in the place of rows: refused by the server's own check; with that off, replay counts them and exits with 1."""
    model = f"--model={checkpoint_of('plain')}"
    roles = with_prefill("tests.fault.zero_rows")
    for verify in ("--verify-rows", "--no-verify-rows"):
        report = tmp_path / f"report{verify}.json"
        with running_stack(
            [model, "--device=cpu", "--cpu-threads=1", verify], roles=roles, log_file=tmp_path / "log"
        ) as stack:
            replay = spawn("deploy.replay", [f"--url={stack.url}", "--max-new-tokens=4", f"--report={report}"])
            assert replay.wait(120) == 1
        summary = json.loads(report.read_text())
        if verify == "--verify-rows":
            assert summary["failed_requests"] == summary["requests"] == 16
        else:
            assert summary["failed_requests"] == 0
            # Every prompt row is zero, every generated row is right.
            assert summary["rows"]["all_zero"] == summary["bad_rows"] == summary["prompt_tokens"] * 3
