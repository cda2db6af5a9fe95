"""A worker whose engine is silent, crowded or gone says so, and fails what is open instead of letting it wait."""

import asyncio
from typing import Any

import pytest

from common.config import EngineOptions
from common.messages import Abort, Beat, GetStats
from tests.support.scripted_worker import ROOM, TOKENIZER, Worker, scripted_worker

WORDS = TOKENIZER.encode("The river was wide.")
ENGINE = EngineOptions(engine_deadline_s=30.0)


def asked(**fields: Any) -> dict[str, Any]:
    return {"input_ids": [10, 11], **ROOM, "bootstrap_room": 7, **fields}


def beat(worker: Worker, *, quarantined: int = 0) -> None:
    worker.engine.answer(Beat(num_steps=1, quarantined_pages=quarantined, num_pages=10))


async def refused(worker: Worker) -> tuple[int, str, str, str]:
    """What a new request is answered."""
    status, body = await worker.post(**asked())
    error = body["error"]
    return status, error["code"], error["leg"], error["stage"]


async def served(worker: Worker) -> bool:
    """Whether a new request is served."""
    request = asyncio.create_task(worker.post(**asked()))
    worker.engine.finish(await worker.engine.next_generate(), WORDS)
    return (await request)[0] == 200


async def test_a_silent_engine_fails_what_is_open_and_gets_its_aborts():
    async with scripted_worker(options=ENGINE) as worker:
        assert await worker.get("/health") == (
            200,
            {"status": "ok", "dp_size": 1, "paused": False, "weight_version": "w1", "model_path": "demo"},
        )
        whole = asyncio.create_task(worker.post(**asked()))
        first = await worker.engine.next_generate()
        stream = asyncio.create_task(worker.stream(**asked()))
        second = await worker.engine.next_generate()
        worker.engine.tokens(second, WORDS[:1])
        stats = asyncio.create_task(worker.get("/v1/loads"))
        assert isinstance(await worker.engine.next(), GetStats)
        await worker.clock.advance(31.0)
        status, body = await whole
        *_, event = await stream
        message = "the engine has been silent for 30 s"
        assert status == 504
        assert (await stats)[0] == 504
        for error in (body["error"], event["error"]):
            assert (error["code"], error["leg"], error["stage"]) == ("deadline_exceeded", "decode", "engine")
            assert error["message"] == message
        assert {await worker.engine.next(), await worker.engine.next()} == {Abort(first.rid), Abort(second.rid)}
        # As long as it is silent nothing is sent to it.
        for _ in range(2):
            assert await refused(worker) == (503, "engine_stuck", "decode", "engine")
            assert (await worker.get("/v1/loads"))[0] == 503
            assert await worker.get("/health") == (503, {"status": "unhealthy", "reason": message})
            await worker.clock.advance(100.0)
        # It comes back, with what it had done before.
        worker.engine.finish(first, WORDS)
        assert await worker.get("/health") == (
            200,
            {"status": "ok", "dp_size": 1, "paused": False, "weight_version": "w1", "model_path": "demo"},
        )
        assert await served(worker)
        # And is watched as before.
        await worker.clock.advance(31.0)
        assert (await worker.get("/health"))[0] == 503


async def test_an_engine_that_beats_may_take_its_time():
    async with scripted_worker(options=ENGINE) as worker:
        request = asyncio.create_task(worker.post(**asked()))
        message = await worker.engine.next_generate()
        for _ in range(10):
            await worker.clock.advance(29.0)
            beat(worker)
            assert (await worker.get("/health"))[0] == 200
        worker.engine.finish(message, WORDS)
        assert (await request)[0] == 200


async def test_what_waits_to_be_read_is_read_before_the_engine_is_blamed():
    """A frontend that was itself stopped finds its deadline passed, and all beats in its socket."""
    async with scripted_worker(options=ENGINE) as worker:
        request = asyncio.create_task(worker.post(**asked()))
        message = await worker.engine.next_generate()
        await worker.clock.advance(30.01)
        beat(worker)
        assert (await worker.get("/health"))[0] == 200
        await worker.clock.advance(1.0)
        worker.engine.finish(message, WORDS)
        assert (await request)[0] == 200


async def test_too_many_pages_in_quarantine():
    async with scripted_worker(options=EngineOptions(max_quarantine=0.5, quarantine_patience_s=5.0)) as worker:
        beat(worker, quarantined=5)
        assert (await worker.get("/health"))[0] == 200
        assert await served(worker)
        request = asyncio.create_task(worker.post(**asked()))
        running = await worker.engine.next_generate()
        beat(worker, quarantined=6)
        await worker.clock.advance(4.9)
        beat(worker, quarantined=6)
        assert (await worker.get("/health"))[0] == 200, "many aborts at once are no fault"
        beat(worker, quarantined=5)
        beat(worker, quarantined=6)
        await worker.clock.advance(4.9)
        beat(worker, quarantined=6)
        assert (await worker.get("/health"))[0] == 200, "it had come back in between"
        await worker.clock.advance(0.1)
        beat(worker, quarantined=6)
        reason = "6 of 10 KV pages are in quarantine"
        assert await worker.get("/health") == (503, {"status": "crowded", "reason": reason})
        assert await refused(worker) == (503, "quarantine_full", "decode", "engine")
        worker.engine.finish(running, WORDS)
        assert (await request)[0] == 200, "what was taken in before goes on"
        beat(worker, quarantined=5)
        assert (await worker.get("/health"))[0] == 200
        assert await served(worker)


async def test_an_engine_that_has_ended():
    async with scripted_worker() as worker:
        request = asyncio.create_task(worker.post(**asked()))
        await worker.engine.next_generate()
        worker.engine_client.fail("the engine process has ended")
        status, body = await request
        assert status == 502
        assert (body["error"]["code"], body["error"]["leg"], body["error"]["stage"]) == (
            "leg_failed",
            "decode",
            "engine",
        )
        assert await refused(worker) == (503, "engine_ended", "decode", "engine")
        reason = "the engine process has ended"
        assert await worker.get("/health") == (503, {"status": "unhealthy", "reason": reason})


@pytest.mark.parametrize("streams", [True, False])
async def test_a_worker_that_is_draining(streams: bool):
    async with scripted_worker() as worker:
        request = asyncio.create_task(worker.post(**asked(stream=False)))
        message = await worker.engine.next_generate()
        draining = asyncio.create_task(worker.app.drain())
        health = await worker.get("/health")
        assert health == (503, {"status": "draining", "reason": "this server is shutting down"})
        status, body = await worker.post(**asked(stream=streams))
        assert (status, body["error"]["code"]) == (503, "draining")
        assert not draining.done()
        worker.engine.finish(message, WORDS)
        assert (await request)[0] == 200
        await draining


async def test_draining_a_worker_without_requests_is_done_at_once():
    async with scripted_worker() as worker:
        await worker.app.drain()
        assert (await worker.get("/health"))[0] == 503


async def test_a_health_check_has_a_deadline_of_its_own():
    async with scripted_worker("prefill", options=EngineOptions(health_deadline_s=0.05)) as worker:
        status, body = await worker.get("/health_generate")
        assert (status, body["error"]["code"], body["error"]["leg"]) == (504, "deadline_exceeded", "prefill")
        message = await worker.engine.next_generate()
        assert await worker.engine.next() == Abort(message.rid)
        worker.engine_client.fail("gone")
        assert (await worker.get("/health_generate"))[0] == 503
