"""KV pages of swapped requests, kept in host memory: each rank keeps its own part, under the same key.

Neighbours: `common.engine.engine` (swaps for the roles), `common.engine.follower` (the same on the group's other ranks).
"""

import torch

from common.memory.kv_pool import KvPool


class HostPages:
    """One rank's pages outside of its pool."""

    def __init__(self, kv_pool: KvPool) -> None:
        self._kv_pool = kv_pool
        self._stashed: dict[int, torch.Tensor] = {}

    def stash(self, key: int, pages: list[int]) -> None:
        """Copy pages to the host; blocks until all work launched before has ended and the copy is there."""
        assert key not in self._stashed
        self._stashed[key] = self._kv_pool.read(pages)

    def restore(self, key: int, pages: list[int]) -> None:
        """Copy what was stashed into other pages, as many, and forget it; blocks until the copy is there."""
        self._kv_pool.write(pages, self._stashed.pop(key))

    def drop(self, key: int) -> None:
        """Forget what was stashed."""
        del self._stashed[key]
