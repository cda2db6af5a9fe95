"""What the rows of a round say: whether each is there and possible, and how many experts a decode step wakes.

The counting of bad rows is the replay's, which shares no code with the server's own check. Shape letters: N requests,
R positions, L MoE layers, K top-k, E experts, S steps. Neighbours: `deploy.replay.check`, `offline`, `judge`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import RowsMismatch
from common.messages import RowBlock
from common.routed_experts.codec import view
from deploy.bench.options import BenchError
from deploy.bench.speed.workloads import Workload
from deploy.replay.check import RowCounts, check_rows

Ids = npt.NDArray[Any]

_MAX_SAMPLED_STEPS = 32


def read_block(block: RowBlock | None, workload: Workload) -> Ids | None:
    """See a request's rows as `[R, L, K]`, without a copy; None if there are none. Raises BenchError."""
    if block is None:
        return None
    try:
        ids_RLK = view(block)
    except RowsMismatch as error:
        raise BenchError(str(error)) from error
    header = block.header
    if header.start != 0:
        raise BenchError(f"rows [{header.start}, {header.stop}) have come instead of [0, {workload.num_rows})")
    return ids_RLK


def count_rows(answers: Sequence[Ids | None], workload: Workload, *, num_layers: int, num_experts: int) -> RowCounts:
    """Count the (position, layer) rows of all requests, the bad ones by their kind; an answer without rows misses all."""
    is_moe_L = np.ones(num_layers, dtype=np.bool_)
    counts = RowCounts()
    for ids_RLK in answers:
        if ids_RLK is None:
            counts += RowCounts(missing=workload.num_rows * num_layers)
        else:
            counts += check_rows(ids_RLK, is_moe_L, num_expected=workload.num_rows, num_experts=num_experts)
    return counts


def distinct_experts(answers: Sequence[Ids], workload: Workload, *, num_experts: int) -> float | None:
    """How many experts of a layer the N tokens of one output index meet, as a mean over layers and some of the steps.

    None if no token was decoded. Rows are `[R, L, K]`, ids in `[0, num_experts)`.
    """
    positions = np.arange(workload.prompt_tokens, min([workload.num_rows, *map(len, answers)]))
    if not len(positions) or not answers:
        return None
    if len(positions) > _MAX_SAMPLED_STEPS:
        positions = positions[np.linspace(0, len(positions) - 1, _MAX_SAMPLED_STEPS).astype(int)]
    ids_NSLK = np.stack([ids_RLK[positions] for ids_RLK in answers])
    _, num_steps, num_layers, _ = ids_NSLK.shape
    is_hit_SLE = np.zeros((num_steps, num_layers, num_experts), dtype=np.bool_)
    steps_S11, layers_L1 = np.arange(num_steps)[:, None, None], np.arange(num_layers)[:, None]
    for ids_SLK in ids_NSLK:
        is_hit_SLE[steps_S11, layers_L1, np.minimum(ids_SLK, num_experts - 1)] = True
    return float(is_hit_SLE.sum(axis=-1).mean())
