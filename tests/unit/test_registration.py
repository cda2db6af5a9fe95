"""How a worker joins a router by itself, over a stand-in for the router: again and again, and whatever it answers."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from common.config import RegistrationOptions, ServerOptions
from common.errors import UsageError
from common.process import free_port
from common.server.registration import Registration, own_url
from tests.support.processes import DEADLINE_S, until
from tests.support.stub_workers import serving

SERVER = ServerOptions(host="10.0.0.5", port=8100)


@dataclass
class StubRouter:
    """Answers each POST with the next of `answers`, and then always with the last one; None: a lost connection."""

    answers: list[tuple[int, Any] | None]
    url: str = ""
    joined: list[dict[str, Any]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    lets_go: bool = True

    async def join(self, request: web.Request) -> web.Response:
        self.joined.append(await request.json())
        self.keys.append(request.headers.get("Authorization"))
        answer = self.answers[min(len(self.joined), len(self.answers)) - 1]
        if answer is None:
            assert request.transport is not None
            request.transport.abort()
            await asyncio.Event().wait()
        assert answer is not None
        return web.json_response(answer[1], status=answer[0])

    async def leave(self, request: web.Request) -> web.Response:
        self.left.append(request.match_info["worker"])
        self.keys.append(request.headers.get("Authorization"))
        if not self.lets_go:
            await asyncio.Event().wait()
        return web.json_response({"status": "gone"})

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/workers", self.join)
        app.router.add_delete("/workers/{worker}", self.leave)
        return app


@asynccontextmanager
async def router(*answers: tuple[int, Any] | None) -> AsyncIterator[StubRouter]:
    stub = StubRouter(list(answers))
    async with serving(stub.app()) as stub.url:
        yield stub


def registration_with(stub: StubRouter, port: int | None = None, **options: Any) -> Registration:
    told: dict[str, Any] = {"register": stub.url, "register_lease_s": 0.3} | options
    return Registration("decode" if port is None else "prefill", RegistrationOptions(**told), SERVER, port)


@asynccontextmanager
async def running(registration: Registration) -> AsyncIterator[None]:
    task = asyncio.create_task(registration.run())
    yield
    task.cancel()
    await asyncio.wait([task])


async def test_a_worker_joins_says_what_it_is_and_renews():
    async with router((201, {"id": "w1"}), (200, {"id": "w1"})) as stub:
        async with running(registration_with(stub, 9000, register_key="secret", advertise_url="http://me:1/")):
            await until(lambda: len(stub.joined) >= 3)
        instances = [one.pop("instance") for one in stub.joined]
        assert len(set(instances)) == 1
        assert stub.joined[0] == {
            "url": "http://me:1/",
            "worker_type": "prefill",
            "bootstrap_port": 9000,
            "lease_s": 0.3,
        }
        async with running(registration_with(stub)):
            await until(lambda: stub.joined[-1]["worker_type"] == "decode")
        assert stub.joined[-1].pop("instance") != instances[0]
        assert stub.joined[-1] == {"url": "http://10.0.0.5:8100", "worker_type": "decode", "lease_s": 0.3}
    assert stub.keys[0] == "Bearer secret"
    assert stub.keys[-1] is None


@pytest.mark.parametrize("bad", [None, (400, {"error": {"message": "they do not mix"}}), (503, {}), (200, ["?"])])
async def test_a_router_that_does_not_take_it_is_asked_again_and_told_of_once(bad: Any, caplog):
    caplog.set_level(logging.INFO, "common.server.registration")
    async with router(bad, bad, bad, (200, {"id": "w1"})) as stub, running(registration_with(stub)):
        await until(lambda: len(stub.joined) >= 5)
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    # On a slow machine an answer may come too late, which is told of too.
    assert len([line for line in warnings if "TimeoutError" not in line.getMessage()]) == 1
    assert "has this worker as w1" in caplog.text


async def test_a_router_that_is_not_there_yet_is_waited_for(caplog):
    stub, port = StubRouter([(201, {"id": "w1"})]), free_port()
    stub.url = f"http://127.0.0.1:{port}"
    async with running(registration_with(stub)):
        await until(lambda: "has not taken this worker" in caplog.text)
        runner = web.AppRunner(stub.app())
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await until(lambda: len(stub.joined) >= 1)
    await runner.cleanup()


async def test_who_leaves_goes_by_the_name_that_the_router_said_last():
    async with router((201, {"id": "w1"}), (201, {"id": "a/b"}), (400, {})) as stub:
        # Time enough for each answer: an id that comes too late is none.
        registration = registration_with(stub, register_key="secret", register_lease_s=0.9)
        async with running(registration):
            await until(lambda: len(stub.joined) >= 3)
        await registration.leave(10.0)
        assert stub.left == ["a/b"]
    assert stub.keys[-1] == "Bearer secret"


async def test_who_was_removed_asks_no_more():
    async with router((201, {"id": "w1"}), (410, {"error": {"message": "it was removed"}})) as stub:
        registration = registration_with(stub)
        async with asyncio.timeout(DEADLINE_S):
            await registration.run()
        await registration.leave(10.0)
        assert (len(stub.joined), stub.left) == (2, [])


async def test_who_was_never_taken_does_not_leave():
    async with router((400, {})) as stub:
        registration = registration_with(stub)
        async with running(registration):
            await until(lambda: len(stub.joined) >= 2)
        await registration.leave(10.0)
        assert stub.left == []


async def test_a_router_that_does_not_let_go_or_is_gone_is_not_waited_for():
    async with router((201, {"id": "w1"})) as stub:
        stub.lets_go = False
        registration = registration_with(stub)
        async with running(registration):
            await until(lambda: len(stub.joined) >= 2)
        async with asyncio.timeout(DEADLINE_S):
            await registration.leave(0.05)
        assert stub.left == ["w1"]
    await registration.leave(10.0)


async def test_without_a_router_there_is_nothing_to_do():
    registration = Registration("decode", RegistrationOptions(), ServerOptions(host="0.0.0.0"), None)
    await registration.run()
    await registration.leave(10.0)


@pytest.mark.parametrize(
    ("host", "advertised", "expected"),
    [
        ("10.0.0.5", "", "http://10.0.0.5:8000"),
        ("::1", "", "http://[::1]:8000"),
        ("0.0.0.0", "https://me:1", "https://me:1"),
    ],
)
def test_the_url_is_that_of_the_socket_or_the_one_that_is_named(host: str, advertised: str, expected: str):
    options = RegistrationOptions(register="http://router:1", advertise_url=advertised)
    assert own_url(options, ServerOptions(host=host)) == expected


@pytest.mark.parametrize(
    ("options", "host", "flag"),
    [
        ({"register": "router:1"}, "127.0.0.1", "--register router:1"),
        ({"register": "http://router:1", "advertise_url": "me"}, "127.0.0.1", "--advertise-url me"),
        ({"register": "http://router:1"}, "0.0.0.0", "--advertise-url is required"),
        ({"register": "http://router:1"}, "::", "--advertise-url is required"),
    ],
)
def test_options_that_cannot_be_used_are_refused_at_the_start(options: dict[str, Any], host: str, flag: str):
    with pytest.raises(UsageError, match=flag):
        Registration("decode", RegistrationOptions(**options), ServerOptions(host=host), None)
