"""A trainer that was written for SGLang drives a real pair, with the very bodies that such trainers send.

They start processes, compare what these say of themselves, add them to a router that knew none, take their memory, send weights
in buckets, abort a rollout and ask for profiles. After each update transformers' model of the new weights judges the answers.
"""

import asyncio
import base64
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.process import free_port, free_ports
from deploy.demo_model import write_demo_model
from tests.support.checkpoints import SHAPES, edit_tensors
from tests.support.http_client import Client
from tests.support.judge import Judge, Tally
from tests.support.processes import started, until_listening
from tests.support.prompts import random_prompts
from tests.support.trainer import (
    Trainer,
    announcement,
    bytes_of,
    described,
    halves,
    invitation,
    metadata_class,
    pickled_bucket,
)

SHAPE = "plain"
NUM_LAYERS, TOP_K = 3, 4
PROMPTS = [prompt for prompt in random_prompts(17, 12, longest=40) if len(prompt) > 1][:5]
GROUP = "slime-pp_0"

Tensors = dict[str, torch.Tensor]


# ------------------------------------------------------------------------------------------------ what trainers have


class Engine(Client):
    """One worker, as trainers drive it."""

    async def check_is_as(self, expected: dict[str, Any]) -> None:
        """Compare what it says of itself with the arguments that the trainer would have started it with."""
        _, info = await self.get("/get_server_info")
        assert {name: info[name] for name in expected} == expected

    async def offload(self) -> None:
        """Without a pause: a rollout has ended."""
        await self.until_good("/flush_cache")
        await self.told("/release_memory_occupation", tags=None)

    async def resume(self, *tags: str) -> None:
        await self.told("/resume_memory_occupation", tags=list(tags))

    async def take_pickled(self, bucket: bytes, version: str) -> None:
        await self.told(
            "/update_weights_from_tensor",
            serialized_named_tensors=[base64.b64encode(bucket).decode()],
            load_format="flattened_bucket",
            flush_cache=False,
            weight_version=version,
        )

    async def join(self, port: int, rank_offset: int) -> None:
        body = invitation(port, 3, rank_offset=rank_offset, group_name=GROUP)
        await self.told("/init_weights_update_group", **body)

    async def leave(self) -> None:
        await self.told("/destroy_weights_update_group", group_name=GROUP)

    async def pause(self) -> None:
        """In order to update by a process group."""
        await self.told("/pause_generation")
        await self.until_good("/flush_cache")
        await self.told("/begin_weight_update", selector="all")

    async def take_broadcast(self, bucket: Tensors, version: str) -> None:
        body = announcement(bucket, group_name=GROUP, flush_cache=False, weight_version=version)
        assert set(body["dtypes"]) == {"bfloat16"}
        await self.told("/update_weights_from_distributed", **body)

    async def go_on(self) -> None:
        await self.told("/end_weight_update")
        await self.told("/continue_generation")


class Router(Client):
    """The router of a trainer."""

    async def add(self, url: str, worker_type: str, **port: int) -> None:
        status, answer = await self.post({"url": url, "worker_type": worker_type, **port}, path="/workers")
        assert status == 201, answer

    async def workers(self) -> list[dict[str, Any]]:
        return list((await self.get("/workers"))[1]["workers"])

    async def remove(self, worker_id: str) -> None:
        async with self.session.delete(f"{self.url}/workers/{worker_id}") as response:
            assert response.status == 200, await response.text()


# ------------------------------------------------------------------------------------------------ what they drive


@dataclass
class Weights:
    """Of one training step: numbers that bfloat16 can hold."""

    version: str
    buckets: tuple[Tensors, Tensors]
    judge: Judge


@dataclass
class Servers:
    """Processes that somebody has started."""

    prefill: str
    decode: str
    router: str
    bootstrap_port: int


@dataclass
class Stack:
    """Both workers, and the router that has been told of them."""

    prefill: Engine
    decode: Engine
    router: Router
    bootstrap_port: int
    judges: dict[str, Judge]
    """By the name of the weights."""

    @property
    def engines(self) -> list[Engine]:
        return [self.prefill, self.decode]

    async def rollout(self, *, num_tokens: int = 6, version: str | None = None) -> list[str]:
        """Ask for all prompts at once, and judge tokens and rows by the weights that the answers name.

        Says why each answer has ended.
        """
        params = {"max_new_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
        bodies = [
            {"input_ids": prompt, "sampling_params": params, "return_logprob": True, "return_routed_experts": True}
            for prompt in PROMPTS
        ]
        tally, reasons = Tally(), []
        for prompt, reply in zip(PROMPTS, await self.router.run_all(bodies, msgpack=False), strict=True):
            named = reply.meta["weight_version"]
            assert version in (None, named)
            tokens = [token for _, token, *_ in reply.meta["output_token_logprobs"]]
            rows = np.frombuffer(base64.b64decode(reply.meta["routed_experts"]), np.int32)
            rows = rows.reshape(len(prompt) + len(tokens) - 1, NUM_LAYERS, TOP_K)
            self.judges[named].add(tally, prompt, tokens, rows)
            reasons.append(reply.meta["finish_reason"]["type"])
        tally.assert_clean()
        return reasons


@pytest.fixture(scope="module")
def servers(checkpoint_of: Callable[[str], Path]) -> Iterator[Servers]:
    prefill, decode, router, bootstrap = free_ports(4)
    flags = [
        *(f"--model={checkpoint_of(SHAPE)}", "--device=cpu", "--cpu-threads=1", "--page-size=4"),
        *("--kv-pool-tokens=8192", "--allow-pickled-weights"),
    ]
    with (
        started("prefill_worker", f"--port={prefill}", f"--bootstrap-port={bootstrap}", *flags) as first,
        started("decode_worker", f"--port={decode}", *flags) as second,
        started("router", f"--port={router}", "--health-interval-s=0.1") as third,
    ):
        for process in (first, second, third):
            until_listening(process)
        urls = [f"http://127.0.0.1:{port}" for port in (prefill, decode, router)]
        yield Servers(prefill=urls[0], decode=urls[1], router=urls[2], bootstrap_port=bootstrap)


@pytest.fixture
async def stack(
    servers: Servers, judge_of: Callable[[str], Judge], training: dict[str, Weights]
) -> AsyncIterator[Stack]:
    judges = {"default": judge_of(SHAPE)} | {version: weights.judge for version, weights in training.items()}
    async with AsyncExitStack() as opened:
        prefill, decode, router = Engine(servers.prefill), Engine(servers.decode), Router(servers.router)
        for client in (prefill, decode, router):
            await opened.enter_async_context(client)
        stack = Stack(prefill, decode, router, servers.bootstrap_port, judges)
        await asyncio.gather(*(engine.until_good("/health_generate") for engine in stack.engines))
        await asyncio.gather(*(engine.until_good("/flush_cache") for engine in stack.engines))
        assert (await router.get("/list_workers"))[1]["urls"] == []
        await router.add(prefill.url, "prefill", bootstrap_port=servers.bootstrap_port)
        await router.add(decode.url, "decode")
        assert (await router.get("/list_workers"))[1]["urls"] == [prefill.url, decode.url]
        yield stack
        for worker in await router.workers():
            await router.remove(worker["id"])
        assert await router.workers() == []


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Weights]:
    def weights(version: str, seed: int) -> Weights:
        folder = tmp_path_factory.mktemp("step") / version
        write_demo_model(folder, **(SHAPES[SHAPE] | {"seed": seed}))
        edit_tensors(folder, lambda all_: all_.update({n: t.bfloat16().float() for n, t in all_.items()}))
        tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
        return Weights(version, halves(tensors), Judge(folder))

    return {version: weights(version, seed) for version, seed in (("1", 201), ("2", 202))}


# ------------------------------------------------------------------------------------------------ what they do


async def test_workers_are_what_the_trainer_takes_them_for(stack: Stack):
    both = {"enable_return_routed_experts": True, "dtype": "float32", "enable_memory_saver": True}
    await stack.prefill.check_is_as(
        both
        | {
            "disaggregation_mode": "prefill",
            "load_balance_method": "follow_bootstrap_room",
            "disaggregation_bootstrap_port": stack.bootstrap_port,
        }
    )
    await stack.decode.check_is_as(both | {"disaggregation_mode": "decode", "prefill_round_robin_balance": True})


async def test_an_update_in_buckets_while_the_trainer_has_the_memory(
    stack: Stack, training: dict[str, Weights], monkeypatch: pytest.MonkeyPatch
):
    new, kind = training["1"], metadata_class(monkeypatch)
    assert await stack.rollout() == ["length"] * len(PROMPTS)
    await asyncio.gather(*(engine.offload() for engine in stack.engines))
    await asyncio.gather(*(engine.resume("weights") for engine in stack.engines))
    for bucket in ({}, *new.buckets):
        pickled = pickled_bucket(kind, bytes_of(bucket.values()), described(bucket, as_bytes=True))
        await asyncio.gather(*(engine.take_pickled(pickled, new.version) for engine in stack.engines))
    await asyncio.gather(*(engine.resume("kv_cache", "cuda_graph") for engine in stack.engines))
    await stack.rollout(version=new.version)


async def test_an_update_in_buckets_by_a_process_group(stack: Stack, training: dict[str, Weights]):
    new, port = training["2"], free_port()
    trainer, *_ = await asyncio.gather(
        Trainer.meet(port, 3, GROUP), stack.prefill.join(port, 1), stack.decode.join(port, 2)
    )
    try:
        await asyncio.gather(*(engine.pause() for engine in stack.engines))
        for bucket in new.buckets:
            sending = asyncio.to_thread(trainer.broadcast, bucket)
            await asyncio.gather(sending, *(engine.take_broadcast(bucket, new.version) for engine in stack.engines))
        await asyncio.gather(*(engine.go_on() for engine in stack.engines))
    finally:
        await asyncio.gather(asyncio.to_thread(trainer.leave), *(engine.leave() for engine in stack.engines))
    await stack.rollout(version=new.version)


async def test_a_rollout_that_is_aborted_at_every_worker(stack: Stack):
    rollout = asyncio.create_task(stack.rollout(num_tokens=900))
    while (await stack.decode.get("/v1/loads"))[1]["running_requests"] < len(PROMPTS):
        assert not rollout.done()
    engines = {engine.url: engine for engine in stack.engines}
    for worker in await stack.router.workers():
        await engines[worker["url"]].told("/abort_request", abort_all=True)
    assert await rollout == ["abort"] * len(PROMPTS)
    await asyncio.gather(*(engine.until_good("/flush_cache") for engine in stack.engines))


async def test_a_profile_of_one_step(stack: Stack, tmp_path: Path):
    body: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "start_step": None,
        "num_steps": 1,
        "activities": ["CPU", "GPU"],
        "profile_by_stage": False,
        "with_stack": None,
        "record_shapes": None,
    }
    await asyncio.gather(*(engine.told("/start_profile", **body) for engine in stack.engines))
    await stack.rollout(num_tokens=3)
    await asyncio.gather(*(engine.told("/stop_profile") for engine in stack.engines))
    assert sorted(os.listdir(tmp_path)) == [
        "decode-engine.trace.json.gz",
        "prefill-engine.trace.json.gz",
    ]
