"""Memory, updates meanwhile, and profiles, over an engine that the test plays: what it is told, and what is answered."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from common.config import EngineOptions
from common.messages import ErrorReport, FrontendToEngine, Generate, GetStats
from common.orders import (
    AwaitIdle,
    CheckWeights,
    Continue,
    Done,
    LoadWeights,
    Order,
    Pause,
    ReleaseMemory,
    ResumeMemory,
    StartProfile,
    StopProfile,
    WarmUp,
)
from tests.support.processes import until
from tests.support.scripted_worker import STATS, ScriptedEngine, Worker, scripted_worker

RELEASE, RESUME = "/release_memory_occupation", "/resume_memory_occupation"
OUR_ORDERS = AwaitIdle | ReleaseMemory | ResumeMemory | WarmUp | LoadWeights | StartProfile | StopProfile
WORDS = [5, 6]


class Played:
    """Each engine answers every order as `errors` say, by the type of the order; keeps what it was told of ours."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.told: list[list[Order]] = [[] for _ in worker.engines]
        self.errors: dict[type, list[str | None]] = {}
        """One for each group."""
        self.num_left: dict[type, int] = {}
        self.hangs: type | None = None
        """Orders of this type are not answered."""
        self.are_held = [False for _ in worker.engines]
        for group, engine in enumerate(worker.engines):
            self._play(group, engine)

    def _play(self, group: int, engine: ScriptedEngine) -> None:
        def on_message(message: FrontendToEngine) -> None:
            if isinstance(message, GetStats):
                engine.answer(replace(STATS, serial=message.serial))
            elif isinstance(message, Order):
                kind = type(message)
                if isinstance(message, Pause | Continue):
                    self.are_held[group] = isinstance(message, Pause)
                if isinstance(message, OUR_ORDERS):
                    self.told[group].append(message)
                if kind is not self.hangs:
                    error = self.errors.get(kind, [None] * len(self.told))[group]
                    engine.answer(Done(serial=message.serial, error=error, num_left=self.num_left.get(kind, 0)))

        engine.on_message = on_message

    def kinds_told(self) -> list[str]:
        """What every group was told since the last call: the same."""
        names = [[_name(order) for order in told] for told in self.told]
        assert all(told == names[0] for told in names)
        self.told[:] = [[] for _ in self.told]
        for group, engine in enumerate(self.worker.engines):
            self._play(group, engine)
        return names[0]

    async def pause(self) -> None:
        assert (await self.worker.post("/pause_generation"))[0] == 200

    async def state(self) -> tuple[int, str, list[str], int]:
        """What /health and /server_info say, and what a request is answered if it is refused."""
        status, health = await self.worker.get("/health")
        _, info = await self.worker.get("/server_info")
        refused = 0
        if status != 200:
            refused, answer = await self.worker.post(input_ids=[1, 2])
            assert answer["error"]["code"] == "memory_released"
        return status, health["status"], info["memory_released"], refused


def _name(order: Order) -> str:
    match order:
        case ReleaseMemory() | ResumeMemory():
            return f"{type(order).__name__}({', '.join(order.kinds)})"
        case _:
            return type(order).__name__


@asynccontextmanager
async def played(**options: Any) -> AsyncIterator[Played]:
    async with scripted_worker("aggregated", options=EngineOptions(dp=2, **options)) as worker:
        yield Played(worker)


@asynccontextmanager
async def asked(worker: Worker) -> AsyncIterator[Generate]:
    """A request that the first engine has; it is finished, and answered well."""
    asking = asyncio.create_task(worker.post(input_ids=[1, 2], data_parallel_rank=0))
    while not isinstance(request := await worker.engine.next(), Generate):
        pass
    yield request
    worker.engine.finish(request, WORDS)
    assert (await asking)[0] == 200


@pytest.mark.parametrize(
    "body", [{}, {"tags": None}, {"tags": ["kv_cache", "weights"]}, {"tags": ["weights", "kv_cache", "cuda_graph"]}]
)
async def test_all_memory_goes_and_comes(body: dict[str, Any]):
    async with played() as engine:
        await engine.pause()
        status, answer = await engine.worker.post(RELEASE, **body)
        assert (status, answer["success"]) == (200, True)
        assert engine.kinds_told() == ["AwaitIdle", "ReleaseMemory(weights, kv_cache)"]
        assert await engine.state() == (503, "released", ["weights", "kv_cache"], 503)
        assert (await engine.worker.post(RELEASE, **body))[0] == 200
        assert engine.kinds_told() == []
        status, answer = await engine.worker.post(RESUME, **body)
        assert (status, answer["success"]) == (200, True)
        assert engine.kinds_told() == ["ResumeMemory(weights, kv_cache)", "WarmUp"]
        assert await engine.state() == (200, "ok", [], 0)
        assert (await engine.worker.post(RESUME, **body))[0] == 200
        assert engine.kinds_told() == []


async def test_kinds_go_and_come_by_themselves():
    async with played() as engine:
        await engine.pause()
        assert (await engine.worker.post(RELEASE, tags=["cuda_graph"]))[0] == 200
        assert engine.kinds_told() == []
        assert (await engine.worker.post(RELEASE, tags=["kv_cache"]))[0] == 200
        assert engine.kinds_told() == ["AwaitIdle", "ReleaseMemory(kv_cache)"]
        assert (await engine.worker.post(RELEASE))[0] == 200
        assert engine.kinds_told() == ["AwaitIdle", "ReleaseMemory(weights)"]
        assert await engine.state() == (503, "released", ["kv_cache", "weights"], 503)
        assert (await engine.worker.post(RESUME, tags=["weights"]))[0] == 200
        assert engine.kinds_told() == ["ResumeMemory(weights)"], "what steps need comes with the last kind"
        assert await engine.state() == (503, "released", ["kv_cache"], 503)
        assert (await engine.worker.post(RESUME))[0] == 200
        assert engine.kinds_told() == ["ResumeMemory(kv_cache)", "WarmUp"]
        assert await engine.state() == (200, "ok", [], 0)


async def test_a_tag_that_is_not_known_is_named():
    async with played() as engine:
        await engine.pause()
        for path in (RELEASE, RESUME):
            status, answer = await engine.worker.post(path, tags=["weights", "what"])
            assert (status, answer["success"]) == (400, False)
            assert answer["message"].startswith("tags: 'what'")
            assert (await engine.worker.post(path, tags="weights"))[0] == 400
        assert engine.kinds_told() == []


async def test_an_idle_worker_needs_no_pause():
    async with played() as engine:
        assert (await engine.worker.post(RELEASE))[0] == 200
        assert engine.kinds_told() == ["AwaitIdle", "ReleaseMemory(weights, kv_cache)"]
        assert await engine.state() == (503, "released", ["weights", "kv_cache"], 503)
        status, answer = await engine.worker.get("/health_generate")
        assert (status, answer["error"]["code"]) == (503, "memory_released")
        assert (await engine.worker.post(RESUME))[0] == 200
        async with asked(engine.worker):
            pass


async def test_of_a_busy_worker_nothing_is_released_and_it_goes_on():
    """Nobody has told its requests to end, so nobody waits for it."""
    async with played() as engine:
        async with asked(engine.worker):
            status, answer = await engine.worker.post(RELEASE)
            assert (status, answer["error"]["code"]) == (400, "memory_refused")
            assert "pause generation with mode abort or retract" in answer["message"]
            assert engine.kinds_told() == []
            assert await engine.state() == (200, "ok", [], 0)
        assert (await engine.worker.post(RELEASE))[0] == 200


async def test_requests_that_a_pause_has_ended_are_waited_for():
    async with played() as engine:
        async with asked(engine.worker):
            await engine.pause()
            assert (await engine.worker.post(RELEASE))[0] == 200
        assert engine.kinds_told() == ["AwaitIdle", "ReleaseMemory(weights, kv_cache)"]


@pytest.mark.parametrize("tags", [None, ["kv_cache"], ["cuda_graph"], []])
async def test_a_worker_may_keep_its_memory_for_itself(tags: list[str] | None):
    for is_enabled in (True, False):
        async with played(enable_memory_saver=is_enabled) as engine:
            assert (await engine.worker.get("/server_info"))[1]["enable_memory_saver"] is is_enabled
            status, answer = await engine.worker.post(RELEASE, tags=tags)
            if not is_enabled:
                assert (status, answer["error"]["code"]) == (400, "memory_refused")
                assert "--enable-memory-saver" in answer["message"]
                assert engine.kinds_told() == []
                assert await engine.state() == (200, "ok", [], 0)
            else:
                assert status == 200
            assert (await engine.worker.post(RESUME, tags=tags))[0] == 200


@pytest.mark.parametrize("when", ["before", "between"])
async def test_a_pause_outlives_the_release(when: str):
    """And neither it nor its end is kept from a worker whose memory is away."""
    async with played() as engine:

        async def is_paused() -> bool:
            return bool((await engine.worker.get("/server_info"))[1]["paused"])

        if when == "before":
            await engine.pause()
        assert (await engine.worker.post(RELEASE))[0] == 200
        await engine.pause()
        assert await is_paused()
        assert (await engine.worker.post(RESUME))[0] == 200
        assert await is_paused()
        assert (await engine.worker.post(RELEASE))[0] == 200
        assert (await engine.worker.post("/continue_generation"))[0] == 200
        assert not await is_paused()
        assert (await engine.worker.post(RESUME))[0] == 200
        async with asked(engine.worker):
            pass


async def test_while_requests_are_open_nothing_is_released():
    """Of any group."""
    async with played() as engine:
        await engine.pause()
        engine.errors[AwaitIdle] = [None, "requests are open"]
        status, answer = await engine.worker.post(RELEASE)
        assert (status, answer["error"]["code"]) == (400, "memory_refused")
        assert "abort or retract" in answer["message"]
        assert engine.kinds_told() == ["AwaitIdle"]
        assert await engine.state() == (200, "ok", [], 0)


async def test_nobody_comes_in_while_the_open_requests_end():
    async with played() as engine:
        await engine.pause()
        engine.hangs = AwaitIdle
        releasing = asyncio.create_task(engine.worker.post(RELEASE))
        await until(lambda: any(engine.told[0]))
        assert (await engine.worker.post(input_ids=[1, 2]))[0] == 503
        assert (await engine.worker.post(RESUME))[0] == 409, "one after the other"
        for group, scripted in enumerate(engine.worker.engines):
            scripted.answer(Done(serial=engine.told[group][0].serial))
        assert (await releasing)[0] == 200


@pytest.mark.parametrize("kind", [ReleaseMemory, ResumeMemory, WarmUp])
async def test_after_a_failure_it_counts_as_released_until_it_is_resumed(kind: type):
    async with played() as engine:
        await engine.pause()
        engine.errors[kind] = [None, "rank 1: no room"]
        statuses = [(await engine.worker.post(path))[0] for path in (RELEASE, RESUME)]
        assert statuses == ([503, 200] if kind is ReleaseMemory else [200, 503])
        if kind is not ReleaseMemory:
            assert await engine.state() == (503, "released", ["weights", "kv_cache"], 503)
            engine.errors.clear()
            engine.kinds_told()
            assert (await engine.worker.post(RESUME))[0] == 200
            assert engine.kinds_told() == ["ResumeMemory(weights, kv_cache)", "WarmUp"]
        assert await engine.state() == (200, "ok", [], 0)


async def test_generation_continues_whatever_the_memory_does():
    async with played() as engine:
        await engine.pause()
        assert (await engine.worker.post(RELEASE))[0] == 200
        engine.hangs = WarmUp
        resuming = asyncio.create_task(engine.worker.post(RESUME))
        await until(lambda: all(isinstance(told[-1], WarmUp) for told in engine.told))
        assert engine.are_held == [True, True]
        assert (await engine.worker.post("/continue_generation"))[0] == 200
        assert engine.are_held == [False, False]
        for told, groups_engine in zip(engine.told, engine.worker.engines, strict=True):
            groups_engine.answer(Done(serial=told[-1].serial))
        assert (await resuming)[0] == 200
        assert engine.are_held == [False, False]


async def test_what_is_away_is_said_when_some_of_it_is_back():
    async with played() as engine:
        assert (await engine.worker.post(RELEASE))[0] == 200
        assert (await engine.worker.post(RESUME, tags=["weights"]))[0] == 200
        _, health = await engine.worker.get("/health")
        assert health["reason"] == "memory is released: kv_cache"


async def test_weights_may_be_away_or_broken_or_both():
    """Each is mended by itself."""
    async with played() as engine:
        await engine.pause()
        assert (await engine.worker.post(RELEASE))[0] == 200
        report = ErrorReport(status=503, message="half of them are new", code="weights_broken")
        engine.worker.engine_client.break_down(report)
        assert (await engine.worker.post(RESUME))[0] == 200
        assert (await engine.worker.get("/health"))[0] == 503
        status, answer = await engine.worker.post(input_ids=[1, 2])
        assert (status, answer["error"]["code"]) == (503, "weights_broken")
        engine.worker.engine_client.mend()
        assert (await engine.worker.get("/health"))[0] == 200
        assert (await engine.worker.post(RELEASE))[0] == 200
        engine.worker.engine_client.mend()
        assert await engine.state() == (503, "released", ["weights", "kv_cache"], 503)


# ------------------------------------------------------------------------------------------------ updates in parts


async def update(engine: Played) -> tuple[int, Any]:
    """Send some of the tensors."""
    part: dict[str, Any] = {"names": ["n"], "dtypes": ["bfloat16"], "shapes": [[2]], "group_name": "g"}
    return await engine.worker.post("/update_weights_from_distributed", **part)


async def begin(engine: Played, **body: Any) -> tuple[int, Any]:
    return await engine.worker.post("/begin_weight_update", **body)


async def end(engine: Played) -> tuple[int, Any]:
    return await engine.worker.post("/end_weight_update")


async def test_parts_are_taken_while_no_request_can_come_in():
    async with played() as engine:
        engine.num_left = {CheckWeights: 3}

        async def check_refused(words: str) -> None:
            for status, answer in (await begin(engine, selector="all"), await update(engine)):
                assert (status, answer["success"], answer["error"]["code"]) == (400, False, "weights_refused")
                assert words in answer["message"]

        async def check_taken() -> None:
            for status, answer in (await begin(engine, selector="all"), await update(engine), await end(engine)):
                assert (status, answer["success"]) == (200, True), answer

        await check_refused("pause generation")
        assert (await engine.worker.post(RELEASE, tags=["kv_cache"]))[0] == 200
        await check_taken()
        await check_taken()
        assert (await engine.worker.post(RESUME))[0] == 200
        await check_refused("pause generation")
        await engine.pause()
        await check_taken()
        assert (await engine.worker.post(RELEASE))[0] == 200
        engine.errors[CheckWeights] = ["the weights' memory is released; resume it first"] * 2  # a rank knows best
        await check_refused("the weights' memory is released; resume it first")
        assert (await engine.worker.post(RESUME, tags=["weights"]))[0] == 200
        engine.errors.clear()
        await check_taken()


async def test_an_update_ends_well_when_no_tensor_is_in_doubt():
    async with played() as engine:
        assert (await engine.worker.post(RELEASE, tags=["kv_cache"]))[0] == 200
        engine.errors[LoadWeights] = [None, "rank 1: gone"]
        assert (await update(engine))[0] == 503
        assert (await begin(engine))[0] == 200, "they can be mended"
        status, answer = await end(engine)
        assert (status, answer["success"], answer["error"]["code"]) == (503, False, "weights_broken")
        assert "rank 1: gone" in answer["message"]
        engine.errors.clear()
        engine.num_left = {LoadWeights: 2}
        assert (await update(engine))[0] == 200
        status, answer = await end(engine)
        assert (status, answer["success"]) == (503, False)
        assert "2 of the model's tensors are in doubt" in answer["message"]
        engine.num_left = {}
        assert (await update(engine))[0] == 200
        assert (await end(engine))[0] == 200


@pytest.mark.parametrize("selector", ["draft", "", 1])
async def test_what_an_update_is_of_is_everything(selector: object):
    async with played() as engine:
        await engine.pause()
        status, answer = await begin(engine, selector=selector)
        assert (status, answer["success"], answer["error"]["code"]) == (400, False, "invalid_request")
        assert answer["message"].startswith("selector: ")
        assert (await begin(engine, selector=None))[0] == 200


async def test_while_a_part_is_taken_the_update_neither_begins_nor_ends():
    async with played() as engine:
        await engine.pause()
        engine.hangs = LoadWeights
        updating = asyncio.create_task(update(engine))
        await until(lambda: any(engine.told[1]))
        assert [(await begin(engine))[0], (await end(engine))[0]] == [409, 409]
        for group, scripted in enumerate(engine.worker.engines):
            scripted.answer(Done(serial=engine.told[group][-1].serial))
        assert (await updating)[0] == 200
        assert (await end(engine))[0] == 200


# ------------------------------------------------------------------------------------------------ profiles


async def test_a_profile_goes_where_it_should(tmp_path: Path):
    async with played(profile_folder=str(tmp_path / "default")) as engine:
        assert (await engine.worker.post("/start_profile"))[0] == 200
        assert engine.told[1] == [
            StartProfile(
                serial=engine.told[1][0].serial,
                folder=str(tmp_path / "default"),
                kind="aggregated",
                activities=("CPU", "GPU"),
            )
        ]
        assert (await engine.worker.post("/stop_profile"))[0] == 200
        assert engine.kinds_told() == ["StartProfile", "StopProfile"]
        body: dict[str, Any] = {"output_dir": str(tmp_path / "named"), "num_steps": 3, "activities": ["GPU"]}
        assert (await engine.worker.post("/start_profile", **body))[0] == 200
        assert engine.told[0] == [
            StartProfile(
                serial=engine.told[0][0].serial,
                folder=str(tmp_path / "named"),
                kind="aggregated",
                activities=("GPU",),
                num_steps=3,
            )
        ]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"output_dir": "/proc/nowhere"}, "output_dir"),
        ({"output_dir": "a\0b"}, "output_dir"),
        ({"num_steps": 0}, "num_steps"),
        ({"activities": ["MEM"]}, "activities"),
        ({"activities": []}, "activities"),
    ],
)
async def test_what_cannot_be_recorded_is_named(tmp_path: Path, body: dict[str, Any], named: str):
    async with played(profile_folder=str(tmp_path)) as engine:
        status, answer = await engine.worker.post("/start_profile", **body)
        assert (status, answer["error"]["code"]) == (400, "invalid_request")
        assert answer["error"]["message"].startswith(named)
        assert engine.kinds_told() == []


async def test_what_a_rank_refuses_is_said(tmp_path: Path):
    async with played(profile_folder=str(tmp_path)) as engine:
        engine.errors = {StartProfile: [None, "rank 1: already"], StopProfile: ["none", None]}
        for path, message in (("/start_profile", "rank 1: already"), ("/stop_profile", "none")):
            status, answer = await engine.worker.post(path)
            assert (status, answer["error"]["message"]) == (400, message)
