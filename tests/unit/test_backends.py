"""Which kernels an engine gets, and what the operator reads where the fast ones cannot run."""

import logging
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from msgspec.structs import replace

from common.config import EngineOptions
from common.engine.backends import choose_backends
from common.errors import UsageError
from common.kernels.torch_kernels import TorchKernels
from common.models.config import ModelConfig, load_model_config
from tests.support.checkpoints import ON_GPU, make_checkpoint

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, FLOAT32 = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """A config of a shape that the fused kernels take."""
    folder: Path = make_checkpoint(tmp_path_factory.mktemp("model"), "plain")
    return replace(
        load_model_config(folder),
        head_dim=ON_GPU["head_dim"],
        hidden_size=ON_GPU["hidden_size"],
        moe_intermediate_size=ON_GPU["moe_intermediate_size"],
    )


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_cpu_runs_torch_and_says_nothing(
    config: ModelConfig, kernels: Literal["auto", "torch"], caplog: pytest.LogCaptureFixture
):
    chosen = choose_backends(EngineOptions(kernels=kernels), config, BF16, CPU)
    assert isinstance(chosen.kernels, TorchKernels)
    assert chosen.flashinfer is None
    assert not caplog.records


@pytest.mark.parametrize(
    ("dtype", "changes", "words"),
    [
        (FLOAT32, {}, "none for float32"),
        (BF16, {"head_dim": 96}, "heads of 96"),
        (BF16, {"hidden_size": 252}, "multiple of 16 bytes"),
        (BF16, {"moe_intermediate_size": 60}, "multiple of 16 bytes"),
    ],
)
def test_what_the_fused_kernels_cannot_run_is_named(
    config: ModelConfig, dtype: torch.dtype, changes: dict[str, int], words: str, caplog: pytest.LogCaptureFixture
):
    """`auto` on a GPU goes on slowly, and says so; who asks for `fused` gets an error."""
    config = replace(config, **changes)
    with caplog.at_level(logging.WARNING):
        assert choose_backends(EngineOptions(), config, dtype, CUDA).flashinfer is None
    assert words in caplog.text
    with pytest.raises(UsageError, match=words):
        choose_backends(EngineOptions(kernels="fused"), config, dtype, CUDA)


def test_fused_kernels_need_a_gpu(config: ModelConfig):
    with pytest.raises(UsageError, match="--kernels fused: there are none for cpu"):
        choose_backends(EngineOptions(kernels="fused"), config, BF16, CPU)


@pytest.mark.parametrize("kernels", ["auto", "fused"])
def test_a_missing_package_is_named_with_what_installs_it(
    config: ModelConfig, kernels: Literal["auto", "fused"], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.delitem(sys.modules, "common.kernels.flashinfer_attention", raising=False)
    with pytest.raises(
        UsageError, match=rf"--kernels {kernels}: flashinfer is not installed; .*\[gpu\].*--kernels torch"
    ):
        choose_backends(EngineOptions(kernels=kernels), config, BF16, CUDA)
