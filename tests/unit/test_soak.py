"""The soak's judgement can fail: whatever a stand-in for the stack does wrong is counted as what it is, and ends in exit code 1."""

import asyncio
import base64
import json
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from common.messages import PageCounts
from deploy.connection import NO_RETRIES, Connection
from deploy.replay.reference import Trace
from deploy.soak.cases import CLEAR_LOGITS, Case, is_clear
from deploy.soak.client import Job, send
from deploy.soak.command import conclude
from deploy.soak.faults import Fault, Faults, Kind
from deploy.soak.judge import Verdict, judge
from deploy.soak.load import Load
from deploy.soak.report import Summary, summarize
from deploy.soak.workers import Holdings, Leftover, Workers, WorkerView
from deploy.stack import StackEvent
from tests.support.processes import until

M, K, E = 2, 3, 8
MOE_LAYERS, NUM_LAYERS = [0, 2], 3
FAILURE = {"message": "the engine has ended", "code": "leg_failed", "leg": "decode", "stage": "engine"}

Spoil = Callable[[dict[str, Any], np.ndarray], np.ndarray]


def make_case(seed: int, prompt_tokens: int, output_tokens: int) -> Case:
    rng = np.random.default_rng(seed)
    order = rng.random((prompt_tokens + output_tokens - 1, M, E)).argsort(axis=2)
    ids = rng.integers(1, 100, prompt_tokens + output_tokens).tolist()
    return Case(ids[:prompt_tokens], ids[prompt_tokens:], order[..., :K])


CASES = [make_case(1, 4, 3), make_case(2, 1, 1), make_case(3, 7, 5)]


def keep(reply: dict[str, Any], rows: np.ndarray) -> np.ndarray:
    return rows


@dataclass
class StandIn:
    """Answers `/generate` in all of the forms, rightly but for what is spoilt."""

    spoil: Spoil = keep
    """Changes each answer and its rows `[R, M, K]`."""
    error: dict[str, Any] | None = None
    """What every request gets instead of an answer; a stream gets it after its first event."""
    is_silent: bool = False
    ends_streams: bool = True
    aborted: list[str] = field(default_factory=list)

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes([web.post("/generate", self.generate), web.post("/abort_request", self.abort)])
        return app

    async def abort(self, request: web.Request) -> web.Response:
        self.aborted.append((await request.json())["rid"])
        return web.json_response({})

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if self.is_silent:
            await asyncio.Event().wait()
        is_list = isinstance(body["rid"], list)
        prompts, sampling = body["input_ids"], body["sampling_params"]
        if not is_list:
            prompts, sampling = [prompts], [sampling]
        as_bytes = "msgpack" in request.headers["Accept"]
        replies = [
            self.reply(prompt, body, as_bytes=as_bytes)
            for prompt, params in zip(prompts, sampling, strict=True)
            for _ in range(params["n"])
        ]
        if body["stream"]:
            return await self.stream(request, replies)
        if self.error is not None:
            return web.json_response({"error": self.error}, status=502)
        whole = replies if is_list or len(replies) > 1 else replies[0]
        if as_bytes:
            return web.Response(body=msgspec.msgpack.encode(whole), content_type="application/msgpack")
        return web.json_response(whole)

    async def stream(self, request: web.Request, replies: list[dict[str, Any]]) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        events: list[dict[str, Any]] = []
        for index, reply in enumerate(replies):
            begun = {**reply["meta_info"], "finish_reason": None}
            events.append({"index": index, "output_ids": reply["output_ids"][:1], "meta_info": begun})
            events.append({"index": index, **reply})
        if self.error is not None:
            events[1:] = [{"error": self.error}]
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        if self.error is None and self.ends_streams:
            text += "data: [DONE]\n\n"
        await response.write(text.encode())
        return response

    def reply(self, prompt: list[int], body: dict[str, Any], *, as_bytes: bool) -> dict[str, Any]:
        case = next(case for case in CASES if case.prompt == prompt)
        start = body["routed_experts_start_len"]
        reply: dict[str, Any] = {"text": "", "output_ids": list(case.output_ids), "meta_info": {}}
        reply["meta_info"] |= {"finish_reason": {"type": "length"}, "prompt_tokens": len(prompt)}
        rows = self.spoil(reply, case.rows[start:].copy())
        layer_ids = MOE_LAYERS
        if body["routed_experts_dtype"] == "int32":
            layer_ids = list(range(NUM_LAYERS))
            rows_RMK, rows = rows, np.zeros((len(rows), NUM_LAYERS, K), dtype=np.int32)
            rows[:, MOE_LAYERS] = rows_RMK
        dtype = "int32" if body["routed_experts_dtype"] == "int32" else "uint8"
        data = rows.astype(dtype).tobytes()
        reply["meta_info"] |= {
            "completion_tokens": len(reply["output_ids"]),
            "routed_experts": data if as_bytes else base64.b64encode(data).decode(),
            "routed_experts_shape": list(rows.shape),
            "routed_experts_dtype": dtype,
            "routed_experts_start_len": start,
            "routed_experts_layer_ids": layer_ids,
            "routed_experts_moe_layer_ids": MOE_LAYERS,
        }
        return reply


@dataclass
class Stage:
    """A stand-in that listens."""

    server: StandIn
    url: str

    async def ask(self, *, is_aborted: bool = False, deadline_s: float = 60.0, **changes: Any) -> Verdict:
        """Send one request, with the third case, and judge what comes."""
        fields: dict[str, Any] = {"rid": "r", "cases": [CASES[2]], "is_list": False, "n": 1, "start": 2}
        job = Job(**(fields | {"form": "msgpack", "dtype": "auto"} | changes))
        async with Connection(self.url, deadline_s=deadline_s, retries=NO_RETRIES) as connection:
            return judge(job, await send(connection, job), is_aborted=is_aborted, at_s=1.0)


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    server = StandIn()
    async with TestServer(server.app()) as running:
        yield Stage(server, str(running.make_url("")).rstrip("/"))


def sum_up(*verdicts: Verdict, leftovers: tuple[Leftover, ...] = (), faults: tuple[Fault, ...] = ()) -> Summary:
    return summarize(verdicts, faults, leftovers, events=[], skipped_faults=0, wall_s=1.0)


# ------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("form", ["json", "msgpack", "stream"])
@pytest.mark.parametrize("dtype", ["int32", "auto"])
@pytest.mark.parametrize(("is_list", "n"), [(False, 1), (False, 2), (True, 1), (True, 2)])
async def test_right_answers_of_every_shape_are_right(
    stage: Stage, form: str, dtype: str, is_list: bool, n: int
) -> None:
    cases = [CASES[2], CASES[0]] if is_list else [CASES[2]]
    verdict = await stage.ask(form=form, dtype=dtype, is_list=is_list, n=n, cases=cases)
    assert (verdict.end, verdict.detail) == ("answered", "")
    num_tokens = sum(len(case.output_ids) for case in cases) * n
    # A stream's first event repeats the first token.
    assert verdict.compared.tokens == num_tokens + (len(cases) * n if form == "stream" else 0)
    assert verdict.compared.rows == sum(len(case.rows) - 2 for case in cases) * n * M
    assert (verdict.compared.wrong_tokens, verdict.compared.wrong_rows) == (0, 0)
    assert conclude(sum_up(verdict)) == 0


def other_expert(reply: dict[str, Any], rows: np.ndarray) -> np.ndarray:
    rows[1, 1, 0] = (rows[1, 1, 0] + 1) % E
    return rows


def other_order(reply: dict[str, Any], rows: np.ndarray) -> np.ndarray:
    rows[1, 1] = rows[1, 1, ::-1]
    return rows


def last_missing(reply: dict[str, Any], rows: np.ndarray) -> np.ndarray:
    return rows[:-1]


def first_repeated(reply: dict[str, Any], rows: np.ndarray) -> np.ndarray:
    return np.concatenate([rows[:1], rows])


def one_layer(reply: dict[str, Any], rows: np.ndarray) -> np.ndarray:
    return np.repeat(rows[:, :, :1], 2, axis=2)


R = len(CASES[2].rows) - 2


@pytest.mark.parametrize("form", ["json", "msgpack", "stream"])
@pytest.mark.parametrize(
    ("spoil", "at_least"), [(other_expert, 1), (other_order, 1), (last_missing, M), (first_repeated, M)]
)
async def test_wrong_rows_are_counted(stage: Stage, form: str, spoil: Spoil, at_least: int) -> None:
    stage.server.spoil = spoil
    verdict = await stage.ask(form=form)
    assert verdict.end == "answered"
    assert at_least <= verdict.compared.wrong_rows <= (R + 1) * M
    assert verdict.compared.wrong_tokens == 0
    summary = sum_up(verdict)
    assert f"{verdict.compared.wrong_rows} wrong rows, 0 wrong tokens" in summary.problems[0]
    assert conclude(summary) == 1


async def test_rows_that_fit_nothing_are_all_wrong(stage: Stage) -> None:
    stage.server.spoil = one_layer
    assert (await stage.ask()).compared.wrong_rows == R * M


async def test_an_expert_in_a_dense_layer_is_a_wrong_row(stage: Stage) -> None:
    job = Job(rid="r", cases=[CASES[0]], is_list=False, n=1, form="json", dtype="int32", start=0)
    async with Connection(stage.url) as connection:
        received = await send(connection, job)
    rows = bytearray(received.replies[0].meta_info.routed_experts or b"")
    rows[K * 4] = 1
    meta = msgspec.structs.replace(received.replies[0].meta_info, routed_experts=bytes(rows))
    spoilt = msgspec.structs.replace(
        received, replies={0: msgspec.structs.replace(received.replies[0], meta_info=meta)}
    )
    assert judge(job, received, is_aborted=False, at_s=1.0).compared.wrong_rows == 0
    assert judge(job, spoilt, is_aborted=False, at_s=1.0).compared.wrong_rows == 1


def other_token(reply: dict[str, Any], rows: np.ndarray) -> np.ndarray:
    reply["output_ids"][-1] ^= 1
    return rows


def token_missing(reply: dict[str, Any], rows: np.ndarray) -> np.ndarray:
    reply["output_ids"].pop()
    return rows[:-1]


def token_too_many(reply: dict[str, Any], rows: np.ndarray) -> np.ndarray:
    reply["output_ids"].append(1)
    return rows


@pytest.mark.parametrize("spoil", [other_token, token_missing, token_too_many])
async def test_a_wrong_token_is_counted(stage: Stage, spoil: Spoil) -> None:
    stage.server.spoil = spoil
    verdict = await stage.ask()
    assert verdict.compared.wrong_tokens == 1
    assert conclude(sum_up(verdict)) == 1


def first_token_wrong(reply: dict[str, Any], rows: np.ndarray) -> np.ndarray:
    reply["output_ids"][0] ^= 1
    return rows


async def test_what_a_stream_said_before_it_failed_is_compared_too(stage: Stage) -> None:
    stage.server.error = FAILURE
    assert (await stage.ask(form="stream")).compared.wrong_tokens == 0
    stage.server.spoil = first_token_wrong
    verdict = await stage.ask(form="stream")
    assert (verdict.end, verdict.compared.tokens, verdict.compared.wrong_tokens) == ("failed", 1, 1)


# ------------------------------------------------------------------------------------------------ ends


@pytest.mark.parametrize("form", ["json", "msgpack", "stream"])
@pytest.mark.parametrize("missing", ["", "leg", "stage"])
async def test_a_failure_must_say_its_leg_and_its_stage(stage: Stage, form: str, missing: str) -> None:
    stage.server.error = FAILURE | ({missing: None} if missing else {})
    verdict = await stage.ask(form=form)
    summary = sum_up(verdict, *[answered()] * 9)
    assert verdict.end == ("unnamed" if missing else "failed")
    assert summary.unnamed == bool(missing)
    assert summary.failed == ({} if missing else {"decode/engine leg_failed": 1})
    assert conclude(summary) == bool(missing)


async def test_an_end_that_is_neither_an_answer_nor_an_error_is_unnamed(stage: Stage) -> None:
    stage.server.ends_streams = False
    verdict = await stage.ask(form="stream")
    assert (verdict.end, verdict.detail) == ("unnamed", "the stream ended with neither [DONE] nor an error")
    assert (await Stage(stage.server, stage.url + "/elsewhere").ask()).end == "unnamed"
    nobody = await Stage(stage.server, "http://127.0.0.1:9").ask()
    assert (nobody.end, conclude(sum_up(nobody))) == ("unnamed", 1)


async def test_a_request_that_does_not_end_is_hung(stage: Stage) -> None:
    stage.server.is_silent = True
    verdict = await stage.ask(deadline_s=0.1)
    summary = sum_up(verdict, *[answered()] * 9)
    assert (verdict.end, summary.hung, conclude(summary)) == ("hung", 1, 1)


def cut_short(reply: dict[str, Any], rows: np.ndarray) -> np.ndarray:
    reply["meta_info"]["finish_reason"] = {"type": "abort"}
    del reply["output_ids"][2:]
    return rows[: len(CASES[2].prompt) + 1 - 2]


async def test_an_answer_may_be_cut_short_only_if_we_asked_for_it(stage: Stage) -> None:
    stage.server.spoil = cut_short
    asked = await stage.ask(is_aborted=True)
    assert (asked.end, asked.compared.tokens, asked.compared.rows) == ("aborted", 2, (len(CASES[2].prompt) - 1) * M)
    assert (asked.compared.wrong_tokens, asked.compared.wrong_rows) == (0, 0)
    unasked = await stage.ask()
    assert (unasked.end, conclude(sum_up(unasked))) == ("unnamed", 1)


def answered() -> Verdict:
    return Verdict(rid="r", end="answered", at_s=1.0, is_ours=False)


def test_most_requests_must_be_answered() -> None:
    failed = Verdict(rid="r", end="failed", at_s=1.0, is_ours=False, cause="decode/engine leg_failed")
    left = Verdict(rid="r", end="left", at_s=1.0, is_ours=True)
    assert conclude(sum_up(*[answered()] * 7, *[failed] * 3, *[left] * 9)) == 0
    assert conclude(sum_up(*[answered()] * 6, *[failed] * 3)) == 1
    assert conclude(sum_up()) == 1


async def test_a_load_of_all_shapes_is_right(stage: Stage) -> None:
    load = Load(stage.url, CASES, seed=1, concurrency=4, deadline_s=60)
    running = asyncio.create_task(load.run())
    await until(lambda: len(load.verdicts) > 200)
    load.stop()
    await running
    assert "answered" in {verdict.end for verdict in load.verdicts} <= {"answered", "left"}
    assert conclude(sum_up(*load.verdicts)) == 0


async def test_a_part_of_the_load_is_aborted_or_left_while_it_waits(stage: Stage) -> None:
    stage.server.is_silent = True
    load = Load(stage.url, CASES, seed=1, concurrency=100, deadline_s=60)
    running = asyncio.create_task(load.run())
    await until(lambda: len(load.verdicts) > 5 and len(stage.server.aborted) > 5)
    running.cancel()
    await asyncio.wait([running])
    assert {(verdict.end, verdict.is_ours) for verdict in load.verdicts} == {("left", True)}


# ------------------------------------------------------------------------------------------------ pages


def holdings(**changes: int) -> Holdings:
    pages = {"total": 10, "free": 8, "cached": 2, "running": 0, "quarantined": 0, "unaccounted": 0}
    held = {"queued_requests": 0, "running_requests": 0, "rooms": 0}
    pages |= {name: number for name, number in changes.items() if name in pages}
    held |= {name: number for name, number in changes.items() if name in held}
    return Holdings(pages=PageCounts(**pages), **held)


def left_by(held: Holdings | None, flushed: Holdings | None, legs: int = 0) -> Leftover:
    return Leftover(name="decode-0", holdings=held, flushed=flushed, outstanding_legs=legs)


FLUSHED = holdings(free=10, cached=0)


@pytest.mark.parametrize(
    ("leftover", "leaked"),
    [
        (left_by(holdings(free=7, unaccounted=1), holdings(free=9, cached=0, unaccounted=1)), 1),
        (left_by(holdings(unaccounted=-1), FLUSHED), 1),
        (left_by(holdings(free=5, quarantined=3), holdings(free=7, cached=0, quarantined=3)), 3),
        (left_by(holdings(), holdings()), 2),
        (left_by(holdings(rooms=1), FLUSHED), 0),
        (left_by(holdings(), FLUSHED, legs=1), 0),
        (left_by(None, None), 0),
    ],
)
def test_what_is_not_given_back_is_found(leftover: Leftover, leaked: int) -> None:
    summary = sum_up(answered(), leftovers=(leftover,))
    assert summary.leaked_pages == {"decode-0": leaked}
    assert summary.unclean_workers == ["decode-0"]
    assert conclude(summary) == 1


def test_what_is_all_given_back_is_good() -> None:
    assert conclude(sum_up(answered(), leftovers=(left_by(holdings(), FLUSHED),))) == 0


def test_the_report_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / "soak.json"
    assert conclude(sum_up(answered(), leftovers=(left_by(holdings(), FLUSHED),)), str(path)) == 0
    assert json.loads(path.read_bytes())["is_good"] is True


# ------------------------------------------------------------------------------------------------ cases


@pytest.mark.parametrize(("gap", "expected"), [(CLEAR_LOGITS / 2, False), (CLEAR_LOGITS * 2, True)])
@pytest.mark.parametrize("place", ["token", "expert", "order"])
def test_a_case_that_rounding_could_decide_is_not_taken(gap: float, expected: bool, place: str) -> None:
    steps = np.arange(E, dtype=np.float32)[::-1]
    logits, router_logits = np.tile(steps, (4, 1)), np.tile(steps, (4, M, 1))
    if place == "token":
        logits[2, 1] = logits[2, 0] - gap
    else:
        rank = K if place == "expert" else 1
        router_logits[0, 1, rank] = router_logits[0, 1, rank - 1] - gap
    assert is_clear(Trace(logits, router_logits, np.zeros((4, M, K), np.int64)), 2) is expected


# ------------------------------------------------------------------------------------------------ faults


class TwoPairs(Workers):
    """The router's account, as a test wants it."""

    def __init__(self) -> None:
        self.names = [f"{role}-{index}" for role in ("prefill", "decode") for index in range(2)]
        self.unhealthy: set[str] = set()

    async def views(self) -> dict[str, WorkerView]:
        return {name: WorkerView(name, name not in self.unhealthy, "closed", 0) for name in self.names}


class Sleepers:
    """A stack of processes that do nothing; who dies is not started again."""

    def __init__(self) -> None:
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        for role in ("prefill", "decode"):
            for index in range(2):
                self.add(f"{role}-{index}")
        self.events: list[object] = []

    def add(self, name: str) -> None:
        self.processes[name] = subprocess.Popen(["sleep", "600"])

    def names(self, role: str) -> list[str]:
        return [name for name in self.processes if name.startswith(role)]

    def pid(self, name: str) -> int:
        return self.processes[name].pid

    def engine_pids(self, name: str) -> list[int]:
        return [self.pid(name)]

    def num_starts(self, name: str) -> int:
        return 1

    async def wait_started(self, name: str, num_starts: int, deadline_s: float) -> None:
        await asyncio.Event().wait()

    def states(self) -> list[str]:
        """Each process's state, as the kernel says it: T is stopped."""
        return [Path(f"/proc/{process.pid}/stat").read_text().split()[2] for process in self.processes.values()]


@pytest.fixture
def sleepers() -> Iterator[Sleepers]:
    sleepers = Sleepers()
    yield sleepers
    for process in sleepers.processes.values():
        process.kill()
        process.wait()


def faults_of(sleepers: Any, kind: Kind, every_s: float, workers: Workers | None = None) -> Faults:
    return Faults(sleepers, workers or TwoPairs(), seed=1, every_s=every_s, kinds=(kind,), otherwise=None)


async def test_two_workers_of_a_role_are_never_struck_together(sleepers: Sleepers) -> None:
    fenced = Kind(name="engine fenced", target="engine", signal=signal.SIGSTOP)
    faults = faults_of(sleepers, fenced, 0.01)
    running = asyncio.create_task(faults.run(10))
    await until(lambda: faults.num_skipped > 5)
    running.cancel()
    await asyncio.wait([running])
    prefill_0, prefill_1, decode_0, decode_1 = (state == "T" for state in sleepers.states())
    assert prefill_0 + prefill_1 == decode_0 + decode_1 == 1


async def test_a_role_with_a_worker_that_does_not_serve_is_let_be(sleepers: Sleepers) -> None:
    workers = TwoPairs()
    workers.unhealthy = {"prefill-0", "decode-1"}
    kill = Kind(name="engine killed", target="engine", signal=signal.SIGKILL)
    faults = faults_of(sleepers, kill, 0.01, workers)
    await faults.run(0.05)
    assert (faults.num_skipped, faults.dealt) == (5, [])
    assert "Z" not in sleepers.states()


async def test_while_both_roles_have_one_that_does_not_serve_the_blow_is_the_router_s(sleepers: Sleepers) -> None:
    sleepers.add("router")
    workers = TwoPairs()
    workers.unhealthy = {"prefill-0", "decode-1"}
    kill = Kind(name="engine killed", target="engine", signal=signal.SIGKILL)
    pause = Kind(name="router paused", target="router", signal=signal.SIGSTOP, stopped_s=(0.01, 0.02))
    faults = Faults(sleepers, workers, seed=1, every_s=0.1, kinds=(kill,), otherwise=pause)  # type: ignore[arg-type]
    await faults.run(0.2)
    assert [(fault.kind, fault.victim) for fault in faults.dealt] == [("router paused", "router")] * 2
    assert not {"T", "Z"} & set(sleepers.states())


async def test_whoever_was_paused_goes_on(sleepers: Sleepers) -> None:
    pause = Kind(name="engine paused", target="engine", signal=signal.SIGSTOP, stopped_s=(0.01, 0.02))
    faults = faults_of(sleepers, pause, 0.05)
    await faults.run(0.2)
    assert [fault.kind for fault in faults.dealt] == ["engine paused"] * 4
    assert all(fault.serving_s is not None and not fault.ends_worker for fault in faults.dealt)
    assert "T" not in sleepers.states()


def test_a_worker_that_does_not_come_back_is_a_failure() -> None:
    fault = Fault(at=1.0, kind="engine killed", victim="decode-0", ends_worker=True)
    summary = sum_up(answered(), faults=(fault,))
    assert (summary.unrecovered, conclude(summary)) == (1, 1)


def test_an_end_that_no_fault_explains_is_shown() -> None:
    fault = Fault(at=1.0, kind="engine killed", victim="decode-0", ends_worker=True, ready_s=5.0, serving_s=6.0)
    pause = Fault(at=1.0, kind="engine paused", victim="decode-1", ends_worker=False, serving_s=6.0)
    ends = [(2.0, "decode-0"), (0.5, "decode-0"), (7.0, "decode-0"), (2.0, "prefill-0"), (2.0, "decode-1")]
    events = [StackEvent(at, name, "ended", f"{name} at {at}") for at, name in ends]
    summary = summarize([answered()], [fault, pause], [], events=events, skipped_faults=0, wall_s=1.0)
    assert summary.problems == ["decode-0 at 0.5", "decode-0 at 7.0", "prefill-0 at 2.0", "decode-1 at 2.0"]
    assert summary.unexplained_ends == 4
