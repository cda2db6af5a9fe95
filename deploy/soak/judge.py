"""What became of one request: its end, and how many of its tokens and rows are not the reference's.

    answered   200, every answer whole
    aborted    200, cut short because we asked for it
    failed     an error that names its leg and its stage
    unnamed    any other end, which is a defect
    hung       no end within the client's deadline, which is one too

Rows and tokens are compared in all that came, also in the events of a stream that failed later. A row here is one position
in one layer. Neighbours: `client` (what came), `report` (the sums).
"""

from typing import Literal

import numpy as np
from msgspec import Struct

from common.messages import ErrorReport
from deploy.answers import MalformedRowsError, WireReply, moe_layers_of, num_expected_rows, read_rows
from deploy.soak.cases import Case
from deploy.soak.client import Job, Received

End = Literal["answered", "aborted", "left", "failed", "unnamed", "hung"]


class Compared(Struct, frozen=True, kw_only=True):
    """Counts; what is missing and what is too much are wrong as well."""

    tokens: int = 0
    wrong_tokens: int = 0
    rows: int = 0
    wrong_rows: int = 0

    def __add__(self, other: "Compared") -> "Compared":
        return Compared(**{name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__})


class Verdict(Struct, frozen=True, kw_only=True):
    """What is known of one request. `at_s`, its end, is counted from the beginning of the load.

    `is_ours` says that we asked for its end, by an abort or by leaving, whatever came of that.
    """

    rid: str
    end: End
    at_s: float
    is_ours: bool
    compared: Compared = Compared()
    cause: str = ""
    """Of a failure: `leg/stage code`."""
    detail: str = ""


def judge(job: Job, received: Received, *, is_aborted: bool, at_s: float) -> Verdict:
    """Give the verdict on one request; `is_aborted` if its end was asked for."""
    expected = job.expected
    compared = Compared()
    for index, token_ids in received.progress:
        compared += _compare_tokens(expected[index].output_ids, token_ids, is_whole=False)
    for index, reply in received.replies.items():
        compared += compare(expected[index], reply, job.start)
    end, cause, detail = _end_of(received, len(expected), is_aborted)
    return Verdict(rid=job.rid, end=end, at_s=at_s, is_ours=is_aborted, compared=compared, cause=cause, detail=detail)


def compare(case: Case, reply: WireReply, start: int) -> Compared:
    """Compare one answer; one that was aborted may be a beginning of the right one, with its rows or, if empty, without."""
    is_cut = reply.meta_info.finish_reason.type == "abort"
    tokens = _compare_tokens(case.output_ids, reply.output_ids, is_whole=not is_cut)
    if is_cut and not reply.output_ids and reply.meta_info.routed_experts is None:
        return tokens
    return tokens + _compare_rows(case, reply, start)


def _compare_tokens(right: list[int], got: list[int], *, is_whole: bool) -> Compared:
    num_wrong = sum(ours != theirs for ours, theirs in zip(got, right, strict=False))
    num_wrong += max(0, len(got) - len(right))
    if is_whole:
        num_wrong += max(0, len(right) - len(got))
    return Compared(tokens=len(got), wrong_tokens=num_wrong)


def _compare_rows(case: Case, reply: WireReply, start: int) -> Compared:
    num_expected = num_expected_rows(len(case.prompt), len(reply.output_ids), start)
    right_RMK = case.rows[start : start + num_expected]
    num_layers = case.rows.shape[1]
    try:
        got_RLK = read_rows(reply.meta_info)
        if got_RLK is None or reply.meta_info.routed_experts_start_len != start:
            raise MalformedRowsError("there are none, or they begin elsewhere")
        is_moe_L = moe_layers_of(reply.meta_info, got_RLK.shape[1])
        if (int(is_moe_L.sum()), got_RLK.shape[2]) != right_RMK.shape[1:]:
            raise MalformedRowsError("their layers or their top-k are not the model's")
    except MalformedRowsError:
        return Compared(wrong_rows=max(1, num_expected * num_layers))
    num_common = min(len(got_RLK), len(right_RMK))
    right_RLK = np.zeros_like(got_RLK[:num_common])
    right_RLK[:, is_moe_L] = right_RMK[:num_common]
    num_differ = int((got_RLK[:num_common] != right_RLK).any(axis=-1).sum())
    num_too_many_or_few = abs(len(got_RLK) - num_expected) * num_layers
    return Compared(rows=len(got_RLK) * num_layers, wrong_rows=num_differ + num_too_many_or_few)


def _end_of(received: Received, num_expected: int, is_aborted: bool) -> tuple[End, str, str]:
    """Name the end, its cause and what is to be said of it."""
    if received.is_hung:
        return "hung", "", "no end within the client's deadline"
    if received.error is not None:
        error = received.error
        cause = f"{error.leg or '?'}/{error.stage or '?'} {error.code}"
        return ("failed" if is_named(error) else "unnamed"), cause, error.message
    if received.breach:
        return "unnamed", "", received.breach
    if len(received.replies) != num_expected:
        return "unnamed", "", f"{len(received.replies)} of {num_expected} answers"
    if any(reply.meta_info.finish_reason.type == "abort" for reply in received.replies.values()):
        return ("aborted", "", "") if is_aborted else ("unnamed", "", "aborted, and nobody asked for it")
    return "answered", "", ""


def is_named(error: ErrorReport) -> bool:
    """Whether an error says which leg failed, and in which stage."""
    return bool(error.leg and error.stage)
