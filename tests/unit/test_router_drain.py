"""The router's orderly end: what runs ends well, nothing new begins, and the process exits with 0."""

import asyncio
import json
import signal

import aiohttp
import pytest

from common.messages import ReportedError
from common.process import free_port, spawn_async
from router.drain import Drain
from tests.support import stub_workers as stubs
from tests.support.asking import body, check_answer, last_event
from tests.support.stub_workers import StubWorker, serving_stub


async def test_sigterm_lets_requests_end_and_no_new_ones_begin():
    prefill, decode = StubWorker("prefill"), StubWorker("decode", stubs.after_release)
    async with asyncio.timeout(60), serving_stub(prefill), serving_stub(decode):
        port = free_port()
        options = ["--prefill", prefill.url, "8998", "--decode", decode.url, f"--port={port}"]
        process = await spawn_async("router", [*options, "--shutdown-deadline-s=30"])
        url = f"http://127.0.0.1:{port}"
        # One connection, which therefore is one that is open when the router begins to drain.
        one = aiohttp.TCPConnector(limit=1)
        try:
            async with aiohttp.ClientSession() as client, aiohttp.ClientSession(connector=one) as same:
                await until_it_listens(same, url)
                plain = asyncio.create_task(whole(client, f"{url}/generate", body()))
                stream = asyncio.create_task(whole(client, f"{url}/generate", body(stream=True)))
                while len(decode.samples) < 2:
                    decode.arrived.clear()
                    await decode.arrived.wait()
                process.send_signal(signal.SIGTERM)
                while (health := await get(same, f"{url}/health"))[0] == 200:
                    pass
                assert health == (503, {"status": "draining"})
                async with same.post(f"{url}/generate", json=body()) as response:
                    assert response.status == 503
                    assert (await response.json())["error"]["code"] == "draining"
                with pytest.raises(aiohttp.ClientConnectorError):
                    await get(client, f"{url}/health")
                decode.release.set()
                check_answer(200, json.loads(await plain))
                check_answer(200, last_event(await stream))
                assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def get(client, url):
    async with client.get(url) as response:
        return response.status, await response.json()


async def whole(client, url, request):
    async with client.post(url, json=request) as response:
        assert response.status == 200, await response.text()
        return await response.text()


async def until_it_listens(client, url):
    while True:
        try:
            return await get(client, f"{url}/health")
        except aiohttp.ClientConnectorError:
            await asyncio.sleep(0.01)


async def test_requests_that_take_too_long_are_cut_off():
    drain, begun = Drain(), asyncio.Event()

    async def last_for_ever():
        with drain.entered():
            begun.set()
            await asyncio.Event().wait()

    request = asyncio.create_task(last_for_ever())
    await begun.wait()
    await drain.finish(0.01)
    await asyncio.wait([request])
    assert request.cancelled()
    with pytest.raises(ReportedError, match="shutting down"), drain.entered():
        pass
