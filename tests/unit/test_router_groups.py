"""Prefill workers with several attention groups: what the router learns of them, and to which group rooms lead."""

import asyncio
import random
from contextlib import ExitStack
from typing import Any

import pytest

from router.breaker import Breaker
from router.leg_run import leg_on
from router.worker import Worker
from tests.support import stub_workers as stubs
from tests.support.asking import ask, body, check_answer, workers_of
from tests.support.processes import until
from tests.support.stub_workers import Stack, StubWorker, stack

ASKING = {"health_interval_s": 0.02, "health_timeout_s": 0.5, "unhealthy_after_s": 1.0, "max_retries": 0}


async def until_groups_are(running: Stack, expected: int) -> None:
    """Wait until the router knows how many groups the prefill worker has."""
    while (await workers_of(running))[running.prefill.url]["dp_size"] != expected:
        pass


def groups_of(worker: StubWorker, dp_size: int) -> list[int]:
    """Where the rooms that have come lead."""
    return [sample.bootstrap.room % dp_size for sample in worker.samples if sample.bootstrap is not None]


async def test_first_rooms_lead_to_the_group_with_the_fewest_legs():
    async with stack(prefill=stubs.after_release, router=ASKING) as running:
        assert (await workers_of(running))[running.prefill.url]["dp_size"] == 1
        running.prefill.health = (200, {"status": "ok", "dp_size": 4})
        await until_groups_are(running, 4)
        asking = [asyncio.create_task(ask(running, body())) for _ in range(12)]
        await until(lambda: len(running.prefill.samples) == len(asking))
        assert sorted(groups_of(running.prefill, 4)) == sorted([0, 1, 2, 3] * 3)
        running.prefill.release.set()
        for answer in await asyncio.gather(*asking):
            check_answer(*answer)
        for sample in running.prefill.samples:
            assert sample.bootstrap is not None
            assert sample.bootstrap.port == 8998, "the decode worker finds the group's port by itself"


async def test_all_rooms_of_a_prompt_lead_to_one_group():
    async with stack(router=ASKING) as running:
        running.prefill.health = (200, {"dp_size": 3})
        await until_groups_are(running, 3)
        for stream in (False, True):
            await ask(running, body(stream=stream, sampling_params={"n": 5}))
        for sample in running.prefill.samples:
            assert sample.bootstrap is not None
            assert len({room % 3 for room in sample.bootstrap.rooms}) == 1
            assert len(set(sample.bootstrap.rooms)) == 5


@pytest.mark.parametrize("told", [{}, {"dp_size": 0}, {"dp_size": "2"}, {"dp_size": 10**9}, [1]])
async def test_a_healthy_worker_that_does_not_say_has_one_group(told: Any):
    async with stack(router=ASKING) as running:
        running.prefill.health = (200, {"dp_size": 2})
        await until_groups_are(running, 2)
        running.prefill.health = (200, told)
        await until_groups_are(running, 1)
        check_answer(*await ask(running, body()))


@pytest.mark.parametrize("stream", [False, True])
async def test_the_group_that_a_client_names_is_one_of_the_decode_worker_s(stream: bool):
    async with stack() as running:
        check_answer(*await ask(running, body(stream=stream, data_parallel_rank=3)))
        check_answer(*await ask(running, body(stream=stream)))
        assert [sample.options.data_parallel_rank for sample in running.prefill.samples] == [None, None]
        assert [sample.options.data_parallel_rank for sample in running.decode.samples] == [3, None]
        await ask(running, body(stream=stream, data_parallel_rank=3, sampling_params={"max_new_tokens": 0}))
        assert running.prefill.samples[-1].options.data_parallel_rank is None


@pytest.mark.parametrize("seed", range(20))
def test_legs_are_counted_where_they_are(seed: int):
    """Against a recount, over a random history of legs that begin and end, and of restarts with another number of groups."""
    rng = random.Random(seed)
    worker = Worker("http://a", "prefill", Breaker(max_failures=5, pause_s=1.0), 8998)
    dp_size, running = 1, list[tuple[ExitStack, int, int]]()
    life = 0
    for _ in range(200):
        what = rng.random()
        if what < 0.02:
            new_size = rng.randrange(1, 6)
            life += new_size != dp_size
            dp_size = new_size
            worker.mark_healthy(dp_size)
        elif what < 0.6 or not running:
            legs = ExitStack()
            counts = [sum((at, group) == (life, g) for _, at, group in running) for g in range(dp_size)]
            group = legs.enter_context(leg_on(worker)).take_group()
            assert counts[group] == min(counts)
            running.append((legs, life, group))
        else:
            legs, _, _ = running.pop(rng.randrange(len(running)))
            legs.close()
    for legs, _, _ in running:
        legs.close()
    assert [group.outstanding for group in worker._groups] == [0] * dp_size
    assert worker.outstanding == 0
