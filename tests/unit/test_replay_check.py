"""The user's check can fail: each kind of bad row is found and told apart, and the exit code follows."""

from typing import Any

import numpy as np
import pytest

from common.messages import FinishReason
from deploy.answers import (
    Answer,
    MalformedRowsError,
    MetaInfo,
    WireReply,
    decode_replies,
    moe_layers_of,
    num_expected_rows,
    read_rows,
)
from deploy.replay.check import RowCounts, check_rows
from deploy.replay.client import Outcome
from deploy.replay.judge import Judge
from deploy.replay.report import Summary, as_table, problem_lines, summarize
from deploy.replay.workload import Sample

NUM_EXPERTS = 8
PROMPT = [3, 1, 4, 1]
OUTPUT = [5, 9, 2]
R, L, K = len(PROMPT) + len(OUTPUT) - 1, 2, 3


def good_rows() -> np.ndarray:
    """`[R, L, K]`, no row zero, no expert twice."""
    first = np.arange(R * L).reshape(R, L, 1) % NUM_EXPERTS
    return (first + np.array([1, 2, 4])) % NUM_EXPERTS


def meta_of(rows: np.ndarray | None, **changes) -> MetaInfo:
    fields: dict[str, Any] = {
        "finish_reason": FinishReason(type="length"),
        "prompt_tokens": len(PROMPT),
        "completion_tokens": len(OUTPUT),
        "routed_experts_layer_ids": [0, 2],
        "routed_experts_moe_layer_ids": [0, 2],
    }
    if rows is not None:
        fields |= {
            "routed_experts": rows.astype("<u1").tobytes(),
            "routed_experts_shape": rows.shape,
            "routed_experts_dtype": "uint8",
        }
    return MetaInfo(**(fields | changes))


def summary_of(meta: MetaInfo, *, output=OUTPUT, num_experts: int | None = NUM_EXPERTS, failure=None) -> Summary:
    sample = Sample(line=1, input_ids=PROMPT, max_new_tokens=len(OUTPUT))
    reply = None if failure else WireReply("text", list(output), meta)
    outcome = Outcome(sample=sample, reply=reply, failure=failure, latency_s=0.25)
    verdict = Judge(rows=True, greedy=True, num_experts=num_experts).judge(outcome)
    return summarize([verdict], 0.5, rows=True, range_checked=num_experts is not None, reference=False)


def test_good_rows_are_good() -> None:
    summary = summary_of(meta_of(good_rows()))
    assert summary.rows == RowCounts(rows=R * L)
    assert summary.is_good
    assert summary.problems == []
    assert (summary.output_tokens_per_s, summary.latency_p99_s) == (len(OUTPUT) / 0.5, 0.25)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ([0, 0, 0], "all_zero"),
        ([1, 5, 1], "duplicated"),
        ([1, 2, NUM_EXPERTS], "out_of_range"),
        ([9, 9, 1], "out_of_range"),
    ],
)
def test_a_single_bad_row_is_found_and_counted_once(row: list[int], kind: str) -> None:
    rows = good_rows()
    rows[4, 1] = row
    summary = summary_of(meta_of(rows))
    assert summary.rows == RowCounts(rows=R * L, **{kind: 1})
    assert summary.bad_rows == 1
    assert not summary.is_good
    assert summary.problems == ["line 1: 1 bad rows"]


def test_missing_rows_are_found() -> None:
    summary = summary_of(meta_of(good_rows()[:-2]))
    assert summary.rows == RowCounts(rows=(R - 2) * L, missing=2 * L)
    assert not summary.is_good


def test_a_reply_without_rows_misses_them_all() -> None:
    summary = summary_of(meta_of(None))
    assert summary.rows == RowCounts(missing=R * L)
    assert not summary.is_good


def test_more_rows_than_tokens_are_bad_too() -> None:
    summary = summary_of(meta_of(np.concatenate([good_rows(), good_rows()[:1]])))
    assert summary.rows == RowCounts(rows=(R + 1) * L, surplus=L)
    assert not summary.is_good


def test_dense_layers_are_zero_and_not_counted() -> None:
    all_layers = np.zeros((R, 3, K), dtype=np.int32)
    all_layers[:, [0, 2]] = good_rows()
    form = {
        "routed_experts_dtype": "int32",
        "routed_experts_layer_ids": [0, 1, 2],
        "routed_experts_moe_layer_ids": [0, 2],
    }
    assert summary_of(meta_of(all_layers, **form, routed_experts=all_layers.tobytes())).rows == RowCounts(rows=R * L)
    all_layers[3, 1, 0] = 1
    summary = summary_of(meta_of(all_layers, **form, routed_experts=all_layers.tobytes()))
    assert summary.rows == RowCounts(rows=R * L, out_of_range=1)


def test_a_negative_id_is_out_of_range_even_without_the_number_of_experts() -> None:
    rows = good_rows().astype(np.int32)
    rows[0, 0, 0] = -1
    summary = summary_of(meta_of(rows, routed_experts=rows.tobytes(), routed_experts_dtype="int32"), num_experts=None)
    assert summary.rows == RowCounts(rows=R * L, out_of_range=1)
    assert not summary.range_checked


def test_expert_0_alone_is_a_row_like_any_other() -> None:
    counts = check_rows(np.zeros((2, 1, 1)), np.array([True]), num_expected=2, num_experts=4)
    assert counts == RowCounts(rows=2)


@pytest.mark.parametrize(
    "changes",
    [
        {"routed_experts": b"123"},
        {"routed_experts_shape": None},
        {"routed_experts_shape": (R, L + 1, K)},
        {"routed_experts_dtype": "uint16"},
        {"routed_experts_dtype": "float32"},
        {"routed_experts_layer_ids": None},
        {"routed_experts_layer_ids": [0, 1, 2]},
        {"routed_experts_layer_ids": [0, 0]},
        {"routed_experts_moe_layer_ids": [0, 1]},
        {"completion_tokens": 2},
        {"prompt_tokens": 5},
        {"routed_experts_start_len": 1},
    ],
)
def test_a_reply_that_contradicts_itself_is_a_failed_request(changes: dict[str, object]) -> None:
    summary = summary_of(meta_of(good_rows(), **changes))
    assert summary.failed_requests == 1
    assert not summary.is_good


def test_a_failed_request_is_bad() -> None:
    summary = summary_of(meta_of(None), failure="502: the prefill leg failed")
    assert (summary.failed_requests, summary.is_good) == (1, False)
    assert problem_lines(summary) == ["line 1: 502: the prefill leg failed"]
    assert as_table(summary).row_count > 0


@pytest.mark.parametrize(
    ("prompt", "output", "start", "expected"), [(4, 3, 0, 6), (4, 3, 4, 2), (1, 0, 0, 0), (4, 0, 4, 0)]
)
def test_the_last_token_has_no_row(prompt: int, output: int, start: int, expected: int) -> None:
    assert num_expected_rows(prompt, output, start) == expected


def test_json_replies_carry_the_rows_as_base64() -> None:
    body = (
        b'{"text": "", "output_ids": [1], "meta_info": {"finish_reason": {"type": "stop", "matched": 1},'
        b' "prompt_tokens": 1, "completion_tokens": 1, "routed_experts": "AQID", "routed_experts_shape": [1, 1, 3],'
        b' "routed_experts_dtype": "uint8", "extra": [1]}}'
    )
    [reply] = decode_replies(Answer(body, "application/json"))
    rows = read_rows(reply.meta_info)
    assert rows is not None
    assert rows.tolist() == [[[1, 2, 3]]]


def test_the_layer_axis_must_be_named() -> None:
    with pytest.raises(MalformedRowsError):
        moe_layers_of(meta_of(None), 3)
    assert moe_layers_of(meta_of(None), 2).tolist() == [True, True]
