"""The shape of the KV pool: one block of memory a page, so that a page travels as one descriptor.

A page is `[kv_head, layer, 2, slot, dim]`, row-major: a head's share of a page is contiguous (tensor-parallel splits cut it
there), and one layer's keys are a strided view over all pages. It knows no torch; `common.memory.kv_pool` holds the memory.
"""

import numpy as np
import numpy.typing as npt
from msgspec import Struct


class KvLayout(Struct, frozen=True, kw_only=True):
    """Sizes of one KV page; the two sides of a transfer must agree on all of them."""

    page_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    itemsize_bytes: int

    @property
    def page_shape(self) -> tuple[int, int, int, int, int]:
        """`(kv_head, layer, key or value, slot, dim)`."""
        return (self.num_kv_heads, self.num_layers, 2, self.page_size, self.head_dim)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, all layers and heads."""
        return self.num_kv_heads * self.num_layers * 2 * self.page_size * self.head_dim * self.itemsize_bytes

    @property
    def fingerprint(self) -> str:
        """One string that differs when any size differs; compared in the handshake."""
        heads, layers, _, slots, dim = self.page_shape
        return f"page[head={heads},layer={layers},kv=2,slot={slots},dim={dim}]:{self.dtype}"


def num_pages_for(num_tokens: int, page_size: int) -> int:
    """How many pages `num_tokens` tokens take."""
    return -(-num_tokens // page_size)


def slots_of(pages: npt.ArrayLike, start: int, stop: int, page_size: int) -> npt.NDArray[np.int64]:
    """The slots of positions `[start, stop)` of a request whose pages are `pages`, in order."""
    positions = np.arange(start, stop)
    return np.asarray(pages, dtype=np.int64)[positions // page_size] * page_size + positions % page_size
