"""The rollout loop of a trainer against 2P+2D: 200 requests in flight, ten rounds of pause, update and continue.

Every reply is judged by transformers' model of the version, or the versions, that it reports.
"""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from common.process import free_port
from deploy.demo_model import write_demo_model
from deploy.stack import Stack, make_stack
from tests.support.checkpoints import SHAPES
from tests.support.http_client import Client, Reply
from tests.support.judge import Tally
from tests.support.prompts import random_prompts
from tests.support.trainer import Trainer, announcement, invitation
from tests.support.version_judge import VersionJudge

IN_FLIGHT = 200
GROUP = "rollout-weights"
MODES = ["abort", "in_place", "retract", "in_place", "retract", "abort", "retract", "in_place", "retract", "in_place"]
REPLIES_A_ROUND = 60
"""Answered before the next round begins."""


def name_of(number: int) -> str:
    """Weights are called by the round after which they serve."""
    return f"v{number}"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("versions")
    for number in range(len(MODES) + 1):
        write_demo_model(folder / name_of(number), **(SHAPES["plain"] | {"seed": 100 + number}))
    return {name_of(number): folder / name_of(number) for number in range(len(MODES) + 1)}


def keeps_kv(old: str, new: str) -> bool:
    """Whether every round between two versions has frozen the requests that it found."""
    return all(mode == "in_place" for mode in MODES[int(old[1:]) : int(new[1:])])


class Rollouts:
    """Keeps requests in flight, and everything that came back."""

    def __init__(self, client: Client, seed: int) -> None:
        self.client = client
        self.rng = random.Random(seed)
        self.prompts = random_prompts(seed, 80, longest=40)
        self.answers: list[tuple[list[int], dict[str, Any], bool]] = []
        """Prompt, sample's body, and whether several versions were allowed."""
        self.is_over = False
        self.has_more = asyncio.Event()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Requests, one after the other in each of the lanes, until the block ends; then until the last has been answered."""
        async with asyncio.TaskGroup() as lanes:
            for lane in range(IN_FLIGHT):
                lanes.create_task(self.lane(lane))
            yield
            self.is_over = True

    async def lane(self, lane: int) -> None:
        turn = 0
        while not self.is_over:
            await self.request(f"rollout-{lane:03d}-{turn:03d}")
            turn += 1

    async def request(self, rid: str) -> None:
        prompt, may_mix = self.rng.choice(self.prompts), self.rng.random() < 0.7
        n = self.rng.choice([1, 1, 1, 2])
        body: dict[str, Any] = {
            "rid": rid,
            "input_ids": prompt,
            "sampling_params": {
                "max_new_tokens": self.rng.choice([2, 12, 40, 80]),
                "temperature": 0,
                "ignore_eos": True,
                "n": n,
            },
            "return_routed_experts": True,
            "routed_experts_dtype": "auto",
            "allow_mixed_versions": may_mix,
        }
        if may_mix and self.rng.random() < 0.3:
            *events, done = await self.client.stream(**body)
            assert done == "[DONE]", done
            samples = [[event for event in events if event.get("index", 0) == index][-1] for index in range(n)]
        else:
            status, reply = await self.client.post(body, msgpack=True)
            assert status == 200, reply
            samples = reply if n > 1 else [reply]
        self.answers += [(prompt, sample, may_mix) for sample in samples]
        self.has_more.set()

    async def wait_for(self, num_more: int) -> None:
        """Wait until so many more answers are here."""
        wanted = len(self.answers) + num_more
        while len(self.answers) < wanted:
            self.has_more.clear()
            await self.has_more.wait()


class Updater:
    """Sends new weights in turns from disk and by broadcasts, as a trainer does."""

    def __init__(self, client: Client, checkpoints: dict[str, Path]) -> None:
        self.client = client
        self.checkpoints = checkpoints
        self.trainer: Trainer

    async def join(self) -> None:
        """Make the group: the four workers' ranks and this process."""
        port = free_port()
        joining = asyncio.create_task(Trainer.meet(port, 5, GROUP))
        await self.client.told("/init_weights_update_group", **invitation(port, 5, group_name=GROUP))
        self.trainer = await joining

    async def update(self, number: int) -> None:
        version = name_of(number)
        if number % 2:
            await self.client.told(
                "/update_weights_from_disk", model_path=str(self.checkpoints[version]), weight_version=version
            )
            return
        tensors = load_file(self.checkpoints[version] / "model.safetensors")
        names = sorted(tensors)
        # In two pieces, as trainers send what does not fit into one.
        for piece in (names[: len(names) // 2], names[len(names) // 2 :]):
            sent = {name: tensors[name] for name in piece}
            sending = asyncio.create_task(asyncio.to_thread(self.trainer.broadcast, sent))
            fields = announcement(sent, group_name=GROUP, weight_version=version)
            await self.client.told("/update_weights_from_distributed", **fields)
            await sending


async def test_ten_rounds(checkpoints: dict[str, Path], tmp_path: Path):
    flags = [
        f"--model={checkpoints[name_of(0)]}",
        "--weight-version=v0",
        "--device=cpu",
        "--cpu-threads=1",
        "--page-size=4",
        "--prefill=2",
        "--decode=2",
        "--prefill.kv-pool-tokens=4096",
        "--prefill.chunked-prefill-tokens=64",
        "--decode.kv-pool-tokens=8192",
        "--context-tokens=512",
        "--max-retries=20",
    ]
    async with make_stack(flags, log_file=tmp_path / "log") as stack, Client(stack.url, timeout_s=180) as client:
        updater, rollouts = Updater(client, checkpoints), Rollouts(client, seed=1)
        await updater.join()
        async with rollouts.running():
            for number, mode in enumerate(MODES, start=1):
                await rollouts.wait_for(REPLIES_A_ROUND)
                await client.told("/pause_generation", mode=mode)
                await updater.update(number)
                await client.told("/continue_generation")
            await rollouts.wait_for(REPLIES_A_ROUND)
        await client.told("/destroy_weights_update_group", group_name=GROUP)
        updater.trainer.leave()
        await wait_quiet(client)
        # The last ones came by broadcasts.
        await assert_all_serve(stack, name_of(len(MODES)), str(checkpoints[name_of(len(MODES) - 1)]))
    judge(rollouts, checkpoints)


def judge(rollouts: Rollouts, checkpoints: dict[str, Path]) -> None:
    """Every answer by the versions that it reports."""
    judges, tally, outcomes = VersionJudge(checkpoints, keeps_kv), Tally(), Counter[str]()
    for prompt, body, may_mix in rollouts.answers:
        reply = Reply(body)
        spans, reason = reply.meta["weight_versions"], reply.meta["finish_reason"]
        versions = [span[2] for span in spans]
        outcomes[reason["type"]] += 1
        if not reply.output_ids:
            assert (reason["type"], reason["cause"]) == ("abort", "requested")
            assert "routed_experts" not in reply.meta
            continue
        assert reply.meta["weight_version"] == versions[-1]
        assert may_mix or len(versions) == 1
        outcomes["+".join(MODES[int(left[1:])] for left in versions[:-1]) or "one version"] += 1
        assert len(reply.rows) == len(prompt) + len(reply.output_ids) - 1
        judges.add(tally, prompt, reply.output_ids, reply.rows, spans)
    tally.assert_clean()
    assert outcomes["length"] > 300
    assert outcomes["abort"] > 20
    # Requests of both kinds went on under new weights.
    assert outcomes["in_place"] > 10, outcomes
    assert outcomes["retract"] > 10, outcomes


async def wait_quiet(client: Client, deadline_s: float = 60.0) -> None:
    """Wait until no worker holds anything, then check that the recount of every page is exact."""
    async with asyncio.timeout(deadline_s):
        while True:
            _, info = await client.get("/server_info")
            stats = [worker["info"]["stats"] for worker in info["workers"]]
            held = ("queued_requests", "running_requests", "rooms")
            if all(sum(one[name] for name in held) + one["pages"]["running"] == 0 for one in stats):
                break
    for one in stats:
        pages = one["pages"]
        assert pages["unaccounted"] == pages["quarantined"] == 0
        assert pages["free"] + pages["cached"] == pages["total"]


async def assert_all_serve(stack: Stack, version: str, folder: str) -> None:
    """All four workers are there, healthy, not paused, and have these weights; `folder` is what they read last."""
    async with Client(stack.url) as client:
        _, body = await client.get("/workers")
    assert len(body["workers"]) == 4
    for worker in body["workers"]:
        assert worker["healthy"], worker
        assert worker["weight_version"] == version
        assert worker["model"] == folder
