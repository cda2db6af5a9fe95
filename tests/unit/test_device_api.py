"""Memory and profiles over an engine that the test plays: what it is told, in which order, and what is answered."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from common.config import EngineOptions
from common.messages import FrontendToEngine, GetStats
from common.orders import AwaitIdle, Done, Order, Pause, ReleaseMemory, ResumeMemory, StartProfile, StopProfile, WarmUp
from tests.support.processes import until
from tests.support.scripted_worker import STATS, ScriptedEngine, Worker, scripted_worker

RELEASE, RESUME = "/release_memory_occupation", "/resume_memory_occupation"
OUR_ORDERS = AwaitIdle | ReleaseMemory | ResumeMemory | WarmUp | StartProfile | StopProfile
WORDS = [5, 6]


class Played:
    """Each engine answers every order as `errors` say, by the type of the order; keeps what it was told of ours."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.told: list[list[Order]] = [[] for _ in worker.engines]
        self.errors: dict[type, list[str | None]] = {}
        """One for each group."""
        self.hangs: type | None = None
        """Orders of this type are not answered."""
        for group, engine in enumerate(worker.engines):
            self._play(group, engine)

    def _play(self, group: int, engine: ScriptedEngine) -> None:
        def on_message(message: FrontendToEngine) -> None:
            if isinstance(message, GetStats):
                engine.answer(replace(STATS, serial=message.serial))
            elif isinstance(message, OUR_ORDERS):
                self.told[group].append(message)
                if type(message) is not self.hangs:
                    error = self.errors.get(type(message), [None] * len(self.told))[group]
                    engine.answer(Done(serial=message.serial, error=error))
            elif isinstance(message, Pause):
                engine.answer(Done(serial=message.serial))

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


async def served(worker: Worker) -> bool:
    asking = asyncio.create_task(worker.post(input_ids=[1, 2]))
    worker.engine.finish(await worker.engine.next_generate(), WORDS)
    return (await asking)[0] == 200


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


async def test_without_a_pause_nothing_is_released():
    async with played() as engine:
        status, answer = await engine.worker.post(RELEASE)
        assert (status, answer["error"]["code"]) == (400, "memory_refused")
        assert "pause generation first, with mode abort or retract" in answer["message"]
        assert engine.kinds_told() == []
        assert await engine.state() == (200, "ok", [], 0)


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


async def test_weights_may_be_away_or_broken_or_both():
    """Each is mended by itself."""
    async with played() as engine:
        await engine.pause()
        assert (await engine.worker.post(RELEASE))[0] == 200
        engine.worker.engine_client.mend()
        assert (await engine.worker.get("/health"))[0] == 503
        assert (await engine.worker.post(RESUME))[0] == 200
        assert (await engine.worker.get("/health"))[0] == 200


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
