"""The groups of one worker: who takes a request, what is asked of all, and what one group's trouble means for the others."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest
from msgspec.structs import replace

from common.config import EngineOptions
from common.errors import LegFailed, RequestError
from common.messages import (
    Beat,
    Bootstrap,
    CacheFlushed,
    Failed,
    FinishNow,
    FlushCache,
    FrontendToEngine,
    Generate,
    GetStats,
    Leg,
    ReportedError,
    RequestOptions,
    Shutdown,
    StopAt,
    WorkerKind,
)
from common.ranks import Ranks
from common.server.engine_client import Ended, EngineClient
from common.server.engine_groups import EngineGroups
from tests.support.processes import DEADLINE_S
from tests.support.scripted_worker import READY, STATS, Clock, ScriptedEngine, scripted_worker

CROWDED = Beat(num_steps=1, quarantined_pages=9, num_pages=10)
WELL = Beat(num_steps=1, quarantined_pages=0, num_pages=10)


class Groups:
    """Groups and their engines, which the test plays."""

    def __init__(self, num_groups: int, leg: Leg | None) -> None:
        self.engines = [ScriptedEngine() for _ in range(num_groups)]
        self.clock = Clock()
        options = EngineOptions(quarantine_patience_s=1e-9, engine_deadline_s=30.0)
        clients = [EngineClient(engine, options, leg=leg, clock=self.clock.now) for engine in self.engines]
        self.all = EngineGroups(clients, Ranks(tp=num_groups, dp=num_groups), leg=leg)

    def sent(self) -> list[list[FrontendToEngine]]:
        """What each group has been sent since the last call."""
        return [[engine.received() for _ in range(engine.num_received)] for engine in self.engines]

    async def beat(self, group: int, beat: Beat) -> None:
        """Let a group say twice how it is; it is believed the second time."""
        for _ in range(2):
            self.engines[group].answer(beat)
            await self.engines[group].read()
            await self.clock.advance(1.0)

    def group_that_got(self) -> int:
        """The one group that was sent something, which is a request."""
        [(group, [message])] = [(group, messages) for group, messages in enumerate(self.sent()) if messages]
        assert isinstance(message, Generate)
        return group


@pytest.fixture
async def groups_of() -> AsyncIterator[Callable[..., Groups]]:
    running: list[asyncio.Task[None]] = []

    def make(num_groups: int, leg: Leg | None = "decode") -> Groups:
        groups = Groups(num_groups, leg)
        running.append(asyncio.create_task(groups.all.run()))
        running.append(asyncio.create_task(groups.all.watch(sleep=groups.clock.sleep)))
        return groups

    async with asyncio.timeout(DEADLINE_S):
        yield make
        for task in running:
            task.cancel()
        await asyncio.wait(running)
        assert all(task.cancelled() for task in running), "a loop has ended by itself"


def request(rid: str = "r", *, room: int | None = None, named: int | None = None) -> Generate:
    bootstrap = None if room is None else Bootstrap("h", 1, (room, room + 1))
    return Generate(rid=rid, input_ids=[1], options=RequestOptions(data_parallel_rank=named), bootstrap=bootstrap)


# ------------------------------------------------------------------------------------------------ who takes a request


@pytest.mark.parametrize("seed", range(20))
async def test_the_group_with_the_fewest_open_samples_takes_a_request_and_equals_take_turns(
    groups_of: Callable[..., Groups], seed: int
):
    """Against a recount, over a random history of requests that begin, end sample by sample, fail and are left."""
    rng = random.Random(seed)
    groups = groups_of(rng.randrange(1, 6))
    num_groups = len(groups.engines)
    open_samples: dict[str, tuple[int, int]] = {}
    last_turn = dict.fromkeys(range(num_groups), -1)
    contexts: dict[str, AsyncExitStack] = {}
    for turn in range(60):
        if not contexts or rng.random() < 0.6:
            rid, num_samples = f"r{turn}", rng.randrange(1, 4)
            loads = [sum(left for group, left in open_samples.values() if group == g) for g in range(num_groups)]
            expected = min(range(num_groups), key=lambda group: (loads[group], last_turn[group]))
            stack = contexts[rid] = AsyncExitStack()
            updates = await stack.enter_async_context(groups.all.generate(request(rid), num_ends=num_samples))
            [(group, [message])] = [(g, messages) for g, messages in enumerate(groups.sent()) if messages]
            assert isinstance(message, Generate)
            assert group == expected, f"loads {loads}, turns {last_turn}"
            open_samples[rid], last_turn[group] = (group, num_samples), turn
            assert groups.all.num_open_samples == sum(left for _, left in open_samples.values())
            how = rng.choice(["runs on", "ends in part", "fails"])
            if how == "ends in part" and num_samples > 1:
                groups.engines[group].finish(message, [1])
                assert isinstance(await anext(updates), Ended)
                open_samples[rid] = (group, num_samples - 1)
            elif how == "fails":
                groups.engines[group].fail(message)
                assert isinstance(await anext(updates), Failed)
                open_samples[rid] = (group, 0)
        else:
            rid = rng.choice(sorted(contexts))
            await contexts.pop(rid).aclose()
            del open_samples[rid]
            groups.sent()
    for stack in contexts.values():
        await stack.aclose()
    assert groups.all.num_open_samples == 0


async def test_a_prefill_worker_goes_by_the_first_room_however_loaded(groups_of: Callable[..., Groups]):
    groups = groups_of(3, "prefill")
    async with AsyncExitStack() as stack:
        for number, room in enumerate([3, 6, 9, 2**63 - 2, 5]):
            message = request(f"r{number}", room=room)
            groups.all.check_group(message)
            await stack.enter_async_context(groups.all.generate(message))
            assert groups.group_that_got() == room % 3
        await stack.enter_async_context(groups.all.generate(request("scored")))
        assert groups.group_that_got() != 0, "without a room the least loaded one takes it"


@pytest.mark.parametrize("leg", ["decode", None])
async def test_a_room_means_nothing_elsewhere_but_a_named_group_does(groups_of: Callable[..., Groups], leg: Leg | None):
    groups = groups_of(3, leg)
    async with AsyncExitStack() as stack:
        for number, named in enumerate([2, 2, 2, 0]):
            message = request(f"r{number}", room=1 if leg else None, named=named)
            groups.all.check_group(message)
            await stack.enter_async_context(groups.all.generate(message))
            assert groups.group_that_got() == named
        await stack.enter_async_context(groups.all.generate(request("free", room=3 if leg else None)))
        assert groups.group_that_got() == 1


@pytest.mark.parametrize(
    ("leg", "room", "named", "words"),
    [
        ("decode", 1, 3, r"^data_parallel_rank: 3 is outside \[0, 3\)"),
        (None, None, 2**31 - 1, r"^data_parallel_rank: .* outside"),
        ("prefill", 4, 2, r"^data_parallel_rank: is 2, but the room belongs to group 1$"),
    ],
)
async def test_a_named_group_that_cannot_have_a_request_is_refused(
    groups_of: Callable[..., Groups], leg: Leg | None, room: int | None, named: int, words: str
):
    with pytest.raises(RequestError, match=words):
        groups_of(3, leg).all.check_group(request(room=room, named=named))


async def test_a_named_group_is_fine_on_a_prefill_worker_if_it_is_the_room_s(groups_of: Callable[..., Groups]):
    groups = groups_of(3, "prefill").all
    groups.check_group(request(room=4, named=1))
    groups.check_group(request(named=2))


async def test_over_http_a_wrong_group_is_a_400_that_names_the_field_and_nothing_has_begun():
    async with scripted_worker("aggregated", options=EngineOptions(dp=2)) as worker:
        status, body = await worker.post(input_ids=[[1], [2]], data_parallel_rank=2)
        assert status == 400
        assert body["error"]["message"].startswith("data_parallel_rank: ")
        assert [engine.num_received for engine in worker.engines] == [0, 0]
        asking = asyncio.create_task(worker.post(input_ids=[1], data_parallel_rank=1))
        message = await worker.engines[1].next_generate()
        assert message.options.data_parallel_rank == 1
        worker.engines[1].finish(message, [5])
        assert (await asking)[0] == 200


async def test_a_rid_is_one_request_s_over_all_groups(groups_of: Callable[..., Groups]):
    groups = groups_of(2)
    async with groups.all.generate(request("r")):
        with pytest.raises(RequestError, match=r"^rid: 'r' is in use"):
            async with groups.all.generate(request("r", named=1)):
                pass
        assert groups.group_that_got() == 0


async def test_stops_and_ends_reach_the_request_s_group_alone(groups_of: Callable[..., Groups]):
    groups = groups_of(3)
    async with groups.all.generate(request("a")), groups.all.generate(request("ab")):
        (first,), (second,), () = groups.sent()
        assert isinstance(first, Generate)
        assert isinstance(second, Generate)
        groups.all.stop_at("ab", 1, num_tokens=2, matched="x")
        assert groups.sent() == [[], [StopAt(rid=second.rid, index=1, num_tokens=2, matched="x")], []]
        assert groups.all.finish_now("ab") == ["ab"]
        assert groups.sent() == [[], [FinishNow(second.rid)], []]
        assert groups.all.finish_now("") == ["a", "ab"]
        assert groups.sent() == [[FinishNow(first.rid)], [FinishNow(second.rid)], []]


# ------------------------------------------------------------------------------------------------ what all are asked


async def test_the_limits_are_the_least_of_all_groups(groups_of: Callable[..., Groups]):
    groups = groups_of(3)
    ready = asyncio.create_task(groups.all.ready())
    for engine, tokens in zip(groups.engines, (500, 300, 400), strict=True):
        assert not ready.done()
        engine.answer(replace(READY, kv_pool_tokens=tokens))
        await engine.read()
    assert await ready == replace(READY, kv_pool_tokens=300)


async def test_statistics_are_added_up_field_by_field(groups_of: Callable[..., Groups]):
    groups = groups_of(3)
    asking = asyncio.create_task(groups.all.stats())
    for factor, engine in enumerate(groups.engines, start=1):
        question = await engine.next()
        assert isinstance(question, GetStats)
        pages = replace(STATS.pages, total=10 * factor, free=factor)
        engine.answer(replace(STATS, serial=question.serial, steps=factor, swaps=100 * factor, pages=pages))
    found = await asking
    assert (found.steps, found.swaps, found.running_requests) == (6, 600, 3 * STATS.running_requests)
    assert (found.pages.total, found.pages.free, found.pages.cached) == (60, 6, 3 * STATS.pages.cached)


@pytest.mark.parametrize(
    ("refusals", "answer"), [((None, None), None), ((None, "busy"), "busy"), (("one", "two"), "one")]
)
async def test_a_flush_is_done_when_all_groups_have_done_it(
    groups_of: Callable[..., Groups], refusals: tuple[str | None, str | None], answer: str | None
):
    groups = groups_of(2)
    asking = asyncio.create_task(groups.all.flush_cache())
    for engine, refusal in zip(groups.engines, refusals, strict=True):
        question = await engine.next()
        assert isinstance(question, FlushCache)
        engine.answer(CacheFlushed(question.serial, refusal))
    assert await asking == answer


async def test_all_leaders_are_told_to_end(groups_of: Callable[..., Groups]):
    groups = groups_of(3)
    groups.all.shut_down()
    assert groups.sent() == [[Shutdown()]] * 3


# ------------------------------------------------------------------------------------------------ trouble


async def test_when_one_group_is_gone_everything_open_fails_at_once(groups_of: Callable[..., Groups]):
    groups = groups_of(3)
    async with AsyncExitStack() as stack:
        open_ones = [await stack.enter_async_context(groups.all.generate(request(f"r{n}"))) for n in range(3)]
        waiting = asyncio.create_task(groups.all.stats())
        for engine in groups.engines:
            assert isinstance(await engine.next(), Generate)
            assert isinstance(await engine.next(), GetStats)
        groups.all.fail("rank 2 is gone")
        for number, updates in enumerate(open_ones):
            [failed] = [update async for update in updates]
            assert isinstance(failed, Failed)
            error = failed.error
            assert (error.rid, error.leg, error.stage, error.code) == (f"r{number}", "decode", "engine", "leg_failed")
        with pytest.raises(LegFailed, match="rank 2"):
            await waiting
    with pytest.raises(ReportedError, match="rank 2"):
        groups.all.generate(request("later"))


async def test_while_one_group_is_silent_none_takes_a_request(groups_of: Callable[..., Groups]):
    groups = groups_of(2)
    async with groups.all.generate(request("open")) as updates:
        for _ in range(3):
            await groups.clock.advance(20.0)
            groups.engines[1].answer(WELL)
            await groups.engines[1].read()
        [failed] = [update async for update in updates]
        assert isinstance(failed, Failed)
        assert (failed.error.code, failed.error.stage) == ("deadline_exceeded", "engine")
    for named in (None, 0, 1):
        with pytest.raises(ReportedError) as raised:
            groups.all.generate(request(named=named))
        assert (raised.value.report.code, raised.value.report.rid) == ("engine_stuck", "r")
    assert not groups.all.is_crowded
    groups.engines[0].answer(WELL)
    await groups.engines[0].read()
    assert groups.all.refusal is None


async def test_a_crowded_group_is_passed_over_and_only_if_all_are_is_the_worker(groups_of: Callable[..., Groups]):
    groups = groups_of(2, "prefill")
    await groups.beat(0, CROWDED)
    assert groups.all.refusal is None
    assert not groups.all.is_crowded
    for number in range(3):
        async with groups.all.generate(request(f"r{number}")):
            assert groups.group_that_got() == 1
        groups.sent()
    async with groups.all.generate(request(room=7)):
        assert groups.group_that_got() == 1
    groups.sent()
    with pytest.raises(ReportedError, match="in quarantine"):
        async with groups.all.generate(request(room=8)):
            pass
    await groups.beat(1, CROWDED)
    assert groups.all.is_crowded
    assert groups.all.refusal is not None
    assert groups.all.refusal.code == "quarantine_full"
    assert groups.sent() == [[], []]


async def test_a_worker_s_health_and_account_tell_of_its_groups():
    async with scripted_worker("prefill", options=EngineOptions(tp=4, dp=2, ep=True)) as worker:
        health = {"status": "ok", "dp_size": 2, "paused": False, "weight_version": "w1", "model_path": "demo"}
        assert await worker.get("/health") == (200, health)
        asking = asyncio.create_task(worker.get("/server_info"))
        for engine in worker.engines:
            question = await engine.next()
            assert isinstance(question, GetStats)
            engine.answer(replace(STATS, serial=question.serial))
        _, info = await asking
    assert (info["tp_size"], info["dp_size"], info["ep"], info["ep_size"], info["pp_size"]) == (4, 2, True, 4, 1)
    assert info["num_gpus"] == 0
    assert info["max_total_num_tokens"] == READY.kv_pool_tokens
    assert info["stats"]["pages"]["total"] == 2 * STATS.pages.total


@pytest.mark.parametrize(
    ("kind", "mode", "method", "is_told_by_room"),
    [
        ("prefill", "prefill", "follow_bootstrap_room", False),
        ("decode", "decode", "shortest_queue", True),
        ("aggregated", "null", "shortest_queue", False),
    ],
)
async def test_who_chooses_a_prompt_s_group_is_told(kind: WorkerKind, mode: str, method: str, is_told_by_room: bool):
    async with scripted_worker(kind) as worker:
        asking = asyncio.create_task(worker.get("/get_server_info"))
        question = await worker.engine.next()
        assert isinstance(question, GetStats)
        worker.engine.answer(replace(STATS, serial=question.serial))
        _, info = await asking
    assert (info["disaggregation_mode"], info["load_balance_method"]) == (mode, method)
    assert info["prefill_round_robin_balance"] is is_told_by_room
