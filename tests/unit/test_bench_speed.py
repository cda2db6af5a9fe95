"""The speed benchmarks' tables and arithmetic, and what their checks find in answers that are spoilt. No time is looked at."""

import gzip
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from rich.console import Console

from common.errors import UsageError
from common.messages import Finished, FinishReason, Generate, RequestOptions, RowBlock, VersionSpan
from common.models.config import Fp8Config, load_model_config
from common.protocol.replies import MSGPACK, SSE_DONE, encode_json, encode_msgpack, sample_reply, sse_event
from common.routed_experts.codec import block_of, row_fields
from common.routed_experts.spec import RowSpec
from common.scheduling.request import Request
from common.scheduling.step_plan import StepEntry, StepPlan
from deploy.bench import command
from deploy.bench.options import BenchError
from deploy.bench.speed import offline, online
from deploy.bench.speed.client import Reply
from deploy.bench.speed.judge import Judged, TimedMeta, judge_all, judge_reply, make_round
from deploy.bench.speed.profile import Activity, as_table, find_gaps, main_stream, make_profile, short_name, sum_kernels
from deploy.bench.speed.requests import Load, Server, make_job
from deploy.bench.speed.results import (
    Round,
    SpeedReport,
    describe_machine,
    make_case,
    make_ratio,
    print_report,
    spread_of,
    weighted_median,
    write_report,
)
from deploy.bench.speed.rows import count_rows, distinct_experts, read_block
from deploy.bench.speed.session import Answered, Settled, latencies_of, steps_of
from deploy.bench.speed.shape import FP8_SHAPE_NAME, SHAPE_NAME, resolve_model
from deploy.bench.speed.workloads import (
    INTERFERENCE,
    NO_TARGETS,
    OFFLINE_TARGETS,
    ONLINE_TARGETS,
    WORKLOADS,
    Workload,
    is_target_shape,
    make_prompts,
    parse_workloads,
    workload_of,
)
from deploy.replay.check import RowCounts

NUM_EXPERTS, TOP_K = 8, 3
SPEC = RowSpec(num_experts=NUM_EXPERTS, top_k=TOP_K, layer_ids=(0, 2), num_hidden_layers=3)
SMALL = Workload("small", 4, 5, 6)


def good_rows(seed: int, workload: Workload = SMALL) -> np.ndarray:
    """Distinct ids in every row, as an array that may be written to."""
    rng = np.random.default_rng(seed)
    shape = (workload.num_rows, SPEC.num_layers, NUM_EXPERTS)
    return np.argsort(rng.random(shape), axis=-1)[..., :TOP_K].astype(np.uint8)


def text_of(table: Any) -> str:
    console = Console(width=250)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


# ------------------------------------------------------------------------------------------------ workloads and targets


def test_the_workloads_are_those_of_the_table() -> None:
    sizes = {name: (each.requests, each.prompt_tokens, each.output_tokens) for name, each in WORKLOADS.items()}
    assert sizes == {
        "b1": (1, 128, 256),
        "ref16": (16, 13, 32),
        "b16": (16, 1024, 256),
        "b64": (64, 1024, 256),
        "b256": (256, 1024, 256),
        "prefill": (16, 8192, 1),
        "long": (1, 32000, 32),
    }
    assert [name for name, each in WORKLOADS.items() if each.merit == "input"] == ["prefill", "long"]
    assert WORKLOADS["prefill"].tokens_per_s(2.0) == 16 * 8192 / 2
    assert WORKLOADS["b64"].tokens_per_s(2.0) == 64 * 256 / 2


def test_workloads_are_named_or_spelt_out() -> None:
    assert parse_workloads("b1, 2x3x4,itl-under-prefill") == ["b1", "2x3x4", INTERFERENCE]
    assert workload_of("2x3x4") == Workload("2x3x4", 2, 3, 4)
    assert workload_of("2x3x1").merit == "input"
    for bad in ("b2", "2x3", "0x1x1", "axbxc", "1x2x3x4", ","):
        with pytest.raises(UsageError, match="--workload"):
            parse_workloads(bad)


def test_every_target_is_of_a_workload() -> None:
    for targets in (OFFLINE_TARGETS, ONLINE_TARGETS):
        assert set(targets.tokens_per_s) <= set(WORKLOADS)
    assert OFFLINE_TARGETS.of_rows("b64", "rows") == 0.99
    assert OFFLINE_TARGETS.of_rows("b16", "rows") is None
    assert (ONLINE_TARGETS.of_rows("long", "int32"), ONLINE_TARGETS.of_rows("b1", "msgpack")) == (0.97, 0.99)


def test_prompts_differ_by_request_and_round_and_repeat_by_seed() -> None:
    first, second = (make_prompts(3, 50, vocab_size=1000, seed=1, serial=serial) for serial in (0, 1))
    assert first.shape == (3, 50)
    assert 0 <= first.min() < first.max() < 1000
    assert len({tuple(prompt) for prompt in [*first, *second]}) == 6
    assert np.array_equal(first, make_prompts(3, 50, vocab_size=1000, seed=1, serial=0))


def test_the_shape_is_a_model_that_targets_are_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command.main(["shape", str(tmp_path / "shape")]) == 0
    config = load_model_config(tmp_path / "shape")
    assert is_target_shape(config)
    assert (config.vocab_size, config.eos_token_ids, config.dtype, config.rope.theta) == (151936, (1,), "bfloat16", 1e6)
    assert not is_target_shape(msgspec.structs.replace(config, num_experts=64))
    assert (tmp_path / "shape" / "tokenizer.json").is_file()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert resolve_model("other") == "other"
    assert load_model_config(Path(resolve_model(SHAPE_NAME))) == config
    quantised = load_model_config(Path(resolve_model(FP8_SHAPE_NAME)))
    assert quantised.quantization_config == Fp8Config(quant_method="fp8", weight_block_size=(128, 128))
    assert msgspec.structs.replace(quantised, quantization_config=None) == config
    for bad in ([], ["--help"], ["a", "b"]):
        with pytest.raises(UsageError, match="shape FOLDER"):
            command.main(["shape", *bad])


# ------------------------------------------------------------------------------------------------ arithmetic


def test_percentiles() -> None:
    assert spread_of([]) is None
    spread = spread_of(list(range(101)))
    assert spread is not None
    assert (spread.p50, spread.p99, spread.count) == (50, 99, 101)


def test_the_weighted_median_is_that_of_the_values_written_out() -> None:
    assert weighted_median([], []) is None
    values, weights = [3.0, 1.0, 2.0, 9.0], [1, 5, 2, 3]
    written_out = [value for value, weight in zip(values, weights, strict=True) for _ in range(weight)]
    assert weighted_median(values, weights) == statistics.median(written_out) == 2.0


def test_distinct_experts_agree_with_sets() -> None:
    rows = [good_rows(seed) for seed in range(SMALL.requests)]
    slow = [
        len({int(expert) for ids in rows for expert in ids[position, layer]})
        for position in range(SMALL.prompt_tokens, SMALL.num_rows)
        for layer in range(SPEC.num_layers)
    ]
    assert distinct_experts(rows, SMALL, num_experts=NUM_EXPERTS) == pytest.approx(statistics.mean(slow))
    alike = [rows[0]] * SMALL.requests
    assert distinct_experts(alike, SMALL, num_experts=NUM_EXPERTS) == TOP_K
    assert distinct_experts(rows[:1], SMALL, num_experts=NUM_EXPERTS) == TOP_K
    prompt_only = Workload("prompt", 1, 5, 1)
    assert distinct_experts([good_rows(0, prompt_only)], prompt_only, num_experts=NUM_EXPERTS) is None


# ------------------------------------------------------------------------------------------------ rows, and how they go bad


def wipe(rows: np.ndarray) -> np.ndarray:
    rows[2:4] = 0
    return rows


def repeat(rows: np.ndarray) -> np.ndarray:
    rows[1, 1] = rows[1, 1, 0] or 1
    return rows


def exceed(rows: np.ndarray) -> np.ndarray:
    rows[0, 1, 2] = NUM_EXPERTS
    return rows


def cut(rows: np.ndarray) -> np.ndarray:
    return rows[:-1]


Spoil = Callable[[np.ndarray], np.ndarray]
SPOILT: list[tuple[Spoil, str, int]] = [
    (wipe, "all_zero", 4),
    (repeat, "duplicated", 1),
    (exceed, "out_of_range", 1),
    (cut, "missing", 2),
]


def block(rows: np.ndarray, start: int = 0) -> RowBlock:
    versions = (VersionSpan(start, start + len(rows), "v"),)
    return block_of(SPEC.header(start=start, stop=start + len(rows), weight_versions=versions), rows)


def count(rows: list[np.ndarray | None]) -> RowCounts:
    blocks = [None if each is None else block(each) for each in rows]
    read = [read_block(each, SMALL) for each in blocks]
    return count_rows(read, SMALL, num_layers=SPEC.num_layers, num_experts=NUM_EXPERTS)


def test_good_rows_are_counted_and_not_bad() -> None:
    counts = count([good_rows(seed) for seed in range(4)])
    assert (counts.rows, counts.bad) == (4 * SMALL.num_rows * SPEC.num_layers, 0)


@pytest.mark.parametrize(("spoil", "kind", "number"), SPOILT)
def test_bad_rows_of_a_block_are_found(spoil: Spoil, kind: str, number: int) -> None:
    counts = count([good_rows(0), spoil(good_rows(1)), good_rows(2)])
    assert getattr(counts, kind) == counts.bad == number


def test_an_answer_without_rows_misses_all() -> None:
    assert count([good_rows(0), None]).missing == SMALL.num_rows * SPEC.num_layers
    with pytest.raises(BenchError, match=r"\[1, 11\) have come instead of \[0, 10\)"):
        read_block(block(good_rows(0), start=1), SMALL)
    whole = block(good_rows(0))
    with pytest.raises(BenchError, match="should be"):
        read_block(RowBlock(whole.header, bytes(whole.data)[:-1]), SMALL)


# ------------------------------------------------------------------------------------------------ replies


def body_of(rows: np.ndarray | None, *, binary: bool, num_tokens: int = 6, **timings: float) -> bytes:
    finished = Finished(
        rid="r",
        prompt_tokens=SMALL.prompt_tokens,
        cached_tokens=0,
        token_ids=list(range(num_tokens)),
        logprobs=[],
        finish_reason=FinishReason(type="length", length=num_tokens),
        timings=timings,
    )
    reply = sample_reply(
        finished,
        text="",
        options=RequestOptions(return_routed_experts=rows is not None),
        weight_version="v",
        e2e_latency_s=0.5,
        rows=None if rows is None else row_fields(block(rows), "auto" if binary else "int32", binary=binary),
    )
    return encode_msgpack(reply) if binary else encode_json(reply)


def judge(body: bytes, *, form: Any = "off", status: int = 200, failure: str | None = None) -> Judged:
    reply = Reply(started_s=1.0, ended_s=2.0, status=status, body=body, arrivals=[(2.0, len(body))], failure=failure)
    return judge_reply(
        reply, target="tandem", form=form, stream=False, prompt_tokens=SMALL.prompt_tokens, num_experts=NUM_EXPERTS
    )


@pytest.mark.parametrize("form", ["int32", "msgpack"])
def test_a_replys_rows_are_counted(form: str) -> None:
    binary = form == "msgpack"
    good = judge(body_of(good_rows(0), binary=binary), form=form)
    assert good.rows is not None
    assert (good.num_tokens, good.rows.rows, good.rows.bad) == (6, 20, 0)
    assert good.meta is not None
    assert good.meta.routed_experts is None, "nobody keeps the rows"
    for spoil, kind, number in SPOILT:
        spoilt = judge(body_of(spoil(good_rows(0)), binary=binary), form=form).rows
        assert spoilt is not None
        assert getattr(spoilt, kind) == spoilt.bad == number
    without = judge(body_of(None, binary=binary), form=form).rows
    assert without is not None
    assert without.missing > 0


def test_replies_that_are_none_end_the_round() -> None:
    for body, options, words in (
        (b'{"error": 1}', {"status": 503}, "503: "),
        (b"", {"failure": "reset"}, "reset"),
        (b"{", {}, "cannot be read"),
        (b'{"output_ids": []}', {}, "meta_info"),
    ):
        with pytest.raises(BenchError, match=words):
            judge(body, **options)  # type: ignore[arg-type]
    replies = [
        Reply(started_s=0, ended_s=1, status=status, body=body_of(None, binary=False)) for status in (200, 500, 200)
    ]
    with pytest.raises(BenchError, match="1 of 3 requests failed, one with: 500"):
        judge_all(iter(replies), target="tandem", form="off", stream=False, prompt_tokens=5, num_experts=None)
    with pytest.raises(BenchError, match="3 tokens, not 6"):
        make_round([judge(body_of(None, binary=False, num_tokens=3))], SMALL)


def stream_reply(events: list[tuple[float, bytes]]) -> Reply:
    body, arrivals = b"", []
    for at_s, event in events:
        body += event
        arrivals.append((at_s, len(body)))
    return Reply(started_s=1.0, ended_s=events[-1][0], status=200, body=body, arrivals=arrivals)


def judge_stream(reply: Reply, target: Any) -> Judged:
    return judge_reply(reply, target=target, form="off", stream=True, prompt_tokens=5, num_experts=None)


def test_a_tandem_streams_tokens_are_timed() -> None:
    ids = [[7], [7, 8], [7, 8, 9]]
    last = json.loads(body_of(None, binary=False)) | {"output_ids": ids[-1]}
    first, second, third = (sse_event({"output_ids": each}) for each in ids)
    # An event is there with its last byte; the last one repeats the ids of the one before.
    events = [(1.5, first + second[:4]), (1.6, second[4:]), (1.9, third + sse_event(last)), (2.0, SSE_DONE)]
    judged = judge_stream(stream_reply(events), "tandem")
    assert (judged.num_tokens, judged.token_times_s, judged.ttft_s) == (3, [1.5, 1.6, 1.9], 0.5)
    assert judged.itl_ms == pytest.approx([100, 300])
    with pytest.raises(BenchError, match=r"without \[DONE\]"):
        judge_stream(stream_reply(events[:-1]), "tandem")
    with pytest.raises(BenchError, match="out of luck"):
        judge_stream(stream_reply([(1.5, sse_event({"error": "out of luck"}) + SSE_DONE)]), "tandem")


def test_an_openai_streams_tokens_are_timed() -> None:
    choice = sse_event({"choices": [{"text": "a"}]})
    usage = sse_event({"choices": [], "usage": {"completion_tokens": 2}})
    judged = judge_stream(stream_reply([(1.5, choice), (1.75, choice), (2.0, usage + SSE_DONE)]), "openai")
    assert (judged.num_tokens, judged.token_times_s) == (2, [1.5, 1.75])
    whole = Reply(started_s=0, ended_s=1, status=200, body=b'{"choices": [1], "usage": {"completion_tokens": 6}}')
    judged = judge_reply(whole, target="openai", form="off", stream=False, prompt_tokens=5, num_experts=None)
    assert (judged.num_tokens, judged.token_times_s, judged.ttft_s) == (6, [], None)


def test_transfers_are_summed_by_what_the_replies_tell() -> None:
    def told(exposed_s: float | None, speed: float, size_mb: float) -> Judged:
        meta = json.loads(body_of(None, binary=False))["meta_info"] | {
            "pd_transfer_total_mb": size_mb,
            "pd_transfer_speed_gb_s": speed,
            "pd_transfer_exposed_duration": exposed_s,
        }
        return Judged(
            started_s=1.0,
            ended_s=3.0,
            num_tokens=6,
            num_bytes=10,
            token_times_s=[1.0 + 0.1 * n for n in range(1, 7)],
            meta=msgspec.convert(meta, TimedMeta),
        )

    made = make_round([told(0.01, 5.0, 1.0), told(0.02, 7.0, 8.0), told(0.03, 9.0, 1.0)], SMALL)
    assert made.transfer is not None
    assert (made.transfer.gb_s, made.transfer.total_mb) == (7.0, 10.0)
    assert made.transfer.exposed_ms is not None
    assert made.transfer.exposed_ms.p50 == pytest.approx(20)
    assert made.transfer.exposed_part_of_ttft == pytest.approx(0.2)
    assert made.timings_ms["e2e_latency"] == pytest.approx(500)
    absent = make_round([told(None, 5.0, 1.0)], SMALL).transfer
    assert absent is not None
    assert (absent.gb_s, absent.exposed_ms, absent.exposed_part_of_ttft) == (5.0, None, None)


def test_bodies_ask_for_what_was_named() -> None:
    load = Load(requests=2, prompt_tokens=3, output_tokens=4, form="msgpack", stream=False, seed=1, serial=2)
    server = Server(
        url="http://a", target="tandem", api_key="k", model="m", vocab_size=9, num_experts=8, has_target_shape=False
    )
    job = make_job(server, load, deadline_s=5.0)
    assert (job.url + job.path, job.headers["Accept"]) == ("http://a/generate", MSGPACK)
    assert job.headers["Authorization"] == "Bearer k"
    first, second = map(json.loads, job.bodies)
    assert (first["routed_experts_dtype"], first["return_routed_experts"], first["stream"]) == ("auto", True, False)
    params = first["sampling_params"]
    assert (params["max_new_tokens"], params["ignore_eos"], params["temperature"]) == (4, True, 1.0)
    assert params["sampling_seed"] != second["sampling_params"]["sampling_seed"]
    assert len(first["input_ids"]) == 3 != first["input_ids"] != second["input_ids"]
    openai = msgspec.structs.replace(server, target="openai")
    [body, _] = make_job(openai, msgspec.structs.replace(load, form="off", stream=True), deadline_s=5.0).bodies
    fields = json.loads(body)
    assert (fields["model"], fields["max_tokens"], len(fields["prompt"])) == ("m", 4, 3)
    assert fields["stream_options"] == {"include_usage": True}


# ------------------------------------------------------------------------------------------------ steps of a session


def test_latencies_and_steps_are_those_of_the_settled_plans() -> None:
    def request(rid: str) -> Request:
        return Request.of(Generate(rid=rid, input_ids=[1, 2, 3], options=RequestOptions()))

    a, b = request("a"), request("b")

    def step(at_s: float, *entries: StepEntry) -> Settled:
        return Settled(at_s, StepPlan(entries))

    steps = [
        step(1.0, StepEntry(a, 0, 3, 1), StepEntry(b, 0, 2, 0)),
        step(1.5, StepEntry(b, 2, 3, 1)),
        step(1.6, StepEntry(a, 3, 4, 1), StepEntry(b, 3, 4, 1)),
        step(1.8, StepEntry(a, 4, 5, 1), StepEntry(b, 4, 5, 1)),
    ]
    answered = Answered(0.5, 1.9, {}, {}, steps)
    ttft, itl = latencies_of(answered, output_tokens=2)
    assert ttft is not None
    assert itl is not None
    assert (ttft.p50, ttft.count) == (pytest.approx(750), 2)
    assert (itl.p50, itl.count) == (pytest.approx(350), 2), "600 ms of a and 100 ms of b; the third tokens are surplus"
    counted = steps_of(answered)
    assert (counted.count, counted.decode_count, counted.decode_s) == (4, 2, pytest.approx(0.3))


# ------------------------------------------------------------------------------------------------ profiles


def test_gaps_are_what_no_interval_covers() -> None:
    activities = [
        Activity("late", 400.0, 50.0, 7),
        Activity("first", 100.0, 50.0, 7),
        Activity("inside", 110.0, 20.0, 7),
        Activity("touching", 150.0, 30.0, 7),
        Activity("soon", 200.0, 80.0, 7),
    ]
    gaps = find_gaps(activities)
    assert (gaps.span_us, gaps.idle_us, gaps.largest_us, gaps.num_over_100_us) == (350.0, 140.0, 120.0, 1)
    assert gaps.after_largest == "late"
    covered = np.zeros(500, dtype=bool)
    for each in activities:
        covered[int(each.start_us) : int(each.start_us + each.duration_us)] = True
    assert gaps.idle_us == (~covered[100:450]).sum()
    alone = find_gaps(activities[:1])
    assert (alone.idle_us, alone.largest_us, alone.span_us) == (0.0, 0.0, 50.0)


def test_kernels_are_summed_by_name_and_the_busiest_stream_is_the_main_one() -> None:
    activities = [Activity("gemm", 10.0 * n, 4.0, 7) for n in range(6)] + [Activity("copy", 3.0, 6.0, 9)] * 2
    assert {each.stream for each in main_stream(activities)} == {7}
    gemm, copy = sum_kernels(activities, 2)
    assert (gemm.name, gemm.calls_per_step, gemm.us_per_call, gemm.us_per_step) == ("gemm", 3.0, 4.0, 12.0)
    assert (copy.name, copy.us_per_step, gemm.share + copy.share) == ("copy", 6.0, pytest.approx(1))


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_a_trace_becomes_a_table(tmp_path: Path, name: str) -> None:
    events: list[dict[str, Any]] = [{"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 9}]
    for number in range(30):
        kernel = f"void kernel{number:02}[x]<" + "t" * 80
        args = {"stream": 7}
        events.append(
            {"ph": "X", "cat": "kernel", "name": kernel, "ts": 200.5 * number, "dur": 30 - number, "args": args}
        )
    content = json.dumps({"traceEvents": events}).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    made = make_profile(tmp_path / name, workload="b1", phase="decode", num_steps=2)
    assert len(made.kernels) == 30
    assert made.gaps is not None
    assert made.gaps.num_over_100_us == 14  # of the second step
    text = text_of(as_table(made))
    for words in ("kernel00[x]<ttt", "kernel24", "5 others", "14 gaps over 100 us", "b1"):
        assert words in text
    assert "kernel25" not in text
    assert len(short_name("void " + "x" * 100)) == 70


# ------------------------------------------------------------------------------------------------ reports and commands


def test_a_report_shows_targets_and_bad_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    b64 = WORKLOADS["b64"]
    rounds = [Round(wall_s=1.0, tokens_per_s=speed, rows=RowCounts(rows=10)) for speed in (2800.0, 2950.0, 3000.0)]
    rows, off = (make_case(b64, name, rounds, OFFLINE_TARGETS) for name in ("rows", "off"))
    assert (rows.best, rows.median, rows.target, rows.is_met) == (3000.0, 2950.0, 2900, True)
    assert make_case(b64, "rows", rounds[:1], OFFLINE_TARGETS).is_met is False
    assert make_case(b64, "rows", rounds, NO_TARGETS).is_met is None
    ratio = make_ratio("offline", rows, off, least=OFFLINE_TARGETS.of_rows("b64", "rows"))
    assert (ratio.ratio, ratio.is_met) == (1.0, True)
    report = SpeedReport(
        command="offline", options={"a": 1}, machine=describe_machine(), cases=[rows, off], ratios=[ratio]
    )
    assert report.is_good
    print_report(report)
    out = capsys.readouterr().out
    for words in ("2,950.0", "3,000.0", "2,900: met", "0 of 30", "ratio at least 0.99: met"):
        assert words in out
    assert "TTFT" not in out, "nothing was measured of it"
    write_report(report, str(tmp_path / "report.json"))
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["machine"]["torch"]
    assert [each["tokens_per_s"] for each in written["cases"][0]["rounds"]] == [2800.0, 2950.0, 3000.0]
    spoilt = msgspec.structs.replace(rounds[0], rows=RowCounts(rows=10, all_zero=3))
    bad = make_case(b64, "rows", [spoilt], NO_TARGETS)
    assert not msgspec.structs.replace(report, cases=[bad]).is_good
    assert not msgspec.structs.replace(report, failures=["b64: no"]).is_good
    with pytest.raises(UsageError, match="--json"):
        write_report(report, str(tmp_path / "nowhere" / "report.json"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["offline"], "--model"),
        (["offline", "--model=/nowhere", "--workload=b2"], "b2"),
        (["online", "--target=openai", "--rows=int32"], "no rows"),
        (["online", "--stream", "--rows=msgpack"], "a stream is JSON"),
        (["online", "--url=http://a", "--", "--device=cpu"], "behind --"),
        (["online", "--workload=,"], "names none"),
        (["online", "--url=localhost:1"], "begins with neither"),
    ],
)
def test_usage_errors_name_the_option(argv: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        command.main(argv)


def test_a_server_that_is_not_there_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["online", "--url=http://127.0.0.1:9", "--workload=1x1x1"]) == 1
    assert "http://127.0.0.1:9/server_info" in capsys.readouterr().err


def test_forms_of_rows() -> None:
    options = online.OnlineOptions()
    assert online.forms_of(options) == ["off", "int32", "msgpack"]
    assert online.forms_of(msgspec.structs.replace(options, stream=True)) == ["off", "int32"]
    assert online.forms_of(msgspec.structs.replace(options, target="openai")) == ["off"]
    assert online.forms_of(msgspec.structs.replace(options, rows="int32")) == ["int32"]


def test_a_way_is_named_by_what_differs() -> None:
    assert offline.Way(True, True).name(with_overlap=False) == "rows"
    assert offline.Way(False, False).name(with_overlap=True) == "off, no overlap"
