"""Who may be a pair: what both sides must agree on before a page moves, and how a prompt is compared without sending it."""

import hashlib

import numpy as np
import numpy.typing as npt

from common.messages import Hello, PoolInfo

PROTOCOL = 2
"""Version of the control messages; raised whenever one of them changes."""


def refusal_of(hello: Hello, own_pool: PoolInfo, own_weight_version: str) -> str | None:
    """Say why this peer cannot be served, or None if it can."""
    if hello.protocol != PROTOCOL:
        return f"control protocol {hello.protocol} here, {PROTOCOL} there"
    if hello.pool.layout != own_pool.layout:
        return f"KV layouts differ: {hello.pool.layout} on decode, {own_pool.layout} on prefill"
    if hello.weight_version != own_weight_version:
        return f"weight versions differ: {hello.weight_version!r} on decode, {own_weight_version!r} on prefill"
    return None


def prompt_digest(token_ids: npt.NDArray[np.int32]) -> bytes:
    """16 bytes that two workers which tokenised the same text alike have in common."""
    return hashlib.blake2b(token_ids.astype("<i4").tobytes(), digest_size=16).digest()
