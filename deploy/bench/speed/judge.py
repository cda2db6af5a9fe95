"""Reads the raw replies of a round after its clock has stopped: tokens, rows, times of tokens, the server's timings.

A reply that failed, or that has another number of tokens than was asked for, ends the round: its speed would mean
nothing. Rows that are bad are counted instead. Neighbours: `client` (kept the replies), `requests` (what was asked for),
`deploy.replay.check` (counts rows).
"""

import bisect
import itertools
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from deploy.answers import MalformedRowsError, MetaInfo, moe_layers_of, num_expected_rows, read_rows
from deploy.bench.options import BenchError
from deploy.bench.speed.client import Reply
from deploy.bench.speed.requests import Target
from deploy.bench.speed.results import Round, Transfer, spread_of, weighted_median
from deploy.bench.speed.workloads import RowsForm, Workload
from deploy.replay.check import RowCounts, check_rows

_QUOTED_CHARS = 300
_EVENT_END = b"\n\n"


class TimedMeta(MetaInfo, frozen=True, kw_only=True):
    """meta_info with the server's timings, in seconds unless named otherwise; whatever it does not tell is None."""

    e2e_latency: float | None = None
    pd_prefill_forward_duration: float | None = None
    pd_decode_wait_duration: float | None = None
    pd_transfer_duration: float | None = None
    pd_transfer_exposed_duration: float | None = None
    pd_transfer_total_mb: float | None = None
    pd_transfer_speed_gb_s: float | None = None


DURATIONS = (
    "e2e_latency",
    "pd_prefill_forward_duration",
    "pd_decode_wait_duration",
    "pd_transfer_duration",
    "pd_transfer_exposed_duration",
)


class TandemReply(Struct, frozen=True):
    """A reply of /generate."""

    output_ids: list[int]
    meta_info: TimedMeta


class _Progress(Struct, frozen=True):
    """An event of a stream of /generate; its ids are all so far."""

    output_ids: list[int] = []
    error: Any = None


class _Usage(Struct, frozen=True):
    completion_tokens: int


class OpenaiReply(Struct, frozen=True):
    """A reply, or an event, of /v1/completions."""

    choices: list[Any] = []
    usage: _Usage | None = None
    error: Any = None


class Judged(Struct, frozen=True, kw_only=True):
    """What one reply was: its tokens, when it began and ended, when its tokens came if it was a stream."""

    started_s: float
    ended_s: float
    num_tokens: int
    num_bytes: int
    token_times_s: list[float]
    """One for each event that brought tokens; empty if it was no stream."""
    rows: RowCounts | None = None
    meta: TimedMeta | None = None

    @property
    def ttft_s(self) -> float | None:
        """The first token of a stream, or the answer of one token; None if nobody has seen it."""
        if self.token_times_s:
            return self.token_times_s[0] - self.started_s
        return self.ended_s - self.started_s if self.num_tokens == 1 else None

    @property
    def itl_ms(self) -> list[float]:
        """From one event with tokens to the next."""
        times = self.token_times_s
        return [1e3 * (later - earlier) for earlier, later in itertools.pairwise(times)]


def judge_reply(
    reply: Reply, *, target: Target, form: RowsForm, stream: bool, prompt_tokens: int, num_experts: int | None
) -> Judged:
    """Read one reply; `num_experts` bounds the ids of its rows, None if it is not known. Raises BenchError."""
    if reply.failure is not None or reply.status != 200:
        raise BenchError(reply.failure or f"{reply.status}: {_quoted(reply.body)}")
    try:
        whole, times, count = _read(reply, target, form, stream=stream)
    except msgspec.DecodeError as error:
        raise BenchError(f"a reply cannot be read: {error}: {_quoted(reply.body)}") from error
    meta = whole.meta_info if isinstance(whole, TandemReply) else None
    if meta is not None and meta.finish_reason.type == "abort":
        raise BenchError(f"aborted: {meta.finish_reason.message}")
    return Judged(
        started_s=reply.started_s,
        ended_s=reply.ended_s,
        num_tokens=count,
        num_bytes=len(reply.body),
        token_times_s=times,
        rows=None if form == "off" or meta is None else count_reply_rows(meta, prompt_tokens, count, num_experts),
        # Without its rows: a round has hundreds of megabytes of them.
        meta=None if meta is None else msgspec.structs.replace(meta, routed_experts=None),
    )


def count_reply_rows(meta: MetaInfo, prompt_tokens: int, output_tokens: int, num_experts: int | None) -> RowCounts:
    """Count the (position, layer) rows of one reply, the bad ones by their kind. Raises BenchError if they are no rows."""
    num_expected = num_expected_rows(prompt_tokens, output_tokens, meta.routed_experts_start_len)
    try:
        ids_RLK = read_rows(meta)
        if ids_RLK is None:
            return RowCounts(missing=num_expected * len(meta.routed_experts_moe_layer_ids or [0]))
        is_moe_L = moe_layers_of(meta, ids_RLK.shape[1])
    except MalformedRowsError as error:
        raise BenchError(str(error)) from error
    if meta.routed_experts_start_len != 0:
        raise BenchError(f"rows from {meta.routed_experts_start_len} on, but all were asked for")
    return check_rows(ids_RLK, is_moe_L, num_expected=num_expected, num_experts=num_experts)


def make_round(judged: Sequence[Judged], workload: Workload) -> Round:
    """Add the replies of a round up. Raises BenchError if one has another number of tokens than was asked for."""
    for each in judged:
        if each.num_tokens != workload.output_tokens:
            raise BenchError(f"a request was answered with {each.num_tokens} tokens, not {workload.output_tokens}")
    wall_s = max(each.ended_s for each in judged) - min(each.started_s for each in judged)
    rows = [each.rows for each in judged if each.rows is not None]
    metas = [each.meta for each in judged if each.meta is not None]
    return Round(
        wall_s=wall_s,
        tokens_per_s=workload.tokens_per_s(wall_s),
        ttft_ms=spread_of([1e3 * each.ttft_s for each in judged if each.ttft_s is not None]),
        itl_ms=spread_of([gap for each in judged for gap in each.itl_ms]),
        rows=sum(rows, RowCounts()) if rows else None,
        reply_mb=sum(each.num_bytes for each in judged) / 1e6,
        transfer=_transfer(judged),
        timings_ms={
            name: 1e3 * statistics.median(values)
            for name in DURATIONS
            if (values := [value for meta in metas if (value := getattr(meta, name)) is not None])
        },
    )


def _transfer(judged: Sequence[Judged]) -> Transfer | None:
    metas = [each.meta for each in judged if each.meta is not None]
    sizes = [meta.pd_transfer_total_mb for meta in metas if meta.pd_transfer_total_mb is not None]
    if not sizes:
        return None
    speeds = [
        (meta.pd_transfer_speed_gb_s, meta.pd_transfer_total_mb)
        for meta in metas
        if meta.pd_transfer_speed_gb_s is not None and meta.pd_transfer_total_mb is not None
    ]
    exposed = [
        (each.meta.pd_transfer_exposed_duration, each.ttft_s)
        for each in judged
        if each.meta is not None and each.meta.pd_transfer_exposed_duration is not None
    ]
    parts = [exposed_s / ttft_s for exposed_s, ttft_s in exposed if ttft_s]
    return Transfer(
        gb_s=weighted_median([speed for speed, _ in speeds], [size for _, size in speeds]),
        total_mb=sum(sizes),
        exposed_ms=spread_of([1e3 * exposed_s for exposed_s, _ in exposed]),
        exposed_part_of_ttft=statistics.median(parts) if parts else None,
    )


# ------------------------------------------------------------------------------------------------ reading


def _read(
    reply: Reply, target: Target, form: RowsForm, *, stream: bool
) -> tuple[TandemReply | OpenaiReply, list[float], int]:
    """The last or only object of a reply, the times of its tokens, and how many it has."""
    if stream:
        return _read_tandem_stream(reply) if target == "tandem" else _read_openai_stream(reply)
    if target == "openai":
        answer = msgspec.json.decode(reply.body, type=OpenaiReply)
        return answer, [], answer.usage.completion_tokens if answer.usage else 0
    decode = msgspec.msgpack.decode if form == "msgpack" else msgspec.json.decode
    whole = decode(reply.body, type=TandemReply)
    return whole, [], len(whole.output_ids)


def _read_tandem_stream(reply: Reply) -> tuple[TandemReply, list[float], int]:
    times: list[float] = []
    count, last = 0, b""
    for at_s, data in _events(reply):
        progress = msgspec.json.decode(data, type=_Progress)
        _refuse_error(progress.error)
        if len(progress.output_ids) > count:
            count = len(progress.output_ids)
            times.append(at_s)
        last = data
    return msgspec.json.decode(last, type=TandemReply), times, count


def _read_openai_stream(reply: Reply) -> tuple[OpenaiReply, list[float], int]:
    times: list[float] = []
    count, event = 0, OpenaiReply()
    for at_s, data in _events(reply):
        event = msgspec.json.decode(data, type=OpenaiReply)
        _refuse_error(event.error)
        if event.usage is not None:
            count = event.usage.completion_tokens
        if event.choices:
            times.append(at_s)
    return event, times, count


def _events(reply: Reply) -> Iterator[tuple[float, bytes]]:
    """The events of a stream up to `[DONE]`, each with the time at which its last byte came. Raises BenchError."""
    ends = [end for _, end in reply.arrivals]
    begin, body = 0, reply.body
    while (end := body.find(_EVENT_END, begin)) >= 0:
        data = body[begin:end].strip().removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        arrival = bisect.bisect_left(ends, end + len(_EVENT_END))
        if data and not data.startswith(b":"):
            yield reply.arrivals[min(arrival, len(ends) - 1)][0], data
        begin = end + len(_EVENT_END)
    raise BenchError(f"a stream has ended without [DONE]: {_quoted(body[-_QUOTED_CHARS:])}")


def _refuse_error(error: Any) -> None:
    if error is not None:
        raise BenchError(f"a stream has failed: {error}")


def _quoted(body: bytes) -> str:
    return body[:_QUOTED_CHARS].decode(errors="replace")


def judge_all(
    replies: Iterable[Reply],
    *,
    target: Target,
    form: RowsForm,
    stream: bool,
    prompt_tokens: int,
    num_experts: int | None,
) -> list[Judged]:
    """Judge replies one after the other, so that only one is held; raises BenchError with the first failure, at the end.

    All replies are taken first: the processes that hold them must get rid of them.
    """
    judged: list[Judged] = []
    failures: list[BenchError] = []
    for reply in replies:
        try:
            judged.append(
                judge_reply(
                    reply,
                    target=target,
                    form=form,
                    stream=stream,
                    prompt_tokens=prompt_tokens,
                    num_experts=num_experts,
                )
            )
        except BenchError as error:
            failures.append(error)
    if failures:
        total = len(failures) + len(judged)
        raise BenchError(f"{len(failures)} of {total} requests failed, one with: {failures[0]}")
    return judged
