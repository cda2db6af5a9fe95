"""The fused kernels where there is no GPU: Triton interprets them; `tests/gpu/test_fused_kernels.py` runs them compiled."""

import importlib.metadata
import json
import subprocess
import sys

import pytest

CHECKS = ("add_norm", "norm_rotate_store", "few_tokens", "single_tokens", "many_tokens", "ties", "draw")


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    # Asked of its metadata: importing Triton here would make it print at this process' end.
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs Triton, whose interpreter runs on a CPU")
    if tuple(map(int, version.split(".")[:2])) < (3, 9):
        pytest.skip(f"Triton {version}'s interpreter does not work with today's numpy")
    command = [sys.executable, "-m", "tests.support.interpreted_kernels"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    made: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    assert made.keys() == set(CHECKS)
    return made


@pytest.mark.parametrize("name", CHECKS)
def test_the_kernel_is_its_twin(results: dict[str, str | None], name: str):
    assert results[name] is None, results[name]
