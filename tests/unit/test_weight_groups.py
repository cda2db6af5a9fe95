"""A trainer and a rank in one process group: tensors that come one after the other, or all as one bucket of bytes."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch

from common.engine.weight_groups import WeightGroup
from common.errors import UsageError
from common.models.weight_sources import Receive, announced
from common.models.weights import Header
from common.process import free_port
from tests.support.trainer import Trainer, announcement, joining

CPU = torch.device("cpu")
TENSORS = {
    "odd": torch.arange(3.0).to(torch.float8_e4m3fn),
    "float": torch.randn(2, 3),
    "matrix": torch.randn(3, 5).bfloat16(),
    "scalar": torch.tensor(2.0),
}


@contextmanager
def met() -> Iterator[tuple[Trainer, WeightGroup, Callable[..., "Future[Any]"]]]:
    """Both ends, and what has the trainer do something meanwhile."""
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(Trainer, port, 2, "g")
        group = WeightGroup.join(joining(port), 0, CPU)
        trainer = coming.result()
        try:
            yield trainer, group, pool.submit
        finally:
            group.leave()
            trainer.leave()


def headers_of(tensors: dict[str, torch.Tensor]) -> tuple[Header, ...]:
    told = announcement(tensors)
    return tuple(announced(told["names"], told["dtypes"], told["shapes"]).values())


def taken(receive: Receive) -> dict[str, torch.Tensor]:
    return {name: receive(header) for name, header in zip(TENSORS, headers_of(TENSORS), strict=True)}


def check_same(ours: dict[str, torch.Tensor]) -> None:
    for name, tensor in TENSORS.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(ours[name].float(), tensor.float()), name


def test_both_ways_in_any_order():
    with met() as (trainer, group, submit):
        for is_bucket in (True, False, False, True, True):
            sent = submit(
                trainer.broadcast_bucket if is_bucket else trainer.broadcast, as_bytes_where_needed(is_bucket)
            )
            check_same(taken(group.bucket_receiver(headers_of(TENSORS)) if is_bucket else group.receiver()))
            sent.result()


def as_bytes_where_needed(is_bucket: bool) -> dict[str, torch.Tensor]:
    """gloo itself knows no float8 numbers."""
    if is_bucket:
        return TENSORS
    return {name: tensor.view(torch.uint8) if name == "odd" else tensor for name, tensor in TENSORS.items()}


def test_a_bucket_is_one_broadcast():
    """All of it has come before the first tensor is asked for."""
    with met() as (trainer, group, submit):
        sent = submit(trainer.broadcast_bucket, TENSORS)
        receive = group.bucket_receiver(headers_of(TENSORS))
        sent.result()
        check_same(taken(receive))


def test_nothing_is_sent_for_an_empty_bucket():
    with met() as (trainer, group, submit):
        group.bucket_receiver(())
        sent = submit(trainer.broadcast_bucket, TENSORS)
        check_same(taken(group.bucket_receiver(headers_of(TENSORS))))
        sent.result()


class PatientBackend:
    """Takes note of how long it may wait for each broadcast, and of how many bytes."""

    def __init__(self) -> None:
        self.waits_s: list[float] = []
        self.sizes: list[int] = []

    def broadcast(self, tensors: list[torch.Tensor], options: object) -> "PatientBackend":
        self.sizes += [tensor.nbytes for tensor in tensors]
        return self

    def wait(self, timeout: timedelta) -> None:
        self.waits_s.append(timeout.total_seconds())


@pytest.mark.parametrize(("is_bucket", "sizes"), [(False, [3, 24, 30, 4]), (True, [61])])
def test_an_update_has_one_deadline_however_it_comes(is_bucket: bool, sizes: list[int]):
    backend = PatientBackend()
    group = WeightGroup(backend, CPU, deadline_s=7.0)
    taken(group.bucket_receiver(headers_of(TENSORS)) if is_bucket else group.receiver())
    assert backend.sizes == sizes
    assert 7.0 >= backend.waits_s[0] > 0
    assert backend.waits_s == sorted(backend.waits_s, reverse=True)


def test_nccl_needs_a_gpu():
    with pytest.raises(UsageError, match="needs a GPU"):
        WeightGroup.join(joining(1, backend="nccl"), 0, CPU)
