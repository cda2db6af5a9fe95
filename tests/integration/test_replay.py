"""The replay command against a server that is right by construction, and against the same one with one thing spoilt."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from aiohttp.test_utils import TestServer

from common.errors import UsageError
from deploy.bench.figures import as_table
from deploy.bench.options import BenchError, BenchOptions
from deploy.bench.rows_on_off import measure
from deploy.demo_model import write_demo_model
from deploy.replay.command import main
from deploy.replay.workload import Sample
from tests.support.reference_server import ReferenceServer, Reply, Spoil


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo-model")
    write_demo_model(folder)
    return folder


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    path = tmp_path / "workload.jsonl"
    lines = [
        {"prompt": "The harbour wakes before the town does."},
        {"input_ids": [5, 600, 17, 300], "max_new_tokens": 1},
        {"messages": [{"role": "user", "content": "How are you?"}]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


class Replayer:
    """Runs the command against the server, in a thread: the server needs the event loop."""

    def __init__(self, server: ReferenceServer, url: str, checkpoint: Path, workload: Path, folder: Path) -> None:
        self.server = server
        self.url = url.rstrip("/")
        self._report = folder / "report.json"
        self._reference = f"--reference={checkpoint}"
        self._flags = [f"--url={url}", f"--workload={workload}", "--max-new-tokens=8", f"--report={self._report}"]
        self._tokenizer = f"--tokenizer={checkpoint}"

    async def run(self, *flags: str, reference: bool = True) -> tuple[int, dict]:
        model = self._reference if reference else self._tokenizer
        code = await asyncio.to_thread(main, [*self._flags, model, *flags])
        return code, json.loads(self._report.read_text())


@pytest.fixture
async def replayer(checkpoint: Path, workload: Path, tmp_path: Path) -> AsyncIterator[Replayer]:
    server = ReferenceServer(checkpoint)
    async with TestServer(server.app()) as running:
        yield Replayer(server, str(running.make_url("/")), checkpoint, workload, tmp_path)


async def test_a_right_server_passes(replayer: Replayer, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = await replayer.run()
    assert code == 0
    assert report["is_good"]
    assert report["range_checked"]
    assert (report["requests"], report["output_tokens"]) == (3, 17)
    assert report["reference"]["rows_compared"] == report["rows"]["rows"] == 3 * (report["prompt_tokens"] + 17 - 3)
    assert report["reference"]["tokens_compared"] == 17
    out, err = capsys.readouterr()
    assert "bad rows" in out
    assert "latency p99" in out
    assert err == "", "no progress bar where there is no terminal"


def wipe(reply: Reply, rows: np.ndarray) -> np.ndarray:
    rows[2:4] = 0
    return rows


def repeat(reply: Reply, rows: np.ndarray) -> np.ndarray:
    rows[1, 1] = rows[1, 1, 0]
    return rows


def exceed(reply: Reply, rows: np.ndarray) -> np.ndarray:
    rows[0, 2, 3] = 16
    return rows


def cut(reply: Reply, rows: np.ndarray) -> np.ndarray:
    return rows[:-1]


SPOILT_ROWS = [(wipe, "all_zero", 6), (repeat, "duplicated", 1), (exceed, "out_of_range", 1), (cut, "missing", 3)]


@pytest.mark.parametrize(("spoil", "kind", "count"), SPOILT_ROWS)
@pytest.mark.parametrize("reference", [False, True])
async def test_impossible_rows_are_found_with_and_without_a_reference(
    replayer: Replayer, spoil: Spoil, kind: str, count: int, reference: bool
) -> None:
    replayer.server.spoil = spoil
    code, report = await replayer.run(reference=reference)
    assert code == 1
    assert report["rows"][kind] == report["bad_rows"] == count
    assert report["failed_requests"] == 0


def shift(reply: Reply, rows: np.ndarray) -> np.ndarray:
    return np.roll(rows, 1, axis=0)


async def test_stale_rows_are_found_by_the_reference_alone(replayer: Replayer) -> None:
    replayer.server.spoil = shift
    assert (await replayer.run(reference=False))[0] == 0
    replayer.server.num_replies = 0
    code, report = await replayer.run()
    assert code == 1
    assert report["bad_rows"] == 0
    assert report["reference"]["rows_differ"] > 0
    assert "rows differ from the reference" in report["problems"][0]


def reverse(reply: Reply, rows: np.ndarray) -> np.ndarray:
    return rows[..., ::-1]


async def test_another_order_within_rows_is_reported_and_harmless(replayer: Replayer) -> None:
    replayer.server.spoil = reverse
    code, report = await replayer.run()
    assert code == 0
    assert report["reference"]["rows_reordered"] > 0
    assert report["reference"]["rows_differ"] == 0


def change_last_token(reply: Reply, rows: np.ndarray) -> np.ndarray:
    reply["output_ids"][-1] ^= 1
    return rows


async def test_a_wrong_token_is_found(replayer: Replayer) -> None:
    replayer.server.spoil = change_last_token
    code, report = await replayer.run()
    assert code == 1
    assert report["reference"]["tokens_differ"] == 1
    assert (await replayer.run("--temperature=0.5"))[1]["reference"]["tokens_compared"] == 0


def abort(reply: Reply, rows: np.ndarray) -> np.ndarray:
    reply["meta_info"]["finish_reason"] = {"type": "abort", "message": "out of patience"}
    return rows


async def test_an_abort_is_a_failed_request(replayer: Replayer) -> None:
    replayer.server.spoil = abort
    code, report = await replayer.run()
    assert (code, report["failed_requests"]) == (1, 1)
    assert "out of patience" in report["problems"][0]


async def test_refused_requests_fail_with_the_servers_words(
    replayer: Replayer, capsys: pytest.CaptureFixture[str]
) -> None:
    replayer.server.refuse_with = 503
    code, report = await replayer.run()
    assert (code, report["failed_requests"]) == (1, 3)
    assert "line 1: 503: no such luck" in capsys.readouterr().out


async def test_without_rows_none_are_missed(replayer: Replayer) -> None:
    code, report = await replayer.run("--no-rows")
    assert (code, report["rows"], report["bad_rows"]) == (0, None, 0)
    assert report["reference"]["tokens_compared"] == 17


async def test_the_benchmark_compares_rounds_with_and_without_rows(replayer: Replayer, tmp_path: Path) -> None:
    samples = [Sample(line=line, input_ids=[line, 2, 3], max_new_tokens=4) for line in (1, 2)]
    figures = await asyncio.to_thread(measure, replayer.url, samples, BenchOptions(rounds=2, concurrency=2))
    assert [figure.a.name for figure in figures] == ["rows as int32 JSON", "rows as msgpack"]
    for figure in figures:
        assert len(figure.a.values) == len(figure.b.values) == 2
        assert figure.ratio == figure.a.value / figure.b.value > 0
    assert as_table(figures).row_count == 2
    replayer.server.refuse_with = 500
    with pytest.raises(BenchError, match="2 of 2 requests failed, the first with: 500: no such luck"):
        await asyncio.to_thread(measure, replayer.url, samples, BenchOptions(rounds=1))


def test_nobody_listening_fails_every_request(workload: Path) -> None:
    workload.write_text('{"prompt": "hello"}')
    assert main(["--url=http://127.0.0.1:9", f"--workload={workload}"]) == 1


@pytest.mark.parametrize(
    ("flag", "word"),
    [
        ("--url=localhost:8000", "begins with neither"),
        ("--workload=/nowhere.jsonl", "/nowhere.jsonl"),
        ("--reference=/nowhere", "/nowhere"),
        ("--concurrency=0", "--concurrency"),
    ],
)
def test_usage_errors_name_the_option(flag: str, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        main(["--url=http://127.0.0.1:9", flag])
