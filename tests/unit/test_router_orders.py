"""A trainer's orders to the router: each goes to every worker, as it came; over stub workers."""

import asyncio
import json

import pytest

from tests.support import stub_workers as stubs
from tests.support.asking import ask, body
from tests.support.stub_workers import stack


def stubs_of(running):
    return [stub for pair in running.pairs for stub in pair]


@pytest.mark.parametrize("path", [path for path in stubs.ORDERS if "generation" not in path and "init" not in path])
async def test_an_order_goes_to_all_workers_as_it_came(path):
    sent = b'{"any": ["thing"], "weight_version": "w2"}'
    async with stack(num_pairs=2) as running:
        async with running.client.post(f"{path}?x=1&y=b", data=sent) as response:
            reply = await response.json()
        assert response.status == 200
        for stub in stubs_of(running):
            assert stub.orders == [(f"{path}?x=1&y=b", sent)]
    assert (reply["success"], reply["message"], reply["weight_version"]) == (True, "", "w1")
    assert [(w["success"], w["message"], w["status"]) for w in reply["workers"]] == [(True, "done", 200)] * 4


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [((200, 400), 400), ((409, 200), 400), ((503, 200), 502), ((503, 400), 400), ((200, 500), 502)],
)
async def test_each_worker_s_own_words_are_told(statuses, expected):
    async with stack() as running:
        running.prefill.order_status, running.decode.order_status = statuses
        async with running.client.post("/update_weights_from_disk", json={"model_path": "m"}) as response:
            reply = await response.json()
    assert response.status == expected
    assert not reply["success"]
    assert [w["status"] for w in reply["workers"]] == list(statuses)
    assert [w["message"] for w in reply["workers"]] == ["done" if s == 200 else "not now" for s in statuses]
    assert "not now" in reply["message"]
    assert reply["weight_version"] is None


async def test_a_worker_that_cannot_be_reached_is_told_of():
    async with (
        stack(router={"decode": ("http://127.0.0.1:1",)}) as running,
        running.client.post("/start_profile") as response,
    ):
        reply = await response.json()
    assert response.status == 502
    assert [w["status"] for w in reply["workers"]] == [200, "unreachable"]


async def test_all_workers_are_told_at_the_same_time():
    """None of them would end before the last one has begun."""
    async with stack(num_pairs=2) as running:
        barrier = asyncio.Barrier(4)
        for stub in stubs_of(running):
            stub.meet = barrier
        async with running.client.post("/update_weights_from_distributed", json={}) as response:
            assert response.status == 200


async def test_a_slow_worker_has_the_weights_deadline():
    async with stack(router={"weights_deadline_s": 0.05, "control_deadline_s": 3600.0}) as running:
        running.decode.meet = asyncio.Barrier(2)
        async with running.client.post("/update_weights_from_disk", json={}) as response:
            reply = await response.json()
    assert (response.status, reply["workers"][1]["status"]) == (502, "unreachable")


async def test_ranks_are_numbered_through_the_workers():
    fields = {"master_address": "a", "master_port": 1, "rank_offset": 1, "world_size": 8, "group_name": "g"}
    async with stack(num_pairs=2) as running:
        for stub, tp_size in zip(stubs_of(running), (2, 1, 3, 1), strict=True):
            stub.tp_size = tp_size
        async with running.client.post("/init_weights_update_group", json=fields) as response:
            assert response.status == 200, await response.text()
        by_url = {stub.url: json.loads(stub.orders[0][1]) for stub in stubs_of(running)}
        async with running.client.get("/workers") as response:
            order = [worker["url"] for worker in (await response.json())["workers"]]
        tp_sizes = {stub.url: stub.tp_size for stub in stubs_of(running)}
    expected = 1
    for url in order:
        assert by_url[url] == {**fields, "rank_offset": expected}
        expected += tp_sizes[url]
    assert expected == 8


async def test_a_world_that_is_too_small_is_refused_before_anybody_joins():
    async with stack() as running:
        fields = {"rank_offset": 1, "world_size": 2}
        async with running.client.post("/init_weights_update_group", json=fields) as response:
            reply = await response.json()
        assert (response.status, running.prefill.orders) == (400, [])
    assert reply["error"]["message"].startswith("world_size: ")


async def test_nobody_joins_while_a_worker_does_not_say_how_many_ranks_it_has():
    async with stack(router={"decode": ("http://127.0.0.1:1",)}) as running:
        async with running.client.post("/init_weights_update_group", json={"world_size": 8}) as response:
            reply = await response.json()
        assert (response.status, running.prefill.orders) == (502, [])
    assert not reply["success"]


@pytest.mark.parametrize("chunked", [False, True])
async def test_tensors_go_to_every_worker_and_back_comes_what_they_say(chunked):
    # More than one part, and no multiple of it.
    sent = bytes(range(256)) * 13000 + b"end"

    async def parts():
        for begin in range(0, len(sent), 100_000):
            yield sent[begin : begin + 100_000]

    headers = {"Content-Type": "application/octet-stream"}
    async with stack(num_pairs=2, server={"max_body_bytes": 1024}) as running:
        path = "/update_weights_from_tensor?weight_version=w2"
        async with running.client.post(path, data=parts() if chunked else sent, headers=headers) as response:
            assert response.status == 200, await response.text()
        for stub in stubs_of(running):
            assert stub.orders == [(path, sent)]


async def test_a_body_of_weights_is_bounded():
    async with stack(server={"max_weights_bytes": 1024}) as running:
        async with running.client.post("/update_weights_from_tensor", data=b"x" * 1025) as response:
            assert response.status == 413
        assert running.prefill.orders == []


@pytest.mark.parametrize("path", ["/get_weight_version", "/weight_version"])
async def test_workers_that_differ_in_their_weights_are_seen(path):
    async with stack() as running:
        async with running.client.get(path) as response:
            reply = await response.json()
        assert (response.status, reply["weight_version"]) == (200, "w1")
        running.decode.weight_version = "w2"
        async with running.client.get(path) as response:
            reply = await response.json()
    assert (response.status, reply["weight_version"]) == (200, None)
    assert [worker["weight_version"] for worker in reply["workers"]] == ["w1", "w2"]


async def test_an_update_that_aborts_all_requests_ends_the_open_prompts_first():
    async with stack(decode=stubs.when_aborted(3)) as running:
        asked = asyncio.create_task(ask(running, body()))
        await running.decode.arrived.wait()
        fields = {"new_version": "w2", "abort_all_requests": True}
        async with running.client.post("/update_weight_version", json=fields) as response:
            assert response.status == 200
        status, reply = await asked
        assert running.decode.order_of == ["abort", "/update_weight_version"]
    assert (status, reply["output_ids"]) == (200, [100, 101, 102])
