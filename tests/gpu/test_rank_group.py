"""Sums, gathers and sums that are normed over two GPUs, by NCCL and by reading each other's memory, eager and in CUDA graphs."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from common.kernels.interface import Kernels
from common.kernels.rank_group import RankGroup, open_rank_groups
from common.kernels.torch_kernels import TorchKernels
from common.ranks import Ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

ROWS = [1, 3, 16, 128, 300, 1000]
"""The last ones are too large for reading."""
WIDTH = 2048
REPLAYS = 5


def numbers(seed: int, rank: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """Whole numbers, so that sums are exact in any order and any of these dtypes."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randint(-8, 8, (rows, WIDTH), generator=generator).to(dtype)


def check(group: RankGroup, rank: int, rows: int, dtype: torch.dtype, device: torch.device) -> None:
    """One eager round, and a captured one that is replayed with new numbers."""
    inputs = torch.empty(rows, WIDTH, dtype=dtype, device=device)

    def compute() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        doubled = torch.cat((inputs, inputs))
        return group.sum(inputs.clone()), group.gather(inputs), group.sum_rows(doubled)

    def compare(seed: int, results: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        all_inputs = [numbers(seed, index, rows, dtype) for index in range(2)]
        total = (all_inputs[0].float() + all_inputs[1].float()).to(dtype)
        for result, expected in zip(results, (total, torch.cat(all_inputs), total), strict=True):
            assert torch.equal(result.cpu(), expected), f"{rows} rows of {dtype}, round {seed}"

    inputs.copy_(numbers(0, rank, rows, dtype))
    compare(0, compute())
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        results = compute()
    for seed in range(1, REPLAYS):
        inputs.copy_(numbers(seed, rank, rows, dtype))
        graph.replay()
        compare(seed, results)


def check_norms(group: RankGroup, rank: int, rows: int, device: torch.device) -> None:
    """A chain of sums, each added to the one before: as the torch twin has it, and the same bits on both ranks."""
    from common.kernels.fused_kernels import FusedKernels

    dtype, twin, kernels = torch.bfloat16, TorchKernels(), FusedKernels()
    inputs = torch.empty(rows, WIDTH, dtype=dtype, device=device)
    weight = torch.rand(WIDTH, device=device).to(dtype)
    group.share(weight)

    def compute(chosen: Kernels) -> list[torch.Tensor]:
        x, results = torch.zeros_like(inputs), []
        for step in range(6):
            x, normed = chosen.add_norm_over(x, inputs * (step + 1), group, weight, 1e-6)
            results += [x, normed]
        return results

    inputs.copy_(numbers(0, rank, rows, dtype))
    compute(kernels)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = compute(kernels)
    for seed in range(1, REPLAYS):
        inputs.copy_(numbers(seed, rank, rows, dtype))
        graph.replay()
        for ours, theirs in zip(results, compute(twin), strict=True):
            torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)
            assert torch.equal(ours, group.share(ours.clone())), "the ranks have different bits"


def run(rank: int, folder: str) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store = dist.FileStore(f"{folder}/ranks", 2)
    everybody, group, across = open_rank_groups(Ranks(tp=2).rank(rank), store, device)
    assert across is None
    assert everybody is not None
    assert group is not None
    assert group._reader is not None, "these GPUs can read each other's memory"
    for rows in ROWS:
        check_norms(group, rank, rows, device)
    assert everybody.smallest(5 + rank, device) == 5
    shared = torch.full((3,), rank + 7, device=device)
    assert group.share(shared).tolist() == [7, 7, 7]
    for dtype in (torch.bfloat16, torch.float32):
        for rows in ROWS:
            check(everybody, rank, rows, dtype, device)
            check(group, rank, rows, dtype, device)
    dist.barrier()
    dist.destroy_process_group()


def test_two_gpus(tmp_path: Path):
    torch.multiprocessing.spawn(run, args=(str(tmp_path),), nprocs=2)
