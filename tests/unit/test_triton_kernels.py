"""The fused kernels where there is no GPU: Triton interprets them; `tests/gpu/test_fused_kernels.py` runs them compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TRITON = Path(__file__).parents[2] / ".cache" / "triton"
CHECKS = (
    "add_norm",
    "add_norm_over",
    "norm_rotate_store",
    "few_tokens",
    "single_tokens",
    "many_tokens",
    "choose",
    "add_up",
    "place",
    "nowhere",
    "run_experts_single",
    "run_experts_few",
    "run_experts_many",
    "fp8_single",
    "fp8_few",
    "fp8_many",
    "ties",
    "draw",
)


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    if not TRITON.is_dir():
        pytest.skip("needs Triton, which `make test` puts into .cache/triton")
    environment = os.environ | {"PYTHONPATH": str(TRITON)}
    command = [sys.executable, "-m", "tests.support.interpreted_kernels"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    made: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    assert made.keys() == set(CHECKS)
    return made


@pytest.mark.parametrize("name", CHECKS)
def test_the_kernel_is_its_twin(results: dict[str, str | None], name: str):
    assert results[name] is None, results[name]
