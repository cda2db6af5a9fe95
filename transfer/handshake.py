"""Who may be a pair: what both sides must agree on before a page moves, and how a prompt is compared without sending it."""

import hashlib

import numpy as np
import numpy.typing as npt

from common.messages import Hello, PoolInfo

PROTOCOL = 3
"""Version of the control messages; raised whenever one of them changes."""

_MAX_ADDRESS = 2**63
_MAX_AGENT_METADATA_BYTES = 2**20


def refusal_of(hello: Hello, own_pool: PoolInfo, own_weight_version: str) -> str | None:
    """Say why this peer cannot be served, or None if it can."""
    if hello.protocol != PROTOCOL:
        return f"control protocol {hello.protocol} here, {PROTOCOL} there"
    if hello.pool.layout != own_pool.layout:
        return f"KV layouts differ: {hello.pool.layout} on decode, {own_pool.layout} on prefill"
    if hello.weight_version != own_weight_version:
        return f"weight versions differ: {hello.weight_version!r} on decode, {own_weight_version!r} on prefill"
    return _nonsense_in(hello, own_pool)


def _nonsense_in(hello: Hello, own_pool: PoolInfo) -> str | None:
    """Say which of a peer's numbers cannot be: they are about to become addresses."""
    pool = hello.pool
    if (pool.page_bytes, pool.page_size) != (own_pool.page_bytes, own_pool.page_size):
        return f"pages differ: {pool.page_bytes} bytes on decode, {own_pool.page_bytes} on prefill"
    if not 1 <= pool.num_pages <= _MAX_ADDRESS // pool.page_bytes:
        return f"a pool cannot have {pool.num_pages} pages"
    if not 0 <= pool.base_address <= _MAX_ADDRESS - pool.num_pages * pool.page_bytes:
        return f"a pool cannot begin at {pool.base_address}"
    if not 0 <= pool.device_id < 2**16:
        return f"there is no device {pool.device_id}"
    if len(hello.agent_metadata) > _MAX_AGENT_METADATA_BYTES:
        return f"{len(hello.agent_metadata)} bytes of agent metadata are too many"
    return None


def prompt_digest(token_ids: npt.NDArray[np.int32]) -> bytes:
    """16 bytes that two workers which tokenised the same text alike have in common."""
    return hashlib.blake2b(token_ids.astype("<i4").tobytes(), digest_size=16).digest()
