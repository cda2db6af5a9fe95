"""What all tests share: checkpoints, their judges, and prompts."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import SHAPES, make_checkpoint
from tests.support.judge import Judge


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    """Two cores are shared with the processes under test."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Write a shape's checkpoint once a session."""

    @cache
    def make(shape: str) -> Path:
        return make_checkpoint(tmp_path_factory.mktemp(shape), shape)

    return make


@pytest.fixture(scope="session")
def judge_of(checkpoint_of: Callable[[str], Path]) -> Callable[[str], Judge]:
    """Load a shape's reference once a session."""

    @cache
    def load(shape: str) -> Judge:
        return Judge(checkpoint_of(shape))

    return load


@pytest.fixture(params=sorted(SHAPES))
def shape(request: pytest.FixtureRequest) -> str:
    """Every model shape in turn."""
    return str(request.param)
