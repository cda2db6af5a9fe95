"""One row for each running request: its pages, and the token that its next step starts from.

The page table is host memory, written by the scheduler; `last_tokens` lives on the device, written by the sampler of one
step and read by the next, so that a sampled token feeds the next step without a trip through the host.
"""

import numpy as np
import numpy.typing as npt
import torch


class RequestTable:
    """`num_rows` rows of up to `pages_per_row` pages; a row is reused only once no step with its last owner is in flight."""

    def __init__(self, num_rows: int, pages_per_row: int, device: torch.device) -> None:
        self.pages: npt.NDArray[np.int32] = np.zeros((num_rows, pages_per_row), dtype=np.int32)
        """`[num_rows, pages_per_row]`; only the entries that a plan's context covers mean anything."""
        self.last_tokens = torch.zeros(num_rows, dtype=torch.int64, device=device)
        """`[num_rows]`: the token sampled last, on the device."""
        self._free = list(range(num_rows - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Rows that no request holds."""
        return len(self._free)

    def allocate(self, pages: list[int]) -> int:
        """Take a row for a request that holds `pages`."""
        row = self._free.pop()
        self.pages[row, : len(pages)] = pages
        return row

    def release(self, row: int) -> None:
        """Give a row back."""
        assert row not in self._free, "a row was freed twice"
        self._free.append(row)
