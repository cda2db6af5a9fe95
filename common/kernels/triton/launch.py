"""How kernels follow each other: on Hopper, each starts while the last programs of the one before it still run.

A kernel that is launched with `overlapped()` must begin with `if OVERLAP: gdc_wait(); gdc_launch_dependents()` in every program:
it waits there until the kernel before it has ended, with its launch already paid for, and lets its own successor do the same.
"""

from functools import cache
from typing import Any

import torch


@cache
def overlapped() -> dict[str, Any]:
    """The launch options of a kernel that waits for its predecessor by itself, where the GPU can do that."""
    can = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9
    return {"OVERLAP": True, "launch_pdl": True} if can else {"OVERLAP": False}
