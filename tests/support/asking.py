"""One request to a router over stub workers, what its answer must be, and what must be left of it: nothing."""

import json
from typing import Any

import numpy as np

from common.messages import Leg
from common.routed_experts.codec import rows_from_reply
from tests.support.rows import SPEC
from tests.support.stub_workers import ROWS, Stack

PROMPT = list(range(10, 17))
P = len(PROMPT)
LEGS: list[Leg] = ["prefill", "decode"]
OTHER: dict[Leg, Leg] = {"prefill": "decode", "decode": "prefill"}


def body(**fields: Any) -> dict[str, Any]:
    """A request for four tokens and their rows, with these fields besides or instead."""
    sampling = {"max_new_tokens": 4, "sampling_seed": 100} | fields.pop("sampling_params", {})
    return {"input_ids": PROMPT, "rid": "mine", "return_routed_experts": True, "sampling_params": sampling} | fields


async def ask(running: Stack, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Give the status and the reply, of a stream its last event; an error is `{"error": ...}` in either."""
    async with running.client.post("/generate", json=request) as response:
        text = await response.text()
    return response.status, json.loads(text) if response.content_type == "application/json" else last_event(text)


def last_event(text: str) -> dict[str, Any]:
    """Read the last event of a stream that has something to say."""
    events = [item.removeprefix("data: ") for item in text.split("\n\n") if item]
    last: dict[str, Any] = json.loads(events[-2] if events[-1] == "[DONE]" else events[-1])
    assert (events[-1] == "[DONE]") != ("error" in last), "a stream ends with [DONE] unless it has failed"
    return last


def check_answer(status: int, reply: dict[str, Any]) -> None:
    """Check that this is the answer to `body()`, rows included."""
    assert status == 200, reply
    assert "error" not in reply, reply
    assert reply["output_ids"] == [100, 101, 102, 103]
    assert reply["meta_info"]["id"] == "mine"
    np.testing.assert_array_equal(rows_from_reply(reply["meta_info"])[:, list(SPEC.layer_ids)], ROWS[: P + 3])


async def workers_of(running: Stack) -> dict[str, dict[str, Any]]:
    """Give what the router says of its workers, by their URLs."""
    async with running.client.get("/workers") as response:
        return {worker["url"]: worker for worker in (await response.json())["workers"]}


async def metrics_of(running: Stack) -> str:
    """Give the router's metrics."""
    async with running.client.get("/metrics") as response:
        return await response.text()


async def blamed(running: Stack) -> list[str]:
    """Give the workers whose breakers are not closed."""
    return [url for url, worker in (await workers_of(running)).items() if worker["breaker"] != "closed"]


async def check_nothing_is_left(running: Stack) -> None:
    """Check that no leg counts as outstanding and no prompt is open."""
    workers = await workers_of(running)
    assert [worker["outstanding_requests"] for worker in workers.values()] == [0] * len(workers)
    async with running.client.post("/abort_request", json={"abort_all": True}) as response:
        assert (await response.json())["aborted"] == 0
