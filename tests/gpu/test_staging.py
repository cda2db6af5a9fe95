"""Staging on a GPU: copies come late there, and nothing that they need is used again before they have come (R3)."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from common.engine.device import CudaDevice

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BUSY_CYCLES = 200_000_000
"""About a tenth of a second."""


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    yield CudaDevice()
    torch.cuda.synchronize()


def test_steps_in_flight_do_not_touch_each_others_staging(device: CudaDevice):
    """Every upload of eight steps is queued behind a busy stream; each step's copies have its own numbers in the end."""
    target = torch.zeros(1000, dtype=torch.int64, device=device.torch_device)
    for _ in range(3):
        torch.cuda._sleep(BUSY_CYCLES)
        in_flight = []
        for step in range(8):
            staging = device.begin_step()
            uploaded = staging.upload(np.full((3, 700), step, dtype=np.float32))
            staging.upload_into(np.full((10, 100), step), target)
            results = {"sum": uploaded.sum(dim=1), "kept": target.clone(), "rows": uploaded.to(torch.uint8)}
            in_flight.append(staging.copy_to_host(results))
            del uploaded, results  # the allocator may hand their memory on as soon as the copies are done, not before
        for step, copies in enumerate(in_flight):
            landed = copies.wait()
            assert landed["sum"].tolist() == [700 * step] * 3
            assert (landed["kept"] == step).all()
            assert landed["rows"].shape == (3, 700)
            assert (landed["rows"] == step).all()
            assert landed["rows"].dtype == np.uint8


def test_neither_an_upload_nor_a_copy_to_the_host_waits_for_the_stream(device: CudaDevice):
    torch.cuda._sleep(BUSY_CYCLES)
    busy = torch.cuda.Event()  # type: ignore[no-untyped-call]
    busy.record()
    staging = device.begin_step()
    uploaded = staging.upload(np.arange(200_000))
    staging.upload_into(np.arange(200_000), torch.empty_like(uploaded))
    copies = staging.copy_to_host({"x": uploaded})
    assert not busy.query(), "something has waited"
    assert (copies.wait()["x"] == np.arange(200_000)).all()


def test_a_settled_steps_staging_is_used_again_and_allocates_nothing(device: CudaDevice):
    first = device.begin_step()
    first.copy_to_host({"x": first.upload(np.arange(100_000))}).wait()
    addresses = []
    for _ in range(4):
        staging = device.begin_step()
        assert staging is first
        landed = staging.copy_to_host({"x": staging.upload(np.arange(100_000))}).wait()["x"]
        addresses.append(landed.__array_interface__["data"][0])
    assert len(set(addresses)) == 1
    second, third = device.begin_step(), device.begin_step()
    assert second is first
    assert third is not first
