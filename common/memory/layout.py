"""The shape of a rank's KV pool: one block of memory a page, so that a page travels as one descriptor.

A page is `[kv_head, layer, 2, slot, dim]`, row-major: a head's share of a page is contiguous (tensor-parallel splits cut it
there), and one layer's keys are a strided view over all pages. It knows no torch; `common.memory.kv_pool` holds the memory.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt
from msgspec import Struct


class KvLayout(Struct, frozen=True, kw_only=True):
    """Sizes of one KV page in one rank; the two sides of a transfer must agree on all but on which heads are where."""

    page_size: int
    num_layers: int
    num_kv_heads: int
    """Heads that are held here."""
    first_kv_head: int = 0
    """The first of them."""
    model_kv_heads: int = 0
    """Heads of the whole model; 0: those held here are all."""
    head_dim: int
    dtype: str
    itemsize_bytes: int

    @property
    def page_shape(self) -> tuple[int, int, int, int, int]:
        """`(kv_head, layer, key or value, slot, dim)`."""
        return (self.num_kv_heads, self.num_layers, 2, self.page_size, self.head_dim)

    @property
    def num_model_kv_heads(self) -> int:
        """Heads of the whole model."""
        return self.model_kv_heads or self.num_kv_heads

    @property
    def head_bytes(self) -> int:
        """One head's share of a page, all layers."""
        return self.num_layers * 2 * self.page_size * self.head_dim * self.itemsize_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, all layers and the heads that are held here."""
        return self.num_kv_heads * self.head_bytes

    @property
    def fingerprint(self) -> str:
        """One string that differs when any size of a whole page differs; compared in the handshake."""
        _, layers, _, slots, dim = self.page_shape
        return f"page[head={self.num_model_kv_heads},layer={layers},kv=2,slot={slots},dim={dim}]:{self.dtype}"


class PoolMemory(Struct, frozen=True, kw_only=True):
    """Where a rank's KV pool is: pages one after another from `base_address` on."""

    base_address: int
    num_pages: int
    device_id: int
    memory: Literal["DRAM", "VRAM"]
    layout: KvLayout

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in this rank, and from the beginning of one to that of the next."""
        return self.layout.page_bytes


def num_pages_for(num_tokens: int, page_size: int) -> int:
    """How many pages `num_tokens` tokens take."""
    return -(-num_tokens // page_size)


def slots_of(pages: npt.ArrayLike, start: int, stop: int, page_size: int) -> npt.NDArray[np.int64]:
    """The slots of positions `[start, stop)` of a request whose pages are `pages`, in order."""
    positions = np.arange(start, stop)
    return np.asarray(pages, dtype=np.int64)[positions // page_size] * page_size + positions % page_size
