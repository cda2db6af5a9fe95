"""Who may be a pair: what both sides must agree on before a page moves, and how a prompt is compared without sending it."""

import hashlib

import numpy as np
import numpy.typing as npt

from common.ranks import kv_heads_at
from transfer.heads import can_split
from transfer.messages import PROTOCOL, Hello, HelloReply, PoolInfo, PoolPart

_MAX_ADDRESS = 2**63
_MAX_AGENT_METADATA_BYTES = 2**20
_MAX_AGENT_NAME = 256
_MAX_RANKS = 64


def refusal_of(hello: Hello, own_pool: PoolInfo) -> str | None:
    """Say why this peer cannot be served, or None if it can."""
    if hello.protocol != PROTOCOL:
        return f"control protocol {hello.protocol} here, {PROTOCOL} there"
    if hello.pool.layout != own_pool.layout:
        return f"KV layouts differ: {hello.pool.layout} on decode, {own_pool.layout} on prefill"
    return _nonsense_in(hello, own_pool)


def is_sound(reply: HelloReply) -> bool:
    """Whether an answer to `Hello` can be meant: what it says of processes and groups becomes proof and addresses."""
    return 1 <= len(reply.processes) <= _MAX_RANKS and 1 <= reply.dp <= _MAX_RANKS


def _nonsense_in(hello: Hello, own_pool: PoolInfo) -> str | None:
    """Say which of a peer's numbers cannot be: they are about to become addresses."""
    pool, num_ranks = hello.pool, len(hello.pool.parts)
    sizes = (pool.page_size, pool.num_kv_heads, pool.head_bytes)
    own_sizes = (own_pool.page_size, own_pool.num_kv_heads, own_pool.head_bytes)
    if sizes != own_sizes:
        return f"pages differ: slots, heads and bytes of a head are {sizes} on decode, {own_sizes} on prefill"
    if not 1 <= num_ranks <= _MAX_RANKS or not can_split(pool.num_kv_heads, num_ranks):
        return f"{num_ranks} ranks cannot share {pool.num_kv_heads} key/value heads"
    if pool.parts[0].agent != hello.peer or len({part.agent for part in pool.parts}) < num_ranks:
        return "its agents are not called as they should be"
    if not 1 <= pool.num_pages <= _MAX_ADDRESS // (pool.num_kv_heads * pool.head_bytes):
        return f"a pool cannot have {pool.num_pages} pages"
    for place, part in enumerate(pool.parts):
        if nonsense := _nonsense_in_part(pool, part, place):
            return nonsense
    return None


def _nonsense_in_part(pool: PoolInfo, part: PoolPart, place: int) -> str | None:
    heads = kv_heads_at(place, len(pool.parts), pool.num_kv_heads)
    if (part.first_head, part.num_heads) != (heads.start, len(heads)):
        return f"the rank at place {place} does not hold {part.num_heads} heads from {part.first_head} on"
    if not 0 <= part.base_address <= _MAX_ADDRESS - pool.num_pages * part.num_heads * pool.head_bytes:
        return f"a pool cannot begin at {part.base_address}"
    if not 0 <= part.device_id < 2**16:
        return f"there is no device {part.device_id}"
    if len(part.agent) > _MAX_AGENT_NAME:
        return f"an agent's name of {len(part.agent)} characters is too long"
    if len(part.agent_metadata) > _MAX_AGENT_METADATA_BYTES:
        return f"{len(part.agent_metadata)} bytes of agent metadata are too many"
    return None


def prompt_digest(token_ids: npt.NDArray[np.int32]) -> bytes:
    """16 bytes that two workers which tokenised the same text alike have in common."""
    return hashlib.blake2b(token_ids.astype("<i4").tobytes(), digest_size=16).digest()
