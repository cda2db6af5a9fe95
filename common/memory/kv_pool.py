"""The KV pool: one tensor `[page, kv_head, layer, 2, slot, dim]`, and a strided view of it for each layer.

It owns the memory and knows neither who holds which page (`common.memory.page_allocator`) nor how pages travel (`transfer`).
"""

import torch

from common.memory.layout import KvLayout, PoolMemory


class KvPool:
    """Keys and values of `num_pages` pages on one device, zeroed once at start.

    One more page lies behind them, the padding page: lanes of a padded step that hold no token write there.
    """

    def __init__(self, layout: KvLayout, num_pages: int, device: torch.device, dtype: torch.dtype) -> None:
        self.layout = layout
        self.num_pages = num_pages
        self.padding_page = num_pages
        self.pages = torch.zeros((num_pages + 1, *layout.page_shape), dtype=dtype, device=device)

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer: two strided views `[page, kv_head, slot, dim]` of the pool."""
        return self.pages[:, :, layer, 0], self.pages[:, :, layer, 1]

    def read(self, pages: list[int]) -> torch.Tensor:
        """Copy pages to the host, `[n, *page_shape]`; blocks until all work launched before has ended and the copy is there."""
        return self.pages[torch.tensor(pages, device=self.pages.device)].cpu()

    def write(self, pages: list[int], content: torch.Tensor) -> None:
        """Copy pages back from the host; blocks until all work launched before has ended and the copy is there."""
        self.pages[torch.tensor(pages, device=self.pages.device)] = content.to(self.pages.device)
        if self.pages.is_cuda:
            torch.cuda.current_stream(self.pages.device).synchronize()

    def copy(self, page: int, copies: list[int]) -> None:
        """Copy one page into others on the device, behind what is launched already and before whatever is launched next."""
        for copy in copies:
            self.pages[copy].copy_(self.pages[page])

    def info(self) -> PoolMemory:
        """Describe the pool to whoever moves pages between workers."""
        device = self.pages.device
        return PoolMemory(
            base_address=self.pages.data_ptr(),
            num_pages=self.num_pages,
            device_id=device.index or 0,
            memory="VRAM" if device.type == "cuda" else "DRAM",
            layout=self.layout,
        )
