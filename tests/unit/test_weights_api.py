"""A trainer's routes over an engine that the test plays: what it is told, in which order, and what is answered."""

import asyncio
import base64
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from common.config import EngineOptions
from common.messages import Abort, FinishNow, FinishReason, FrontendToEngine, Generate, GetStats
from common.orders import (
    CheckWeights,
    Continue,
    Done,
    JoinWeightGroup,
    LeaveWeightGroup,
    LoadWeights,
    Order,
    Pause,
    PickledWeights,
    SetWeightVersion,
    WeightBroadcast,
    WeightFiles,
)
from tests.support.processes import until
from tests.support.scripted_worker import ROOM, STATS, ScriptedEngine, Worker, scripted_worker

ORDERS = (Pause, Continue, CheckWeights, LoadWeights, SetWeightVersion, JoinWeightGroup, LeaveWeightGroup)
NUM_TENSORS = 9
BINARY = {"Content-Type": "application/octet-stream"}
GROUP = {"master_address": "a", "master_port": 5, "rank_offset": 1, "world_size": 3, "group_name": "g"}
BROADCAST: dict[str, Any] = {"names": ["n"], "dtypes": ["bfloat16"], "shapes": [[2, 3]], "group_name": "g"}


class Obedient:
    """Carries orders out on each engine as `answers` say, by the type of the order; keeps what it was told."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.told: list[list[Order]] = [[] for _ in worker.engines]
        self.others: list[FrontendToEngine] = []
        self.answers: dict[type, list[Done]] = {}
        """One for each group; none: it went well."""
        self.hangs: set[type] = set()
        """Orders that are not answered."""
        for group, engine in enumerate(worker.engines):
            engine.on_message = self._listener(group, engine)

    def _listener(self, group: int, engine: ScriptedEngine) -> Callable[[FrontendToEngine], None]:
        def on_message(message: FrontendToEngine) -> None:
            if isinstance(message, GetStats):
                engine.answer(replace(STATS, serial=message.serial))
            elif isinstance(message, ORDERS):
                self.told[group].append(message)
                if type(message) not in self.hangs:
                    dones = self.answers.get(type(message))
                    done = Done(serial=0) if dones is None else dones[group]
                    engine.answer(replace(done, serial=message.serial))
            else:
                self.others.append(message)

        return on_message

    def names(self, group: int = 0) -> list[str]:
        """The types of what a group was told since the last call."""
        told, self.told[group] = self.told[group], []
        return [type(order).__name__ for order in told]

    async def told_of(self, kind: type) -> None:
        """Return once the first group has been told of such an order."""
        await until(lambda: any(isinstance(order, kind) for order in self.told[0]))

    def find(self, kind: type) -> Any:
        """The only order of a kind that the first group was told of."""
        [found] = [order for order in self.told[0] if isinstance(order, kind)]
        return found


@asynccontextmanager
async def obedient(kind: Any = "aggregated", **options: Any) -> AsyncIterator[Obedient]:
    server = {name: options.pop(name) for name in ("max_weights_bytes",) if name in options}
    async with scripted_worker(kind, options=EngineOptions(**options), **server) as worker:
        yield Obedient(worker)


async def post_bytes(worker: Worker, data: bytes, **query: str) -> tuple[int, Any]:
    async with worker.client.post("/update_weights_from_tensor", data=data, params=query, headers=BINARY) as response:
        return response.status, await response.json()


def read(path: str) -> bytes:
    """What a rank would find there."""
    return Path(path).read_bytes()


HELD = ["Pause", "CheckWeights", "LoadWeights", "Continue"]
REFUSED = ["Pause", "CheckWeights", "Continue"]


# ------------------------------------------------------------------------------------------------ pauses


@pytest.mark.parametrize(
    ("mode", "cause"), [(None, "requested"), ("abort", "requested"), ("retract", "retracted"), ("in_place", None)]
)
async def test_a_pause_ends_what_its_mode_ends(mode: str | None, cause: Any):
    async with obedient() as engine:
        worker = engine.worker
        asking = asyncio.create_task(worker.post(input_ids=[1, 2]))
        message = await worker.engine.next_generate()
        body: dict[str, Any] = {} if mode is None else {"mode": mode}
        status, answer = await worker.post("/pause_generation", **body)
        num_ended = int(cause is not None)
        assert (status, answer) == (200, {"status": "ok", "mode": mode or "abort", "ended": num_ended})
        # The second one comes behind the ends: when it is done, the engine knows of them.
        assert engine.names() == ["Pause"] * (1 + num_ended)
        assert engine.others == [message, *([FinishNow(message.rid, cause)] if cause else [])]
        assert (await worker.get("/health"))[1]["paused"]
        assert (await worker.get("/server_info"))[1]["paused"]
        assert (await worker.get("/v1/loads"))[1]["paused"]
        status, answer = await worker.get("/health_generate")
        assert (status, answer["error"]["code"]) == (503, "paused")
        worker.engine.finish(message, [5])
        assert (await asking)[0] == 200
        later = asyncio.create_task(worker.post(input_ids=[1, 2]))
        while not isinstance(waiting := await worker.engine.next(), Generate):
            pass
        assert (await worker.post("/continue_generation"))[1] == {"status": "ok"}
        assert engine.names() == ["Continue"]
        assert not (await worker.get("/health"))[1]["paused"]
        worker.engine.finish(waiting, [5])
        assert (await later)[0] == 200


async def test_an_unknown_mode_is_named():
    async with obedient() as engine:
        for mode in ("soon", 3):
            status, answer = await engine.worker.post("/pause_generation", mode=mode)
            assert status == 400
            assert answer["error"]["message"].startswith("mode: ")
        assert engine.names() == []
        assert not (await engine.worker.get("/health"))[1]["paused"]


async def test_all_groups_are_paused():
    async with obedient(dp=2) as engine:
        await engine.worker.post("/pause_generation", mode="in_place")
        assert [engine.names(group) for group in range(2)] == [["Pause"]] * 2


async def test_an_engine_that_falls_silent_is_not_paused_afterwards():
    async with obedient() as engine:
        engine.hangs.add(Pause)
        asking = asyncio.create_task(engine.worker.post("/pause_generation"))
        await engine.told_of(Pause)
        await engine.worker.clock.advance(31.0)
        assert (await asking)[0] == 504
        assert engine.names() == ["Pause", "Continue"]
        engine.worker.engine.answer(Done(serial=99))
        await engine.worker.engine.read()
        assert (await engine.worker.get("/health"))[1] == {
            "status": "ok",
            "dp_size": 1,
            "paused": False,
            "weight_version": "w1",
            "model_path": "demo",
        }


# ------------------------------------------------------------------------------------------------ updates


async def test_from_disk(tmp_path: Path):
    async with obedient(dp=2) as engine:
        worker, folder = engine.worker, tmp_path / "step-7"
        folder.mkdir()
        status, answer = await worker.post(
            "/update_weights_from_disk", model_path=str(folder), flush_cache=True, token_step=3, load_format=None
        )
        assert (status, answer["success"], answer["weight_version"]) == (200, True, "step-7")
        source = WeightFiles(str(folder))
        assert engine.find(CheckWeights).source == source
        loaded = engine.find(LoadWeights)
        assert (loaded.source, loaded.weight_version) == (source, "step-7")
        assert [engine.names(group) for group in range(2)] == [HELD] * 2
        for path in ("/model_info", "/server_info", "/health", "/get_weight_version", "/weight_version"):
            assert (await worker.get(path))[1]["weight_version"] == "step-7"
        assert (await worker.get("/model_info"))[1]["model_path"] == str(folder)
        for path in (str(tmp_path / "nowhere"), __file__, "\0"):
            status, answer = await worker.post("/update_weights_from_disk", model_path=path)
            assert (status, answer["success"]) == (400, False)
            assert answer["message"].startswith("model_path: ")
        assert engine.names() == []


async def test_the_version_in_replies_is_the_present_one():
    async with obedient("decode") as engine:
        worker = engine.worker
        for version in ("w1", "w2"):
            body: dict[str, Any] = {"input_ids": [1, 2], **ROOM, "bootstrap_room": 7}
            asking = asyncio.create_task(worker.post(**body))
            message = await worker.engine.next_generate()
            worker.engine.finish(message, [5])
            assert (await asking)[1]["meta_info"]["weight_version"] == version
            status, _ = await worker.post("/update_weight_version", new_version="w2")
            assert status == 200
            while worker.engine.num_received:
                worker.engine.received()


async def test_a_body_of_tensors_is_a_file_for_the_ranks():
    async with obedient() as engine:
        data = bytes(range(256)) * 9000
        seen: list[bytes] = []
        listen = engine.worker.engine.on_message

        def look(message: FrontendToEngine) -> None:
            if isinstance(message, CheckWeights | LoadWeights):
                assert isinstance(message.source, WeightFiles)
                seen.append(read(message.source.path))
            listen(message)

        engine.worker.engine.on_message = look
        status, answer = await post_bytes(engine.worker, data, weight_version="w7", flush_cache="true")
        assert (status, answer["weight_version"]) == (200, "w7")
        assert seen == [data, data]
        path = engine.find(LoadWeights).source.path
        assert engine.names() == HELD
        with pytest.raises(FileNotFoundError):
            read(path)
        status, answer = await post_bytes(engine.worker, data, flush_cache="maybe")
        assert (status, engine.names()) == (400, [])
        assert answer["message"].startswith("flush_cache: ")
        status, answer = await post_bytes(engine.worker, data)
        assert answer["weight_version"] == "unnamed-2", "weights without a name are not the present ones"


async def test_a_body_may_be_larger_than_others_but_not_than_its_own_bound():
    async with obedient(max_weights_bytes=2**20) as engine:
        assert (await post_bytes(engine.worker, bytes(2**20)))[0] == 200
        engine.names()
        status, answer = await post_bytes(engine.worker, bytes(2**20 + 1))
        assert (status, answer["success"]) == (413, False)

        async def endless() -> AsyncIterator[bytes]:
            while True:
                yield bytes(2**16)

        async with engine.worker.client.post("/update_weights_from_tensor", data=endless(), headers=BINARY) as response:
            assert response.status == 413
        assert engine.names() == []
        assert (await post_bytes(engine.worker, b"next"))[0] == 200


async def test_pickles_are_taken_if_that_is_allowed():
    pickles: dict[str, Any] = {
        "serialized_named_tensors": [base64.b64encode(b"one").decode(), base64.b64encode(b"two").decode()]
    }
    async with obedient() as engine:
        status, answer = await engine.worker.post("/update_weights_from_tensor", **pickles)
        assert (status, answer["success"]) == (400, False)
        assert "--allow-pickled-weights" in answer["message"]
    async with obedient(allow_pickled_weights=True) as engine:
        status, answer = await engine.worker.post("/update_weights_from_tensor", **pickles, weight_version="p")
        assert (status, answer["weight_version"]) == (200, "p")
        source = engine.find(LoadWeights).source
        assert isinstance(source, PickledWeights)
        assert len(source.paths) == 2
        engine.names()
        bad: dict[str, dict[str, Any]] = {
            "serialized_named_tensors[0]": {"serialized_named_tensors": ["?"]},
            "load_format": pickles | {"load_format": "direct"},
        }
        for field, body in bad.items():
            status, answer = await engine.worker.post("/update_weights_from_tensor", **body)
            assert (status, answer["success"], engine.names()) == (400, False, [])
            assert answer["message"].startswith(f"{field}: "), answer


@pytest.mark.parametrize(("load_format", "is_bucket"), [(None, False), ("auto", False), ("flattened_bucket", True)])
async def test_the_ranks_are_told_whether_tensors_come_as_a_bucket(load_format: str | None, is_bucket: bool):
    async with obedient(allow_pickled_weights=True) as engine:
        worker, pickles = engine.worker, [base64.b64encode(b"one").decode()]
        status, _ = await worker.post("/update_weights_from_distributed", **BROADCAST, load_format=load_format)
        assert status == 200
        told = [engine.find(kind).source for kind in (CheckWeights, LoadWeights)]
        broadcast = WeightBroadcast(
            group="g", names=("n",), dtypes=("bfloat16",), shapes=((2, 3),), is_bucket=is_bucket
        )
        assert (told, engine.names()) == ([broadcast] * 2, HELD)
        body: dict[str, Any] = {"serialized_named_tensors": pickles, "load_format": load_format}
        assert (await worker.post("/update_weights_from_tensor", **body))[0] == 200
        source = engine.find(LoadWeights).source
        assert (type(source), source.is_bucket) == (PickledWeights, is_bucket)


async def test_safetensors_are_no_bucket():
    async with obedient() as engine:
        assert (await post_bytes(engine.worker, b"x", load_format="auto"))[0] == 200
        engine.names()
        status, answer = await post_bytes(engine.worker, b"x", load_format="flattened_bucket")
        assert (status, engine.names()) == (400, [])
        assert answer["message"].startswith("load_format: ")


async def test_groups_and_broadcasts():
    async with obedient(tp=2, weights_deadline_s=7.0) as engine:
        worker = engine.worker
        status, answer = await worker.post("/init_weights_update_group", **GROUP, backend="gloo")
        assert (status, answer["success"]) == (200, True)
        joined = engine.find(JoinWeightGroup)
        assert (joined.group, joined.address, joined.port, joined.rank_offset) == ("g", "a", 5, 1)
        assert (joined.world_size, joined.backend, joined.deadline_s) == (3, "gloo", 7.0)
        assert engine.names() == ["Pause", "JoinWeightGroup", "Continue"]
        status, answer = await worker.post("/update_weights_from_distributed", **BROADCAST, weight_version="b")
        assert (status, answer["weight_version"]) == (200, "b")
        source = WeightBroadcast(group="g", names=("n",), dtypes=("bfloat16",), shapes=((2, 3),))
        assert engine.find(LoadWeights).source == source
        assert engine.names() == HELD
        assert (await worker.post("/destroy_weights_update_group", group_name="g"))[0] == 200
        assert engine.names() == ["Pause", "LeaveWeightGroup", "Continue"]


async def test_a_group_that_not_all_can_join_is_left_by_all():
    async with obedient(dp=2) as engine:
        engine.answers[JoinWeightGroup] = [Done(serial=0), Done(serial=0, error="rank 1: too late")]
        status, answer = await engine.worker.post("/init_weights_update_group", **GROUP)
        assert (status, answer["error"]["code"], answer["message"]) == (400, "weights_refused", "rank 1: too late")
        order = ["Pause", "JoinWeightGroup", "LeaveWeightGroup", "Continue"]
        assert [engine.names(group) for group in range(2)] == [order] * 2


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/init_weights_update_group", GROUP | {"master_port": 0}, "master_port"),
        ("/init_weights_update_group", GROUP | {"rank_offset": 0}, "rank_offset"),
        ("/init_weights_update_group", GROUP | {"world_size": 2, "rank_offset": 2}, "world_size"),
        ("/init_weights_update_group", GROUP | {"backend": "mpi"}, "backend"),
        ("/init_weights_update_group", {}, "body"),
        ("/update_weights_from_distributed", BROADCAST | {"shapes": [[-1]]}, "shapes[0][0]"),
        ("/update_weights_from_distributed", BROADCAST | {"shapes": [[2**64]]}, "shapes[0][0]"),
        ("/update_weights_from_distributed", BROADCAST | {"names": "n"}, "names"),
        ("/update_weights_from_distributed", BROADCAST | {"load_format": "direct"}, "load_format"),
        ("/update_weights_from_distributed", BROADCAST | {"load_format": "some.module.load"}, "load_format"),
        ("/update_weights_from_disk", {"model_path": 3}, "model_path"),
        ("/update_weights_from_disk", {"model_path": "/", "load_format": "flattened_bucket"}, "load_format"),
        ("/update_weight_version", {}, "new_version"),
    ],
)
async def test_what_is_wrong_is_named(path: str, body: dict[str, Any], field: str):
    async with obedient() as engine:
        status, answer = await engine.worker.post(path, **body)
        assert (status, answer["success"], answer["error"]["code"]) == (400, False, "invalid_request")
        assert answer["message"].startswith(f"{field}: "), answer
        assert engine.names() == []


@pytest.mark.parametrize(("body", "ends"), [({}, True), ({"abort_all_requests": False}, False)])
async def test_a_new_name(body: dict[str, Any], ends: bool):
    async with obedient() as engine:
        asking = asyncio.create_task(engine.worker.post(input_ids=[1]))
        message = await engine.worker.engine.next_generate()
        status, answer = await engine.worker.post("/update_weight_version", weight_version="n", **body)
        assert (status, answer["weight_version"]) == (200, "n")
        assert engine.find(SetWeightVersion).weight_version == "n"
        assert engine.names() == ["Pause", "SetWeightVersion", "Continue"]
        assert (FinishNow(message.rid) in engine.others) == ends
        reason = FinishReason(type="abort", cause="requested")
        engine.worker.engine.finish(message, [5], reason=reason)
        assert (await asking)[0] == 200


# ------------------------------------------------------------------------------------------------ what may go wrong


async def test_a_source_that_does_not_fit_changes_nothing():
    async with obedient(dp=2) as engine:
        engine.answers[CheckWeights] = [Done(serial=0), Done(serial=0, error="rank 1: unknown tensor x")]
        status, answer = await engine.worker.post("/update_weights_from_distributed", **BROADCAST)
        assert (status, answer["success"], answer["message"]) == (400, False, "rank 1: unknown tensor x")
        assert (answer["error"]["code"], answer["error"]["stage"]) == ("weights_refused", "weights")
        assert [engine.names(group) for group in range(2)] == [REFUSED] * 2
        health = (await engine.worker.get("/health"))[1]
        assert (health["status"], health["weight_version"]) == ("ok", "w1")


async def test_a_part_is_taken_only_while_the_user_has_paused(tmp_path: Path):
    async with obedient() as engine:
        worker = engine.worker
        engine.answers[CheckWeights] = [Done(serial=0, num_left=NUM_TENSORS)]
        status, answer = await worker.post("/update_weights_from_distributed", **BROADCAST)
        assert (status, engine.names()) == (400, REFUSED)
        assert "9 of the model's tensors are missing" in answer["message"]
        await worker.post("/pause_generation", mode="in_place")
        engine.names()
        assert (await worker.post("/update_weights_from_distributed", **BROADCAST))[0] == 200
        assert engine.names() == [*HELD[:-1], "Pause"], "who has paused goes on when he says so"
        status, _ = await worker.post("/update_weights_from_disk", model_path=str(tmp_path))
        assert (status, engine.names()) == (400, [*REFUSED[:-1], "Pause"])


async def test_weights_that_break_serve_nobody_until_they_are_mended():
    async with obedient(dp=2) as engine:
        worker = engine.worker
        asking = asyncio.create_task(worker.post(input_ids=[1]))
        message = await worker.engine.next_generate()
        engine.answers[LoadWeights] = [Done(serial=0), Done(serial=0, error="rank 1: gone", num_left=NUM_TENSORS)]
        status, answer = await worker.post("/update_weights_from_distributed", **BROADCAST, weight_version="new")
        assert (status, answer["success"], answer["error"]["code"]) == (503, False, "weights_broken")
        assert "rank 1: gone" in answer["message"]
        status, body = await asking
        assert (status, body["error"]["code"]) == (503, "weights_broken")
        assert Abort(message.rid) in engine.others
        status, health = await worker.get("/health")
        assert (status, health["status"]) == (503, "unhealthy")
        status, body = await worker.post(input_ids=[1])
        assert (status, body["error"]["code"]) == (503, "weights_broken")
        assert (await worker.get("/get_weight_version"))[1] == {"weight_version": "w1"}
        engine.answers[LoadWeights] = [Done(serial=0), Done(serial=0, num_left=2)]
        status, answer = await worker.post("/update_weights_from_distributed", **BROADCAST, weight_version="new")
        assert (status, answer["success"]) == (200, True)
        assert "2 others are in doubt" in answer["message"]
        assert (await worker.get("/health"))[0] == 503
        engine.answers[CheckWeights] = [Done(serial=0, error="no")] * 2
        assert (await worker.post("/update_weights_from_distributed", **BROADCAST))[0] == 400
        assert (await worker.get("/health"))[0] == 503
        engine.answers.clear()
        assert (await worker.post("/update_weights_from_distributed", **BROADCAST))[0] == 200
        assert (await worker.get("/health"))[0] == 200
        assert (await worker.get("/get_weight_version"))[1] == {"weight_version": "unnamed-2"}


async def test_one_update_at_a_time():
    async with obedient() as engine:
        worker = engine.worker
        engine.hangs.add(LoadWeights)
        first = asyncio.create_task(worker.post("/update_weights_from_distributed", **BROADCAST))
        await engine.told_of(LoadWeights)
        for path, body in (
            ("/update_weights_from_distributed", BROADCAST),
            ("/update_weight_version", {"new_version": "x"}),
        ):
            status, answer = await worker.post(path, **body)
            assert (status, answer["success"], answer["error"]["code"]) == (409, False, "update_in_progress")
        assert (await post_bytes(worker, b"x"))[0] == 409
        worker.engine.answer(Done(serial=engine.find(LoadWeights).serial))
        assert (await first)[0] == 200


async def test_an_update_goes_on_when_whoever_asked_has_left():
    async with obedient() as engine:
        worker = engine.worker
        engine.hangs.add(LoadWeights)
        first = asyncio.create_task(post_bytes(worker, b"tensors", weight_version="late"))
        await engine.told_of(LoadWeights)
        first.cancel()
        await asyncio.wait([first])
        loading = engine.find(LoadWeights)
        while (await worker.post("/update_weight_version", new_version="x"))[0] != 409:
            pass
        assert read(loading.source.path) == b"tensors", "the ranks still read it"
        worker.engine.answer(Done(serial=loading.serial))
        async with asyncio.timeout(20):
            while (await worker.get("/get_weight_version"))[1] != {"weight_version": "late"}:
                pass
        assert engine.names() == HELD


async def test_an_engine_may_be_silent_for_as_long_as_an_update_may_take():
    async with obedient(weights_deadline_s=600.0) as engine:
        worker = engine.worker
        engine.hangs.add(LoadWeights)
        updating = asyncio.create_task(worker.post("/update_weights_from_distributed", **BROADCAST))
        await engine.told_of(LoadWeights)
        await worker.clock.advance(590.0)
        assert (await worker.get("/health"))[0] == 200
        worker.engine.answer(Done(serial=engine.find(LoadWeights).serial))
        assert (await updating)[0] == 200
        # And from then on no longer than ever.
        await worker.clock.advance(61.0)
        assert (await worker.get("/health"))[0] == 503


async def test_an_update_that_never_ends_leaves_broken_weights():
    async with obedient(weights_deadline_s=100.0) as engine:
        worker = engine.worker
        engine.hangs.add(LoadWeights)
        updating = asyncio.create_task(worker.post("/update_weights_from_distributed", **BROADCAST))
        await engine.told_of(LoadWeights)
        serial = engine.find(LoadWeights).serial
        await worker.clock.advance(200.0)
        status, answer = await updating
        assert (status, answer["success"]) == (504, False)
        assert engine.names() == HELD, "it hears that it may go on, if it ever comes back"
        worker.engine.answer(Done(serial=serial))
        await worker.engine.read()
        status, health = await worker.get("/health")
        assert status == 503
        assert "has not ended" in health["reason"], "nobody knows what it has loaded"
        engine.hangs.clear()
        assert (await worker.post("/update_weights_from_distributed", **BROADCAST))[0] == 200
        assert (await worker.get("/health"))[0] == 200
