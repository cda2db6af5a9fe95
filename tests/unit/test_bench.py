"""The benchmark command at sizes that mean nothing: which benchmarks there are, and what a run tells. No time is looked at."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from common.errors import UsageError
from common.protocol.legs import decode_last_event, decode_leg
from common.routed_experts.verify import verify
from deploy.bench import command, load, loop_stall, reply_format, router_rate
from deploy.bench.figures import Figure, Target, as_table, make_figure, make_report, write_json
from deploy.bench.material import SPEC, Exchange, make_block
from deploy.bench.options import BenchError, BenchOptions
from deploy.bench.registry import BENCHMARKS, Benchmark
from deploy.bench.rounds import alternate
from router.merge import merge

TINY = BenchOptions(rounds=1, scale=0.005)
AIM = Target(of="ratio", bound="at least", limit=0.5)


def figure(name: str = "one", *, a: Sequence[float] = (1.0, 3.0, 2.0), target: Target | None = AIM) -> Figure:
    return make_figure(name, "case", "ms", ("left", a), ("right", [4.0, 4.0, 5.0]), target=target)


def text_of(figures: list[Figure]) -> str:
    console = Console(width=150)
    with console.capture() as captured:
        console.print(as_table(figures))
    return captured.get()


def check_shape(figures: list[Figure], name: str, *, rounds: int) -> None:
    """Every figure is of this benchmark, whole and positive."""
    assert figures
    for each in figures:
        assert each.benchmark == name
        assert each.unit
        for side in (each.a, each.b):
            assert len(side.values) in (1, rounds)
            assert all(math.isfinite(value) and value >= 0 for value in side.values)
        assert (each.target is None) == (each.is_met is None)
    assert as_table(figures).row_count == len(figures)


# ------------------------------------------------------------------------------------------------ registry and command


def test_every_benchmark_has_its_own_name() -> None:
    assert sorted(BENCHMARKS) == ["loop_stall", "recovery", "reply_format", "router_rate", "rows_on_off", "start_len"]
    assert all(name == each.name and each.description for name, each in BENCHMARKS.items())


def test_some_can_be_chosen() -> None:
    assert command.choose("") == list(BENCHMARKS.values())
    assert [each.name for each in command.choose("reply_format, start_len")] == ["start_len", "reply_format"]
    with pytest.raises(UsageError, match="nonsense: no such benchmark; there are start_len,"):
        command.choose("start_len,nonsense")


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    assert command.main(["--only=start_len,reply_format", "--scale=0.005", "--rounds=2", f"--json={file}"]) == 0
    out, err = capsys.readouterr()
    for word in ("start_len", "reply_format", "msgpack / int32 JSON", "ratio", "at most 200"):
        assert word in out
    assert "start_len: collecting few rows" in err
    report = json.loads(file.read_text())
    assert (report["rounds"], report["scale"]) == (2, 0.005)
    assert report["cores"] > 0
    assert [each["benchmark"] for each in report["figures"]] == ["start_len"] + 4 * ["reply_format"]
    first = report["figures"][0]
    assert set(first) == {"benchmark", "case", "unit", "statistic", "a", "b", "ratio", "target", "is_met"}
    assert set(first["a"]) == {"name", "values", "value"}
    assert first["target"] == {"of": "A", "bound": "at most", "limit": 200.0}


def test_one_that_fails_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: BenchOptions) -> list[Figure]:
        raise BenchError("the stack burnt down")

    monkeypatch.setitem(BENCHMARKS, "start_len", Benchmark("start_len", "fails", fail))
    monkeypatch.setitem(BENCHMARKS, "reply_format", Benchmark("reply_format", "works", lambda _: [figure("two")]))
    assert command.main(["--only=start_len,reply_format"]) == 1
    out, err = capsys.readouterr()
    assert "error: start_len: the stack burnt down" in err
    assert "two" in out


# ------------------------------------------------------------------------------------------------ figures and rounds


def test_a_figure_is_the_ratio_of_two_medians() -> None:
    made = figure()
    assert (made.a.value, made.b.value, made.ratio, made.is_met) == (2.0, 4.0, 0.5, True)
    assert figure(a=[1.0]).is_met is False
    assert figure(target=None).is_met is None
    at_most = Target(of="A", bound="at most", limit=2)
    assert (figure(target=at_most).is_met, figure(a=[2.5], target=at_most).is_met) == (True, False)


def test_the_worst_counts_where_it_should() -> None:
    made = make_figure("one", "case", "ms", ("busy", [1.0, 9.0, 2.0]), ("idle", [0.0, 0.0]), statistic="worst")
    assert (made.a.value, made.ratio) == (9.0, math.inf)
    assert "ms, worst" in text_of([made])


def test_the_table_has_a_line_for_each_figure() -> None:
    text = text_of([figure(), figure("two", a=[1234.5])])
    for words in ("case: left / right", "2 (1 to 3)", "4 (4 to 5)", "0.5", "at least 0.5: met", "1,23"):
        assert words in text


def test_a_file_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--json"):
        write_json(make_report([figure()], TINY), tmp_path / "nowhere" / "result.json")


def test_rounds_alternate_and_each_goes_first_in_turn() -> None:
    calls: list[str] = []

    def noted(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    values = alternate({"a": lambda: noted("a"), "b": lambda: noted("b")}, 2)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert values == {"a": [4.0, 5.0], "b": [3.0, 6.0]}


# ------------------------------------------------------------------------------------------------ material


def test_the_legs_of_an_exchange_fit_together() -> None:
    exchange = Exchange(7, 4)
    prefill = decode_leg(exchange.leg_body("prefill", "msgpack", rows=True))
    decode = decode_leg(exchange.leg_body("decode", "msgpack", rows=True))
    assert prefill.output_ids == decode.output_ids[:1]
    assert prefill.rows is not None
    assert decode.rows is not None
    block = merge([prefill.rows, decode.rows], start=0, stop=10)
    verify(block)
    assert block.header.shape == (10, 48, 8)
    assert decode_leg(exchange.leg_body("decode", "msgpack", rows=False)).rows is None


def test_a_stream_ends_with_the_same_rows() -> None:
    event = Exchange(7, 4).leg_body("decode", "stream", rows=True).split(b"\n\n")[0].removeprefix(b"data: ")
    rows = decode_last_event(event).rows
    assert rows is not None
    assert rows.header.shape == (3, 48, 8)
    assert bytes(rows.data) == bytes(make_block(7, 10).data)


@pytest.mark.parametrize("binary", [True, False])
def test_both_formats_are_read_back_as_the_rows_that_went_in(binary: bool) -> None:
    block = make_block(0, 50)
    rows = reply_format.read_body(reply_format.make_body(block, binary=binary), binary=binary)
    assert isinstance(rows, np.ndarray)
    assert rows.shape == (50, SPEC.num_hidden_layers, SPEC.top_k)
    assert bytes(rows.astype(np.uint8).data) == bytes(block.data)


# ------------------------------------------------------------------------------------------------ each benchmark


@pytest.mark.parametrize("name", ["start_len", "reply_format"])
def test_benchmarks_in_this_process(name: str) -> None:
    rounds = 20 if name == "start_len" else 1
    check_shape(BENCHMARKS[name].run(TINY), name, rounds=rounds)


def test_the_router_is_measured_against_a_worker_and_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load.shutil, "which", lambda _: None)  # the same generator on every machine
    case = router_rate.Case("few rows", 2, True, "application/json", Exchange(4, 3))
    options = BenchOptions(rounds=1, scale=0.02)
    figures = router_rate.measure(case, options)
    check_shape(figures, "router_rate", rounds=1)
    assert [(each.a.name, each.b.name) for each in figures] == [
        ("router", "a worker, directly"),
        ("router", "floor of aiohttp"),
    ]


def test_wrk_is_used_where_it_can_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(load.shutil, "which", lambda _: "/bin/wrk")
    asked = load.Load(url="http://127.0.0.1:1", body=b'{"a":[1]}', accept="text/x", connections=3, duration_s=2.0)
    command_line = load.load_command(asked, tmp_path)
    assert command_line[:4] == ["/bin/wrk", "-c3", "-t1", "-d2s"]
    script = (tmp_path / "load.lua").read_text()
    assert '[==[{"a":[1]}]==]' in script
    assert 'wrk.headers["Accept"] = "text/x"' in script


def test_nobody_listening_fails_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load.shutil, "which", lambda _: None)
    nobody = load.Load(url="http://127.0.0.1:9", body=b"{}", accept="*/*", connections=1, duration_s=0.01)
    with pytest.raises(BenchError, match="ConnectionRefusedError"):
        load.generate_load(nobody)


def test_stalls_are_told_for_both_event_loops() -> None:
    figures = loop_stall.run(BenchOptions(rounds=1, scale=0.003))
    check_shape(figures, "loop_stall", rounds=2)
    assert len(figures) == 2 * 2 * len(loop_stall.FORMS)
    assert {each.statistic for each in figures} == {"worst"}
