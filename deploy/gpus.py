"""Which GPUs this machine offers, found without loading torch into the launcher.

It knows no worker; `deploy.launch_plan` deals the GPUs out. An entry is whatever CUDA_VISIBLE_DEVICES accepts.
"""

import os
import shutil
import subprocess

NVIDIA_SMI_DEADLINE_S = 30.0


def visible_gpus() -> list[str]:
    """List the GPUs that a child of this process may use; none without a driver, or if the environment hides them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu.strip() for gpu in chosen.split(",") if gpu.strip() not in ("", "-1")]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        listing = subprocess.run(
            [tool, "-L"], capture_output=True, text=True, timeout=NVIDIA_SMI_DEADLINE_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        # A driver that cannot even list its GPUs will not run a model on them.
        return []
    # One line a GPU; the indented lines between them are MIG slices.
    count = sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
    return [str(index) for index in range(count)]
