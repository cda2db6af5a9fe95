"""The router's pause: who waits at the gate, what becomes of open prompts, and what the workers are told; over stub workers."""

import asyncio
import json
from contextlib import asynccontextmanager

import numpy as np
import pytest

from common.errors import DeadlineExceeded
from common.routed_experts.codec import rows_from_reply
from router.gate import Gate
from router.registry import OpenSample
from tests.support import stub_workers as stubs
from tests.support.asking import P, ask, body, check_answer, check_nothing_is_left
from tests.support.processes import until
from tests.support.rows import SPEC
from tests.support.stub_workers import ROWS, stack

MIXING = {"allow_mixed_versions": True}


async def order(running, path, **fields):
    async with running.client.post(path, json=fields) as response:
        return response.status, await response.json()


async def abort(running, **fields):
    status, reply = await order(running, "/abort_request", **fields)
    assert status == 200
    return reply["aborted"]


@asynccontextmanager
async def asked(running, request):
    """A request on its way; it is over when the block is left."""
    async with asyncio.TaskGroup() as group:
        yield group.create_task(ask(running, request))


class Watched:
    """Who comes to a closed gate, and who has left it."""

    def __init__(self):
        self.come, self.gone = asyncio.Semaphore(0), asyncio.Semaphore(0)


@pytest.fixture
async def at_gate(monkeypatch):
    watched, wait = Watched(), Gate.wait

    async def watch(gate, entry, deadline):
        if not gate.is_closed:
            return
        watched.come.release()
        try:
            await wait(gate, entry, deadline)
        finally:
            watched.gone.release()

    monkeypatch.setattr(Gate, "wait", watch)
    return watched


def paused_at_its_seam(num_tokens):
    """Give the leg back once generation is paused, as a worker does that is told to retract; answer later ones well."""

    async def behaviour(stub, request, sample):
        if len(stub.samples) == 1:
            await stub.paused.wait()
            return await stub.send(request, sample, num_tokens=num_tokens, cause="retracted")
        return await stubs.good(stub, request, sample)

    return behaviour


# ------------------------------------------------------------------------------------------------ what the workers hear


@pytest.mark.parametrize(
    ("given", "mode"), [({}, "abort"), ({"mode": "retract"}, "retract"), ({"mode": "in_place"}, "in_place")]
)
async def test_all_workers_are_told(given, mode):
    async with stack(num_pairs=2) as running:
        status, reply = await order(running, "/pause_generation", **given)
        assert (status, reply["status"], reply["mode"]) == (200, "ok", mode)
        assert {(worker["worker_type"], worker["status"]) for worker in reply["workers"]} == {
            ("prefill", 200),
            ("decode", 200),
        }
        status, reply = await order(running, "/continue_generation")
        assert (status, len(reply["workers"])) == (200, 4)
        for pair in running.pairs:
            for stub in pair:
                paths = [path for path, _ in stub.orders]
                assert paths == ["/pause_generation", "/continue_generation"]
                assert json.loads(stub.orders[0][1]) == {"mode": mode}


async def test_a_pause_without_a_body_aborts():
    async with stack() as running, running.client.post("/pause_generation") as response:
        assert (await response.json())["mode"] == "abort"


@pytest.mark.parametrize("mode", ["gently", "", 7])
async def test_an_unknown_mode_is_refused_and_nothing_happens(mode):
    async with stack() as running:
        status, reply = await order(running, "/pause_generation", mode=mode)
        assert status == 400
        assert reply["error"]["message"].startswith("mode: ")
        assert running.prefill.orders == []
        check_answer(*await ask(running, body()))


@pytest.mark.parametrize(("status", "expected"), [(409, 400), (503, 502)])
async def test_a_worker_that_does_not_pause_is_reported(status, expected):
    async with stack() as running:
        running.decode.order_status = status
        code, reply = await order(running, "/pause_generation", mode="in_place")
        assert (code, reply["status"]) == (expected, "failed")
        assert [(w["status"], w["message"]) for w in reply["workers"]] == [(200, "done"), (status, "not now")]
        code, _ = await order(running, "/continue_generation")
        assert code == expected
        # One that is gone must not hold the others.
        check_answer(*await ask(running, body()))


# ------------------------------------------------------------------------------------------------ the gate


@pytest.mark.parametrize("stream", [False, True])
async def test_a_new_prompt_waits_until_generation_continues(stream, at_gate):
    async with stack() as running:
        await order(running, "/pause_generation")
        async with asked(running, body(stream=stream)) as reply:
            await at_gate.come.acquire()
            assert running.prefill.samples == running.decode.samples == []
            await order(running, "/continue_generation")
        check_answer(*reply.result())


@pytest.mark.parametrize("stream", [False, True])
async def test_whoever_waits_longer_than_its_deadline_is_told_why(stream):
    async with stack(deadline_s=0.05) as running:
        await order(running, "/pause_generation")
        status, reply = await ask(running, body(stream=stream))
        assert (status, reply["error"]["code"], reply["error"]["stage"]) == (504, "deadline_exceeded", "paused")
        assert reply["error"]["rid"] == "mine"
        await check_nothing_is_left(running)
        assert running.prefill.samples == []


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_abort_ends_a_prompt_that_waits_with_nothing(stream, n, at_gate):
    async with stack() as running:
        await order(running, "/pause_generation")
        async with asked(running, body(stream=stream, sampling_params={"n": n})) as reply:
            await at_gate.come.acquire()
            assert await abort(running, rid="mine") == 1
        status, replies = reply.result()
    assert status == 200
    for one in replies if isinstance(replies, list) else [replies]:
        assert (one["output_ids"], one["text"], one["meta_info"]["prompt_tokens"]) == ([], "", P)
        assert one["meta_info"]["finish_reason"]["cause"] == "requested"
        assert "routed_experts" not in one["meta_info"]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_abort_ends_a_retracted_prompt_that_waits_with_what_it_has(stream, at_gate):
    async with stack(decode=paused_at_its_seam(2)) as running:
        async with asked(running, body(stream=stream, return_logprob=True) | MIXING) as reply:
            await running.decode.arrived.wait()
            await order(running, "/pause_generation", mode="retract")
            await at_gate.come.acquire()
            assert await abort(running, rid="mine") == 1
        status, one = reply.result()
        assert len(running.decode.samples) == 1
    assert (status, one["output_ids"], one["text"]) == (200, [100, 101], "<100><101>")
    assert one["meta_info"]["finish_reason"]["cause"] == "requested"
    assert [token for _, token, _ in one["meta_info"]["output_token_logprobs"]] == [100, 101]
    rows = rows_from_reply(one["meta_info"])[:, list(SPEC.layer_ids)]
    np.testing.assert_array_equal(rows, ROWS[: P + 1])


@pytest.mark.parametrize("mixing", [{}, MIXING])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_retracted_prompt_goes_on_when_generation_continues(stream, mixing):
    async with stack(decode=paused_at_its_seam(2)) as running:
        async with asked(running, body(stream=stream) | mixing) as reply:
            await running.decode.arrived.wait()
            await order(running, "/pause_generation", mode="retract")
            await order(running, "/continue_generation")
        check_answer(*reply.result())
        await check_nothing_is_left(running)


async def test_a_client_that_leaves_the_gate_leaves_nothing(at_gate):
    async with stack() as running:
        await order(running, "/pause_generation")
        reply = asyncio.create_task(ask(running, body()))
        await at_gate.come.acquire()
        reply.cancel()
        await at_gate.gone.acquire()
        await order(running, "/continue_generation")
        await check_nothing_is_left(running)
        assert running.prefill.samples == []


@pytest.mark.parametrize("stream", [False, True])
async def test_abort_mode_ends_the_open_prompts_with_what_they_have(stream):
    async with stack(prefill=stubs.good, decode=stubs.when_aborted(3)) as running:
        async with asked(running, body(stream=stream)) as reply:
            await running.decode.arrived.wait()
            status, _ = await order(running, "/pause_generation")
        assert status == 200
        code, one = reply.result()
        assert (code, one["output_ids"]) == (200, [100, 101, 102])
        assert one["meta_info"]["finish_reason"]["cause"] == "requested"
        # The legs were ended before the workers were paused: a paused one would keep them.
        assert running.decode.order_of == ["abort", "/pause_generation"]


async def test_in_place_mode_lets_the_legs_be():
    async with stack(decode=stubs.after_release) as running:
        async with asked(running, body()) as reply:
            await running.decode.arrived.wait()
            await order(running, "/pause_generation", mode="in_place")
            assert running.decode.aborts == []
            await order(running, "/continue_generation")
            running.decode.release.set()
        check_answer(*reply.result())


async def test_health_generate_says_that_it_is_paused():
    async with stack() as running:
        await order(running, "/pause_generation")
        async with running.client.get("/health_generate") as response:
            assert (response.status, (await response.json())["error"]["code"]) == (503, "paused")
        await order(running, "/continue_generation")
        async with running.client.get("/health_generate") as response:
            assert response.status == 200


async def test_a_gate_that_closes_again_holds_whoever_has_not_passed():
    gate, entry = Gate(), OpenSample("r")
    now = asyncio.get_running_loop().time()
    await gate.wait(entry, now)
    gate.close()
    waiting = asyncio.create_task(gate.wait(entry, now + 20))
    for _ in range(5):  # more turns than it takes to wait
        await asyncio.sleep(0)
    gate.open()
    gate.close()
    with pytest.raises(DeadlineExceeded):
        await gate.wait(OpenSample("other"), now)
    for _ in range(5):  # more turns than anybody needs who does pass
        await asyncio.sleep(0)
    assert not waiting.done()
    gate.open()
    await waiting


async def test_the_gate_opens_even_if_whoever_asked_has_left():
    async with stack() as running:
        await order(running, "/pause_generation")
        running.decode.meet = asyncio.Event()
        continuing = asyncio.create_task(order(running, "/continue_generation"))
        await until(lambda: "/continue_generation" in running.decode.order_of)
        continuing.cancel()
        check_answer(*await ask(running, body()))
        running.decode.meet.set()
