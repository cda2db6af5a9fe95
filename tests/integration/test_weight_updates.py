"""A worker of real processes whose weights change: from disk, from a body, by broadcasts; after each, transformers agrees."""

import asyncio
import base64
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from common.process import free_port
from deploy.demo_model import write_demo_model
from deploy.stack import Stack, running_stack
from tests.support.checkpoints import SHAPES, edit_tensors
from tests.support.http_client import Client
from tests.support.judge import Judge
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

SHAPE = "mixed"
G = 6
PROMPTS = random_prompts(61, 6, longest=60)
SPLITS = {"tp2": ["--aggregated.tp=2"], "dp2": ["--aggregated.dp=2", "--aggregated.ep"]}
HEAD = "model.norm.weight"


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of the same shape with other weights."""
    folder = tmp_path_factory.mktemp("newer")
    for seed in (71, 72):
        write_demo_model(folder / f"step-{seed}", **(SHAPES[SHAPE] | {"seed": seed}))
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module", params=SPLITS)
def stack(
    request: pytest.FixtureRequest,
    checkpoint_of: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Stack]:
    flags = [
        f"--model={checkpoint_of(SHAPE)}",
        "--aggregated",
        "--device=cpu",
        "--cpu-threads=1",
        "--page-size=4",
        "--kv-pool-tokens=2048",
        "--aggregated.weights-deadline-s=6",
        "--max-weights-bytes=8000000",
        "--allow-pickled-weights",
        *SPLITS[str(request.param)],
    ]
    with running_stack(flags, log_file=tmp_path_factory.mktemp("stack") / "log") as running:
        yield running


@pytest.fixture
async def worker(stack: Stack, checkpoint_of: Callable[[str], Path]) -> AsyncIterator[Client]:
    """The worker's own URL; each test begins with the first weights."""
    async with Client(stack.plan.commands[0].url) as opened:
        await updated(opened, "/update_weights_from_disk", model_path=str(checkpoint_of(SHAPE)), weight_version="old")
        yield opened
        await opened.post({}, path="/continue_generation")


async def updated(worker: Client, path: str, **body: Any) -> dict[str, Any]:
    """An update that must succeed, and whose answer must say that it did."""
    answer = await worker.told(path, **body)
    assert "success" in answer, answer
    return answer


async def check_serves(worker: Client, judge: Judge, version: str) -> None:
    """Greedy tokens are those of transformers' model, of the second time too, when the prompts could be cached."""
    for _ in range(2):
        for prompt in PROMPTS:
            params = {"max_new_tokens": G, "temperature": 0, "ignore_eos": True}
            reply = await worker.generate(input_ids=prompt, sampling_params=params)
            assert reply.output_ids == judge.reference.generate(prompt, G)
            assert reply.meta["weight_version"] == version
    for path in ("/model_info", "/server_info", "/health", "/get_weight_version", "/weight_version"):
        assert (await worker.get(path))[1]["weight_version"] == version


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


async def send(worker: Client, tensors: dict[str, torch.Tensor], **query: str) -> tuple[int, Any]:
    return await post_bytes(worker, save(tensors), **query)


async def post_bytes(worker: Client, data: bytes, **query: str) -> tuple[int, Any]:
    url, headers = worker.url + "/update_weights_from_tensor", {"Content-Type": "application/octet-stream"}
    async with worker.session.post(url, data=data, params=query, headers=headers) as response:
        return response.status, await response.json()


async def test_from_disk(worker: Client, newer: dict[str, Path], judge_of: Callable[[str], Judge]):
    await check_serves(worker, judge_of(SHAPE), "old")
    path = newer["step-71"]
    answer = await updated(worker, "/update_weights_from_disk", model_path=str(path), flush_cache=True)
    assert answer["weight_version"] == "step-71"
    assert (await worker.get("/model_info"))[1]["model_path"] == str(path)
    await check_serves(worker, Judge(path), "step-71")


async def test_from_a_body(worker: Client, newer: dict[str, Path]):
    path = newer["step-71"]
    status, answer = await send(worker, tensors_of(path), weight_version="sent")
    assert (status, answer["success"], answer["weight_version"]) == (200, True, "sent"), answer
    await check_serves(worker, Judge(path), "sent")


async def test_from_pickled_buckets(worker: Client, newer: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    """For each rank its own one, all tensors or two halves; one that is empty changes nothing."""
    kind = metadata_class(monkeypatch)

    async def send(tensors: dict[str, torch.Tensor], load_format: str = "flattened_bucket", **fields: str) -> Any:
        bucket = pickled_bucket(kind, bytes_of(tensors.values()), described(tensors, as_bytes=True))
        texts = [base64.b64encode(bucket).decode()] * 2
        body = {"serialized_named_tensors": texts, "load_format": load_format, "flush_cache": False} | fields
        async with worker.session.post(worker.url + "/update_weights_from_tensor", json=body) as response:
            return response.status, await response.json()

    tensors = tensors_of(newer["step-71"])
    status, answer = await send(tensors, weight_version="whole")
    assert (status, answer["success"]) == (200, True), answer
    await check_serves(worker, Judge(newer["step-71"]), "whole")
    for wrong in (send(tensors, "auto"), send(tensors | {HEAD: torch.ones(3)}), send({})):
        status, answer = await wrong
        assert (status, answer["success"], answer["error"]["code"]) == (400, False, "weights_refused"), answer
    await check_serves(worker, Judge(newer["step-71"]), "whole")
    first, second = halves(tensors_of(newer["step-72"]))
    await worker.post({"mode": "in_place"}, path="/pause_generation")
    for part in (first, {}, second):
        status, answer = await send(part, weight_version="parts")
        assert (status, answer["success"]) == (200, True), answer
    await worker.post({}, path="/continue_generation")
    await check_serves(worker, Judge(newer["step-72"]), "parts")


@pytest.mark.parametrize("load_format", [None, "flattened_bucket"])
async def test_from_a_trainer_s_broadcasts(
    stack: Stack, worker: Client, newer: dict[str, Path], load_format: str | None
):
    """All at once; then in two halves, for which generation must be paused."""
    port, first, second = free_port(), tensors_of(newer["step-71"]), tensors_of(newer["step-72"])
    joined = updated(worker, "/init_weights_update_group", **invitation(port, 3))
    trainer, _ = await asyncio.gather(Trainer.meet(port, 3), joined)

    async def broadcast(tensors: dict[str, torch.Tensor], version: str) -> None:
        body = announcement(tensors, weight_version=version, load_format=load_format)
        sending = asyncio.to_thread(trainer.broadcast_bucket if load_format else trainer.broadcast, tensors)
        await asyncio.gather(sending, updated(worker, "/update_weights_from_distributed", **body))

    try:
        await broadcast(first, "first")
        await check_serves(worker, Judge(newer["step-71"]), "first")
        parts = halves(second)
        half = announcement(parts[0], load_format=load_format)
        status, answer = await worker.post(half, path="/update_weights_from_distributed")
        assert (status, answer["success"]) == (400, False)
        assert "pause" in answer["message"]
        await worker.post({"mode": "in_place"}, path="/pause_generation")
        for tensors in parts:
            await broadcast(tensors, "second")
        await worker.post({}, path="/continue_generation")
        await check_serves(worker, Judge(newer["step-72"]), "second")
    finally:
        leaving = asyncio.to_thread(trainer.leave)
        await asyncio.gather(leaving, updated(worker, "/destroy_weights_update_group", group_name="g"))
    status, answer = await worker.post({"group_name": "g"}, path="/destroy_weights_update_group")
    assert (status, answer["success"]) == (400, False)


async def test_what_is_refused_changes_nothing(
    worker: Client, newer: dict[str, Path], judge_of: Callable[[str], Judge], tmp_path: Path
):
    good = tensors_of(newer["step-71"])
    bad = {
        "unknown": good | {"model.extra.weight": torch.ones(2)},
        "shape [3]": good | {HEAD: torch.ones(3)},
        "I32": good | {HEAD: torch.ones(48, dtype=torch.int32)},
        "quantization_config": good
        | {HEAD: torch.ones(48).to(torch.float8_e4m3fn), HEAD + "_scale_inv": torch.ones(1)},
        "1 of the model's tensors": {name: tensor for name, tensor in good.items() if name != HEAD},
    }
    for named, tensors in bad.items():
        status, answer = await send(worker, tensors, weight_version="new")
        assert (status, answer["success"], answer["error"]["code"]) == (400, False, "weights_refused"), answer
        assert named in answer["message"]
    folder = shutil.copytree(newer["step-71"], tmp_path / "lacks")
    edit_tensors(folder, lambda tensors: tensors.pop(HEAD))
    await worker.post({"mode": "in_place"}, path="/pause_generation")
    for path, named in ((folder, f"lacks tensor {HEAD}"), (tmp_path / "nowhere", "No such file")):
        status, answer = await worker.post({"model_path": str(path)}, path="/update_weights_from_disk")
        assert (status, answer["success"]) == (400, False), answer
        assert named in answer["message"]
    await worker.post({}, path="/continue_generation")
    for data in (b"rubbish", save(good)[:-100], b""):
        status, answer = await post_bytes(worker, data)
        assert (status, answer["success"]) == (400, False), answer
    assert (await post_bytes(worker, bytes(9_000_000)))[0] == 413
    await check_serves(worker, judge_of(SHAPE), "old")


async def test_a_trainer_that_dies_leaves_broken_weights_until_a_full_update(worker: Client, newer: dict[str, Path]):
    port, tensors = free_port(), tensors_of(newer["step-72"])
    joined = updated(worker, "/init_weights_update_group", **invitation(port, 3))
    trainer, _ = await asyncio.gather(Trainer.meet(port, 3), joined)

    def die_in_the_middle() -> None:
        trainer.broadcast(dict(list(tensors.items())[:5]))
        trainer.leave()

    body = announcement(tensors, weight_version="never")
    asked = worker.post(body, path="/update_weights_from_distributed")
    _, (status, answer) = await asyncio.gather(asyncio.to_thread(die_in_the_middle), asked)
    assert (status, answer["success"], answer["error"]["code"]) == (503, False, "weights_broken"), answer
    assert (await worker.get("/health"))[0] == 503
    status, answer = await worker.post({"input_ids": PROMPTS[1]})
    assert (status, answer["error"]["code"]) == (503, "weights_broken")
    status, answer = await send(worker, {HEAD: torch.ones(3)})
    assert (status, answer["error"]["code"]) == (400, "weights_refused")
    assert (await worker.get("/health"))[0] == 503, "a refused update mends nothing"
    await updated(worker, "/update_weights_from_disk", model_path=str(newer["step-72"]))
    await check_serves(worker, Judge(newer["step-72"]), "step-72")


async def test_a_trainer_that_never_comes(worker: Client, judge_of: Callable[[str], Judge]):
    group = invitation(free_port(), 3)
    del group["group_name"]  # It has a default.
    status, answer = await worker.post({**group, "backend": "nccl"}, path="/init_weights_update_group")
    assert (status, answer["success"]) == (400, False)
    assert "GPU" in answer["message"]
    status, answer = await worker.post(group, path="/init_weights_update_group")
    assert (status, answer["success"], answer["error"]["code"]) == (400, False, "weights_refused"), answer
    await check_serves(worker, judge_of(SHAPE), "old")


async def test_a_pause_keeps_requests_waiting_and_a_new_name_is_told(worker: Client, judge_of: Callable[[str], Judge]):
    assert (await worker.post({}, path="/pause_generation"))[1] == {"status": "ok", "mode": "abort", "ended": 0}
    params = {"max_new_tokens": G, "temperature": 0, "ignore_eos": True}
    waiting = asyncio.create_task(worker.generate(input_ids=PROMPTS[1], sampling_params=params))
    while (await worker.get("/v1/loads"))[1]["queued_requests"] == 0:
        assert not waiting.done()
    assert (await worker.get("/health"))[1]["paused"]
    assert (await worker.get("/v1/loads"))[1]["paused"]
    assert (await worker.get("/health_generate"))[0] == 503
    answer = await updated(worker, "/update_weight_version", new_version="named", abort_all_requests=False)
    assert answer["weight_version"] == "named"
    assert not waiting.done()
    assert (await worker.post({}, path="/continue_generation"))[1] == {"status": "ok"}
    assert (await waiting).output_ids == judge_of(SHAPE).reference.generate(PROMPTS[1], G)
    await check_serves(worker, judge_of(SHAPE), "named")


def test_the_checkpoints_differ(newer: dict[str, Path], checkpoint_of: Callable[[str], Path]):
    """Otherwise none of this would show anything."""
    judges = [Judge(path) for path in (checkpoint_of(SHAPE), newer["step-71"], newer["step-72"])]
    answers = {tuple(judge.reference.generate(PROMPTS[1], G)) for judge in judges}
    assert len(answers) == 3
