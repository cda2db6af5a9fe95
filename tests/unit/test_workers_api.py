"""The routes by which workers come and go, over a router and stub workers with real sockets; and what /health tells of them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest

from router.config import RouterConfig, RouterOptions
from tests.support import stub_workers as stubs
from tests.support.asking import ask, body, check_answer, check_nothing_is_left, metrics_of, workers_of
from tests.support.stub_workers import Stack, StubWorker, stack

ASKING = {"health_interval_s": 0.02, "health_timeout_s": 0.5, "unhealthy_after_s": 1.0}


async def join(running: Stack, stub: StubWorker, **fields: Any) -> tuple[int, dict[str, Any]]:
    """Have a worker join; gives the status and the answer."""
    told = {"url": stub.url, "worker_type": stub.role} | ({"bootstrap_port": 8998} if stub.role == "prefill" else {})
    async with running.client.post("/workers", json=told | fields) as response:
        return response.status, await response.json()


async def leave(running: Stack, name: str) -> tuple[int, dict[str, Any]]:
    """Have a worker leave, by its id or its URL."""
    async with running.client.delete(f"/workers/{quote(name, safe='')}") as response:
        return response.status, await response.json()


@asynccontextmanager
async def empty_router(running: Stack, **router: Any) -> AsyncIterator[None]:
    """A router without workers in the place of the stack's own."""
    options = RouterOptions(**{"max_retries": 0, "health_interval_s": 3600.0} | router)
    app = await stubs.create_app(RouterConfig(router=options))
    async with stubs.serving(app) as url, aiohttp.ClientSession(url) as running.client:
        yield


async def until_asked(stub: StubWorker, times: int) -> None:
    """Wait until a worker has been asked for its health so often."""
    for _ in range(times):
        stub.health_asked.clear()
        await stub.health_asked.wait()


async def test_a_router_without_workers_serves_once_a_pair_has_joined():
    async with stack() as running, empty_router(running):
        status, reply = await ask(running, body())
        assert (status, reply["error"]["code"]) == (503, "no_healthy_pair")
        assert (await join(running, running.decode))[0] == 201
        assert (await ask(running, body()))[0] == 503
        status, prefill = await join(running, running.prefill)
        assert status == 201
        check_answer(*await ask(running, body()))
        assert await join(running, running.prefill) == (200, prefill)
        assert (await workers_of(running))[running.prefill.url] == prefill
        (leg,) = running.decode.samples
        assert leg.bootstrap is not None
        assert leg.bootstrap.port == 8998


async def test_a_regular_worker_is_an_aggregated_one():
    async with stack() as running, empty_router(running):
        told = {"url": running.decode.url, "worker_type": "regular", "bootstrap_port": None}
        async with running.client.post("/workers", json=told) as response:
            assert (response.status, (await response.json())["worker_type"]) == (201, "aggregated")
        status, answer = await join(running, running.prefill)
        assert (status, "the two do not mix" in answer["error"]["message"]) == (400, True)


async def test_the_list_tells_all_of_each_worker():
    async with stack(router=ASKING) as running:
        running.prefill.health = (200, {"dp_size": 2, "weight_version": "w7", "model_path": "m", "paused": True})
        await join(running, running.decode, lease_s=3600.0)
        while (workers := await workers_of(running))[running.prefill.url]["dp_size"] != 2:
            pass
        async with running.client.get("/list_workers") as response:
            listed = await response.json()
        assert [one["url"] for one in listed["workers"]] == listed["urls"] == list(workers)
    one, other = workers.values()
    assert {**one, "id": "?"} == {
        "id": "?",
        "url": running.prefill.url,
        "worker_type": "prefill",
        "bootstrap_port": 8998,
        "dp_size": 2,
        "model": "m",
        "weight_version": "w7",
        "lease_s": None,
        "outstanding_requests": 0,
        "outstanding_tokens": 0,
        "healthy": True,
        "reason": None,
        "is_draining": False,
        "is_paused": True,
        "breaker": "closed",
    }
    assert one["id"] != other["id"]
    assert (other["model"], other["weight_version"], other["lease_s"], other["is_paused"]) == (
        None,
        None,
        3600.0,
        False,
    )


async def test_the_router_counts_legs_and_their_tokens():
    async with stack(prefill=stubs.after_release, decode=stubs.after_release) as running:
        asking = asyncio.create_task(ask(running, body(sampling_params={"n": 2})))
        await running.decode.arrived.wait()
        async with running.client.get("/v1/loads") as response:
            loads = (await response.json())["workers"]
        assert [(one["outstanding_requests"], one["outstanding_tokens"]) for one in loads] == [(1, 7 + 2 * 4)] * 2
        for stub in (running.prefill, running.decode):
            stub.release.set()
        await asking
        await check_nothing_is_left(running)
        assert [one["outstanding_tokens"] for one in (await workers_of(running)).values()] == [0, 0]


GOOD = {"url": "http://a:1", "worker_type": "decode"}


@pytest.mark.parametrize(
    ("told", "field"),
    [
        ({"worker_type": "decode"}, "url"),
        (GOOD | {"url": "a:1"}, "url"),
        (GOOD | {"url": "ftp://a:1"}, "url"),
        (GOOD | {"url": "http://a:1/?x=1"}, "url"),
        (GOOD | {"url": "http://[:1"}, "url"),
        (GOOD | {"url": 5}, "url"),
        (GOOD | {"url": "http://" + "a" * 3000}, "url"),
        ({"url": "http://a:1"}, "worker_type"),
        (GOOD | {"worker_type": "router"}, "worker_type"),
        (GOOD | {"worker_type": "aggregated"}, "worker_type"),
        (GOOD | {"worker_type": "regular"}, "worker_type"),
        (GOOD | {"worker_type": "Regular"}, "worker_type"),
        (GOOD | {"bootstrap_port": 1}, "bootstrap_port"),
        (GOOD | {"worker_type": "prefill"}, "bootstrap_port"),
        (GOOD | {"worker_type": "prefill", "bootstrap_port": 0}, "bootstrap_port"),
        (GOOD | {"worker_type": "prefill", "bootstrap_port": "1"}, "bootstrap_port"),
        (GOOD | {"lease_s": 0}, "lease_s"),
        (GOOD | {"lease_s": -1.0}, "lease_s"),
        (GOOD | {"lease_s": "1"}, "lease_s"),
        (GOOD | {"lease_s": 1e300}, "lease_s"),
        (GOOD | {"instance": 1}, "instance"),
        (GOOD | {"instance": "i" * 129}, "instance"),
        ([], "body"),
    ],
)
async def test_a_worker_that_cannot_be_one_is_refused_with_the_field(told: Any, field: str):
    async with stack() as running:
        before = await workers_of(running)
        async with running.client.post("/workers", json=told) as response:
            error = (await response.json())["error"]
        assert response.status == 400
        assert error["message"].startswith(f"{field}: ")
        assert await workers_of(running) == before


async def test_the_routes_ask_for_the_key():
    async with stack(server={"api_key": "secret"}) as running:
        assert (await join(running, running.decode))[0] == 401
        assert (await leave(running, running.decode.url))[0] == 401
        async with running.client.get("/workers", headers={"Authorization": "Bearer secret"}) as response:
            assert len((await response.json())["workers"]) == 2


# ------------------------------------------------------------------------------------------------ leaving


async def test_who_leaves_ends_its_legs_and_gets_no_more():
    async with stack(decode=stubs.after_release, num_pairs=2) as running:
        other = running.pairs[1][1]
        asking = asyncio.create_task(ask(running, body()))
        await running.decode.arrived.wait()
        leaving = asyncio.create_task(leave(running, running.decode.url))
        while not (await workers_of(running))[running.decode.url]["is_draining"]:
            pass
        for _ in range(4):
            check_answer(*await ask(running, body()))
        assert (len(running.decode.samples), len(other.samples)) == (1, 4)
        assert not leaving.done()
        running.decode.release.set()
        check_answer(*await asking)
        status, answer = await leaving
        assert (status, answer["status"], answer["worker"]["url"]) == (200, "gone", running.decode.url)
        assert running.decode.url not in await workers_of(running)
        assert running.decode.url not in await metrics_of(running)
        assert (await leave(running, running.decode.url))[0] == 404
        check_answer(*await ask(running, body()))


async def test_a_worker_that_takes_long_is_left_to_drain():
    async with stack(decode=stubs.after_release, router={"control_deadline_s": 0.05}) as running:
        asking = asyncio.create_task(ask(running, body()))
        await running.decode.arrived.wait()
        name = (await workers_of(running))[running.decode.url]["id"]
        for _ in range(2):
            status, answer = await leave(running, name)
            assert (status, answer["status"], answer["worker"]["is_draining"]) == (202, "draining", True)
        status, reply = await ask(running, body())
        assert (status, "it is being removed" in reply["error"]["message"]) == (503, True)
        running.decode.release.set()
        check_answer(*await asking)
        assert running.decode.url not in await workers_of(running)


async def test_a_process_that_joins_by_itself_does_not_come_back_after_it_was_removed():
    async with stack() as running, empty_router(running):
        for instance in ("one", "two"):
            assert (await join(running, running.decode, instance=instance))[0] == 201
            assert (await leave(running, running.decode.url))[0] == 200
            status, answer = await join(running, running.decode, instance=instance)
            assert (status, answer["error"]["code"]) == (410, "worker_removed")
        assert await workers_of(running) == {}


@pytest.mark.parametrize("name", ["nobody", "http://127.0.0.1:1", "a/b"])
async def test_nobody_cannot_leave(name: str):
    async with stack() as running:
        status, answer = await leave(running, name)
        assert (status, answer["error"]["code"]) == (404, "not_found")


async def test_two_workers_at_one_url_are_one_series_in_the_metrics():
    async with stack(prefill=stubs.after_release) as running:
        asking = asyncio.create_task(ask(running, body()))
        await running.prefill.arrived.wait()
        assert (await join(running, running.prefill, bootstrap_port=9000))[0] == 201
        metrics = await metrics_of(running)
        series = f'tandem_router_worker_healthy{{role="prefill",worker="{running.prefill.url}"}}'
        assert metrics.count(series) == 1
        running.prefill.release.set()
        check_answer(*await asking)
        check_answer(*await ask(running, body()))
        leg = running.prefill.samples[-1]
        assert leg.bootstrap is not None
        assert leg.bootstrap.port == 9000


# ------------------------------------------------------------------------------------------------ health and leases


async def test_who_has_joined_is_asked_for_its_health_until_it_is_gone():
    async with stack() as running, empty_router(running, **ASKING):
        await join(running, running.decode)
        running.decode.health = (503, {"status": "unhealthy", "reason": "it is stuck"})
        while (await workers_of(running))[running.decode.url]["healthy"]:
            pass
        assert (await leave(running, running.decode.url))[0] == 200
        await join(running, running.prefill)
        # A question may have been on its way; the next one would have come with the next ones to who has stayed.
        await until_asked(running.prefill, 1)
        running.decode.health_asked.clear()
        await until_asked(running.prefill, 3)
        assert not running.decode.health_asked.is_set()


async def test_a_worker_that_does_not_renew_its_lease_is_gone():
    async with stack() as running, empty_router(running, **ASKING):
        await join(running, running.prefill)
        await join(running, running.decode, lease_s=0.05)
        while running.decode.url in await workers_of(running):
            pass
        assert list(await workers_of(running)) == [running.prefill.url]


async def test_legs_of_a_paused_worker_run_into_no_deadline_of_their_own():
    router = ASKING | {"prefill_deadline_s": 0.5, "max_retries": 0}
    async with stack(prefill=stubs.after_release, router=router) as running:
        running.prefill.health = (200, {"paused": True})
        while not (await workers_of(running))[running.prefill.url]["is_paused"]:
            pass
        asking = asyncio.create_task(ask(running, body()))
        # With the pauses between them these take longer than the deadline.
        await until_asked(running.prefill, 30)
        assert not asking.done()
        running.prefill.health = (200, {"paused": False})
        status, reply = await asking
    assert (status, reply["error"]["leg"], reply["error"]["stage"]) == (504, "prefill", "prefill")


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
async def test_requests_with_one_session_go_to_one_pair(path: str):
    said = {"messages": [{"role": "user", "content": "a"}]} if "chat" in path else {"prompt": [1, 2, 3]}
    request = body() if path == "/generate" else {"model": "m", "max_tokens": 2, **said}
    async with stack(num_pairs=4) as running:
        for session in ("x", "y", "z"):
            for pair in running.pairs:
                for stub in pair:
                    stub.samples.clear()
            for _ in range(5):
                async with running.client.post(path, json=request, headers={"X-Session-Id": session}) as response:
                    assert response.status == 200, await response.text()
            for leg in (0, 1):
                assert sorted(len(pair[leg].samples) for pair in running.pairs) == [0, 0, 0, 5]
        async with running.client.post(path, json=request, headers={"x-session-id": "k" * 513}) as response:
            assert response.status == 400
            assert "x-session-id" in (await response.json())["error"]["message"]


async def test_both_legs_are_of_one_weight_version_where_that_can_be():
    async with stack(num_pairs=2, router=ASKING | {"policy": "random"}) as running:
        for index, pair in enumerate(running.pairs):
            for stub in pair:
                stub.weight_version = f"w{index}"
                stub.health = (200, {"weight_version": f"w{index}"})
        while None in [one["weight_version"] for one in (await workers_of(running)).values()]:
            pass
        for _ in range(20):
            check_answer(*await ask(running, body()))
        for prefill, decode in running.pairs:
            assert len(prefill.samples) == len(decode.samples) > 0
