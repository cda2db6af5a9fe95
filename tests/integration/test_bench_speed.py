"""The speed benchmarks end to end at sizes that mean nothing: the engine alone, and a real stack over HTTP; on the CPU."""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.messages import Generate, RowBlock
from deploy.bench import command
from deploy.bench.speed.clients import running_clients
from deploy.bench.speed.interference import Interference, measure_interference
from deploy.bench.speed.requests import describe_server
from deploy.bench.speed.session import Answered, Session
from deploy.stack import Stack, running_stack

SHAPE = "plain"
FLAGS = ["--device=cpu", "--cpu-threads=1", "--kv-pool-tokens=2048"]


@pytest.fixture
def report(tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Run the command, and give its exit code and its report."""

    def run(*argv: str) -> tuple[int, dict[str, Any]]:
        file = tmp_path / "report.json"
        code = command.main([*argv, f"--json={file}"])
        return code, json.loads(file.read_text())

    return run


def offline_flags(checkpoint: Path) -> list[str]:
    return ["offline", f"--model={checkpoint}", *FLAGS, "--chunked-prefill-tokens=32"]


def test_the_engine_alone(
    report: Callable[..., tuple[int, dict[str, Any]]],
    checkpoint_of: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [*offline_flags(checkpoint_of(SHAPE)), "--rounds=2", "--compare-overlap", "--workload=3x20x8,2x50x1"]
    trace = tmp_path / "trace.json"
    code, found = report(*flags, f"--profile={trace}", "--profile-steps=2")
    assert (code, found["failures"]) == (0, [])
    names = ["off, overlap", "rows, overlap", "off, no overlap", "rows, no overlap"]
    assert [(case["workload"]["name"], case["name"]) for case in found["cases"]] == [
        (workload, name) for workload in ("3x20x8", "2x50x1") for name in names
    ]
    for case in found["cases"]:
        assert len(case["rounds"]) == 2
        assert case["target"] is None
        assert case["best"] >= case["median"] > 0
        for each in case["rounds"]:
            assert each["ttft_ms"]["count"] == case["workload"]["requests"]
            assert (each["rows"] is None) == case["name"].startswith("off")
    rows = found["cases"][1]["rounds"][0]
    assert rows["rows"] == {
        "rows": 3 * 27 * 3,
        "all_zero": 0,
        "out_of_range": 0,
        "duplicated": 0,
        "missing": 0,
        "surplus": 0,
    }
    assert rows["itl_ms"]["count"] == 3 * 7
    # 60 prompt tokens in chunks of 32, then 7 tokens each; with overlap the first one to decode is a step ahead.
    assert [case["rounds"][0]["steps"]["count"] for case in found["cases"][:4]] == [10, 10, 9, 9]
    assert [case["rounds"][0]["steps"]["decode_count"] for case in found["cases"][:4]] == [8, 8, 7, 7]
    assert 4 <= rows["distinct_experts"] <= 12
    assert len(found["ratios"]) == 4
    assert (found["profile"]["num_steps"], found["profile"]["gaps"]) == (2, None)
    assert json.loads(trace.read_text())["traceEvents"]
    assert "nothing ran on a device" in capsys.readouterr().out


def test_rows_that_the_engine_spoils_are_counted(
    report: Callable[..., tuple[int, dict[str, Any]]],
    checkpoint_of: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Session.run

    def spoilt(self: Session, messages: list[Generate]) -> Answered:
        answered = run(self, messages)
        rid, block = next(iter(answered.blocks.items()), ("", None))
        if block is not None:
            answered.blocks[rid] = RowBlock(block.header, bytes(len(block.data)))
        return answered

    monkeypatch.setattr(Session, "run", spoilt)
    flags = [*offline_flags(checkpoint_of(SHAPE)), "--rounds=1", "--rows=on"]
    code, found = report(*flags, "--workload=2x5x4,1x1020x100,1x4x2")
    assert code == 1
    assert [case["workload"]["name"] for case in found["cases"]] == ["2x5x4", "1x4x2"]
    assert found["cases"][0]["rounds"][0]["rows"]["all_zero"] == 8 * 3
    assert found["failures"] == ["1x1020x100: a request of 1120 tokens does not fit the context of 1024"]


@pytest.fixture(scope="module")
def stack(checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    flags = [f"--model={checkpoint_of(SHAPE)}", *FLAGS, "--no-prefix-cache"]
    with running_stack(flags, log_file=tmp_path_factory.mktemp("stack") / "log") as running:
        yield running


def test_a_stack_in_every_form(stack: Stack, report: Callable[..., tuple[int, dict[str, Any]]]) -> None:
    flags = ["online", f"--url={stack.url}", "--rounds=1", "--processes=2"]
    code, found = report(*flags, "--workload=3x20x8,2x50x1")
    assert (code, found["failures"]) == (0, [])
    assert [case["name"] for case in found["cases"]] == ["off", "int32", "msgpack"] * 2
    for case in found["cases"]:
        [each] = case["rounds"]
        assert case["target"] is None
        assert each["transfer"]["total_mb"] > 0
        assert each["timings_ms"]["e2e_latency"] > 0
        if case["name"] != "off":
            expected = 3 * 27 * 3 if case["workload"]["name"] == "3x20x8" else 2 * 50 * 3
            assert each["rows"]["rows"] == expected
            assert sum(each["rows"].values()) == expected
    assert len(found["ratios"]) == 4

    code, found = report(*flags, "--workload=3x20x8", "--stream")
    assert (code, [case["name"] for case in found["cases"]]) == (0, ["off", "int32"])
    for case in found["cases"]:
        assert case["rounds"][0]["ttft_ms"]["count"] == 3
        assert 0 < case["rounds"][0]["itl_ms"]["count"] <= 3 * 7

    code, found = report(*flags, "--workload=3x20x8,1x2000x1", "--target=openai", "--vocab-size=900")
    assert (code, [case["name"] for case in found["cases"]]) == (1, ["off"])
    assert found["failures"][0].startswith("1x2000x1: 1 of 1 requests failed, one with: 400")


def test_long_prompts_beside_streams(stack: Stack) -> None:
    server = describe_server(stack.url, "tandem", api_key="", model="", vocab_size=0)
    assert not server.has_target_shape
    assert server.num_experts is not None
    small = Interference(streams=2, prompt_tokens=8, output_tokens=100, long_prompts=500, long_prompt_tokens=200)
    with running_clients(2) as clients:
        cases, ratios = measure_interference(
            clients, server, small, rounds=1, seed=1, serials=itertools.count(), deadline_s=60.0
        )
    assert [case.name for case in cases] == ["alone", "under prefill"]
    assert all(case.rounds[0].itl_ms is not None for case in cases)
    assert [each.case for each in ratios] == [f"ITL {p} with 200-token prompts" for p in ("p50", "p99")]
    assert all(each.ratio > 0 for each in ratios)
