"""The router's health checks: who is healthy, who gets legs, and whose legs in flight fail; over stub workers."""

import asyncio

import aiohttp
import pytest

from common.process import free_port
from router.app import CHECKS
from router.config import RouterConfig, RouterOptions, parse_router_config
from router.health import HealthChecks
from router.membership import Membership
from router.process import serve
from tests.support import stub_workers as stubs
from tests.support.asking import (
    LEGS,
    OTHER,
    ask,
    body,
    check_answer,
    check_nothing_is_left,
    last_event,
    metrics_of,
    workers_of,
)
from tests.support.processes import DEADLINE_S
from tests.support.stub_workers import stack

# A worker that is only slow, because the machine is, must not pass for a silent one.
ASKING = {"health_interval_s": 0.02, "health_timeout_s": 0.5, "unhealthy_after_s": 1.0, "max_retries": 0}
STUCK = (503, {"status": "unhealthy", "reason": "the engine has been in one step for 60 s"})


async def until_healthy_is(running, worker, expected):
    """Wait until the router takes a worker for healthy, or not; gives the worker's entry."""
    while True:
        entry = (await workers_of(running))[worker.url]
        if entry["healthy"] is expected:
            return entry


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("health", [None, STUCK])
async def test_legs_on_a_stopped_worker_are_answered_by_another_pair(health, leg, stream):
    router = ASKING | {"max_retries": 1, "breaker_failures": 1, "breaker_pause_s": 0.01}
    async with stack(prefill=stubs.hang, decode=stubs.hang, num_pairs=2, router=router) as running:
        stopped, peer = getattr(running, leg), getattr(running, OTHER[leg])
        asking = asyncio.create_task(ask(running, body(stream=stream)))
        await stopped.arrived.wait()
        await peer.arrived.wait()
        stopped.health, peer.behaviour = health, None
        check_answer(*await asking)
        # It was told to end its leg, for the case that it comes back.
        await stopped.abort_arrived.wait()
        entry = await until_healthy_is(running, stopped, False)
        assert entry["reason"] == (
            "no answer to /health for 1 s" if health is None else "it says: the engine has been in one step for 60 s"
        )
        assert f'tandem_router_worker_healthy{{role="{leg}",worker="{stopped.url}"}} 0.0' in await metrics_of(running)
        for _ in range(3):
            check_answer(*await ask(running, body(stream=stream)))
        assert len(stopped.samples) == 1
        stopped.behaviour, stopped.health = None, (200, {})
        assert (await until_healthy_is(running, stopped, True))["reason"] is None
        while len(stopped.samples) == 1:
            check_answer(*await ask(running, body(stream=stream)))
        await check_nothing_is_left(running)


@pytest.mark.parametrize("health", [None, STUCK])
async def test_a_stream_that_has_begun_ends_with_an_error_that_says_why(health):
    async with stack(decode=stubs.stream_and_hang, router=ASKING) as running:
        async with running.client.post("/generate", json=body(stream=True)) as response:
            await response.content.readuntil(b"\n\n")
            running.decode.health = health
            error = last_event(await response.text())["error"]
        await check_nothing_is_left(running)
    assert (error["leg"], error["stage"], error["code"]) == ("decode", "health", "leg_failed")
    assert running.decode.url in error["message"]
    assert ("no answer" if health is None else "one step") in error["message"]


@pytest.mark.parametrize("told", ["draining", "crowded"])
async def test_a_worker_that_goes_on_with_its_legs_ends_them_and_gets_no_more(told: str):
    async with stack(decode=stubs.after_release, router=ASKING) as running:
        asking = asyncio.create_task(ask(running, body()))
        await running.decode.arrived.wait()
        running.decode.health = (503, {"status": told})
        await until_healthy_is(running, running.decode, False)
        status, reply = await ask(running, body())
        assert (status, reply["error"]["code"], reply["error"]["stage"]) == (503, "no_healthy_pair", "pick")
        assert reply["error"]["message"] == (
            f"no decode worker can take a request: {running.decode.url}: it says: {told}"
        )
        running.decode.release.set()
        check_answer(*await asking)


async def test_a_worker_whose_port_is_closed_gets_no_legs():
    async with stack() as running:
        gone = running.url.rsplit(":", 1)[0] + ":1"
        options = RouterOptions(prefill=((running.prefill.url, 8998),), decode=(gone, running.decode.url), **ASKING)
        app = await stubs.create_app(RouterConfig(router=options))
        async with stubs.serving(app) as url, aiohttp.ClientSession(url) as running.client:
            while (entry := (await workers_of(running))[gone])["healthy"]:
                pass
            assert entry["reason"].startswith("no connection: ")
            for _ in range(3):
                check_answer(*await ask(running, body()))


@pytest.mark.parametrize("health", [(500, {}), (404, {"status": "?"})])
async def test_any_other_answer_is_a_bad_one(health):
    async with stack(router=ASKING) as running:
        running.prefill.health = health
        assert (await until_healthy_is(running, running.prefill, False))["reason"].startswith("it says: ")
        assert (await ask(running, body()))[0] == 503


async def test_nobody_waits_for_the_first_check():
    async with stack() as running:
        running.prefill.health = running.decode.health = None
        check_answer(*await ask(running, body()))
        assert not running.prefill.health_asked.is_set()
        workers = await workers_of(running)
    assert {(one["healthy"], one["reason"], one["breaker"]) for one in workers.values()} == {(True, None, "closed")}


async def test_a_router_that_can_ask_nobody_any_more_ends(monkeypatch: pytest.MonkeyPatch):
    async def defect(self, worker):
        raise KeyError("a defect")

    monkeypatch.setattr(HealthChecks, "_ask", defect)
    flags = [f"--port={free_port()}", "--worker=http://127.0.0.1:1", "--health-interval-s=0.01"]
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(ExceptionGroup) as error:
            await serve(parse_router_config(flags))
    assert error.group_contains(KeyError, match="a defect")


def mark_unhealthy(app, role):
    for worker in app[CHECKS]._membership.workers:
        if worker.role == role:
            worker.mark_unhealthy("it was away", ends_legs=False)


@pytest.mark.parametrize("stream", [False, True])
async def test_who_is_well_again_is_asked_before_anybody_is_turned_away(stream):
    async with stack() as running:
        options = RouterOptions(
            prefill=((running.prefill.url, 8998),), decode=(running.decode.url,), health_interval_s=3600.0
        )
        app = await stubs.create_app(RouterConfig(router=options))
        async with stubs.serving(app) as url, aiohttp.ClientSession(url) as running.client:
            for role in LEGS:
                mark_unhealthy(app, role)
                check_answer(*await ask(running, body(stream=stream)))
            mark_unhealthy(app, "decode")
            running.decode.health = STUCK
            status, reply = await ask(running, body())
            assert (status, reply["error"]["stage"]) == (503, "pick")
            assert "the engine has been in one step" in reply["error"]["message"]
            assert len(running.prefill.samples) == len(LEGS)


async def test_nobody_is_waited_for_who_is_not_needed():
    async with stack() as running:
        options = RouterOptions(
            prefill=((running.prefill.url, 8998),), decode=(running.decode.url,), health_interval_s=3600.0
        )
        app = await stubs.create_app(RouterConfig(router=options))
        async with stubs.serving(app) as url, aiohttp.ClientSession(url) as running.client:
            mark_unhealthy(app, "decode")
            assert (await ask(running, body(sampling_params={"max_new_tokens": 0})))[0] == 200
            assert not running.decode.health_asked.is_set()


async def test_who_comes_while_workers_are_asked_waits_for_newer_answers():
    membership, told, asked = Membership(RouterOptions(worker=("http://w",))), asyncio.Queue(), asyncio.Queue()

    async def answer(worker):
        asked.put_nowait(worker)
        if (await told.get()) == "well":
            worker.mark_healthy(1)
        return True

    async with aiohttp.ClientSession() as session:
        checks = HealthChecks(session, membership, RouterOptions())
        checks._ask = answer
        [worker] = membership.workers
        worker.mark_unhealthy("it was away", ends_legs=False)
        first = asyncio.create_task(checks.ask_unwell())
        await asked.get()
        later = [asyncio.create_task(checks.ask_unwell()) for _ in range(3)]
        await asyncio.wait(later, timeout=0)
        later += [asyncio.create_task(checks.ask_unwell()) for _ in range(3)]
        told.put_nowait("not yet")
        await first
        assert worker.unhealthy_reason is not None
        told.put_nowait("well")
        await asyncio.gather(*later)
        assert worker.unhealthy_reason is None
        assert asked.qsize() == 1
