"""The fused kernels where there is no GPU: Triton interprets them; `tests/gpu/test_fused_kernels.py` runs them compiled."""

import json
import subprocess
import sys

import pytest

CHECKS = ("add_norm", "norm_rotate_store", "few_tokens", "single_tokens", "many_tokens", "ties", "draw")


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    pytest.importorskip("triton", minversion="3.9", reason="older interpreters do not work with today's numpy")
    command = [sys.executable, "-m", "tests.support.interpreted_kernels"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    made: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    assert made.keys() == set(CHECKS)
    return made


@pytest.mark.parametrize("name", CHECKS)
def test_the_kernel_is_its_twin(results: dict[str, str | None], name: str):
    assert results[name] is None, results[name]
