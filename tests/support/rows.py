"""Rows for tests: one big array that everything is cut from, so that slicing it is the oracle."""

import numpy as np

from common.messages import RowBlock
from common.routed_experts.codec import Rows, block_of
from common.routed_experts.spec import RowSpec
from common.versions import whole

# Layer 0 and layer 3 are dense.
SPEC = RowSpec(num_experts=16, top_k=4, layer_ids=(1, 2, 4), num_hidden_layers=5)


def make_rows(spec: RowSpec, num_rows: int, seed: int = 0) -> Rows:
    """Draw `[num_rows, L, K]` good rows."""
    order = np.random.default_rng(seed).random((num_rows, spec.num_layers, spec.num_experts)).argsort(axis=2)
    return order[:, :, : spec.top_k].astype(spec.numpy_dtype)


def cut(spec: RowSpec, rows: Rows, start: int, stop: int, weight_version: str = "w1") -> RowBlock:
    """Cut the block `[start, stop)` out of rows that begin at position 0."""
    return block_of(
        spec.header(start=start, stop=stop, weight_versions=whole(start, stop, weight_version)), rows[start:stop]
    )
