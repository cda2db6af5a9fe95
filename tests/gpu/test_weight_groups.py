"""A trainer on one GPU broadcasts new weights to an engine on another, by NCCL. Skipped where there are fewer than two GPUs.

An engine that was started with the new weights says what must come out, bit for bit.
"""

from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.orders import CheckWeights, Done, LeaveWeightGroup, LoadWeights, Order
from common.process import free_port
from deploy.demo_model import write_demo_model
from tests.support.aggregated import InProcessAggregated
from tests.support.checkpoints import ON_GPU
from tests.support.in_process_pair import options_of
from tests.support.prompts import random_prompts
from tests.support.rank_threads import in_threads
from tests.support.trainer import Trainer, broadcast_of, joining

# With "cpu" and "gloo" the same test runs anywhere.
DEVICE: Final[Literal["cpu", "cuda"]] = "cuda"
BACKEND: Final[Literal["gloo", "nccl"]] = "nccl"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def engine_of(checkpoint: Path) -> InProcessAggregated:
    return InProcessAggregated(checkpoint, device=DEVICE, dtype="bfloat16", page_size=16, chunk_tokens=256)


def answers_of(worker: InProcessAggregated) -> list[Any]:
    options = options_of(8, ignore_eos=True, temperature=0.0)
    return worker.run([(prompt, options) for prompt in random_prompts(5, 6, longest=60)], concurrency=1)


@pytest.mark.parametrize("is_bucket", [False, True])
def test_broadcasts_from_another_gpu(tmp_path: Path, is_bucket: bool):
    old, new = tmp_path / "old", tmp_path / "new"
    write_demo_model(old, **ON_GPU)
    write_demo_model(new, **(ON_GPU | {"seed": 44}))
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(new / "model.safetensors").items()}
    port, source = free_port(), broadcast_of(tensors, is_bucket=is_bucket)
    join = joining(port, backend=BACKEND)
    orders: list[Order] = [join, CheckWeights(2, source), LoadWeights(3, source, "new"), LeaveWeightGroup(4, "g")]
    worker, expected = engine_of(old), answers_of(engine_of(new))
    before = answers_of(worker)
    assert any(theirs.output_ids != ours.output_ids for theirs, ours in zip(before, expected, strict=True))
    dones: list[Done] = []

    def train() -> None:
        if DEVICE == "cuda":
            torch.cuda.set_device(1)
        trainer = Trainer(port, 2, "g", BACKEND)
        send = trainer.broadcast_bucket if is_bucket else trainer.broadcast
        send({name: tensor.to("cuda:1" if DEVICE == "cuda" else "cpu") for name, tensor in tensors.items()})
        trainer.leave()

    def serve() -> None:
        if DEVICE == "cuda":
            torch.cuda.set_device(0)
        for order in orders:
            worker.loop.order(order, dones.append)
        worker.turn()

    in_threads(2, lambda index: train() if index else serve())
    assert [done.error for done in dones] == [None] * len(orders)
    for ours, theirs in zip(answers_of(worker), expected, strict=True):
        assert ours.output_ids == theirs.output_ids
        assert np.array_equal(ours.rows, theirs.rows)
    worker.check_pages()
