"""Which kernels an engine gets, and what the operator reads where the fast ones cannot run."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from msgspec.structs import replace

from common.config import EngineOptions
from common.engine.backends import choose_backends
from common.errors import UsageError
from common.kernels.torch_kernels import TorchKernels
from common.models.config import Fp8Config, ModelConfig, load_model_config
from common.ranks import Rank, Ranks
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


# ------------------------------------------------------------------------------------------------ FP8

Fp8 = Literal["auto", "native", "dequantised"]
BLOCKS = Fp8Config(quant_method="fp8", weight_block_size=(128, 128))
WITHOUT_FP8 = {"quantization_config": None}
ODD_BLOCKS = {"quantization_config": Fp8Config(quant_method="fp8", weight_block_size=(64, 128))}


@pytest.fixture
def is_native(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """Choose for a GPU that there is not, with kernels that only note what they are told."""
    fused = SimpleNamespace(FusedKernels=lambda *, native_fp8: SimpleNamespace(native_fp8=native_fp8))
    flashinfer = SimpleNamespace(FlashinferAttention=lambda **settings: settings)
    monkeypatch.setitem(sys.modules, "common.kernels.fused_kernels", fused)
    monkeypatch.setitem(sys.modules, "common.kernels.flashinfer_attention", flashinfer)
    config = replace(config, quantization_config=BLOCKS, moe_intermediate_size=512, num_attention_heads=8)

    def choose(fp8: Fp8 = "auto", *, capability: tuple[int, int] = (9, 0), rank: Rank = Rank(), **changes: Any) -> bool:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        return choose_backends(EngineOptions(fp8=fp8), replace(config, **changes), BF16, CUDA, rank).kernels.native_fp8

    return choose


@pytest.mark.parametrize("capability", [(9, 0), (10, 3)])
@pytest.mark.parametrize("rank", [Rank(), Rank(3, Ranks(tp=4)), Rank(2, Ranks(tp=8, ep=True))])
def test_experts_stay_float8_where_they_can(
    is_native: Callable[..., bool], capability: tuple[int, int], rank: Rank, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO):
        assert is_native("auto", capability=capability, rank=rank)
        assert is_native("native", capability=capability, rank=rank)
        assert not is_native("dequantised", capability=capability, rank=rank)
    assert not caplog.records


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"capability": (8, 9)}, "compute capability is 8.9"),
        (ODD_BLOCKS, "blocks of 64 x 128"),
        ({"hidden_size": 192}, "hidden size of 192"),
        ({"rank": Rank(0, Ranks(tp=8))}, "64 of an expert's width"),
        ({"moe_intermediate_size": 448}, "448 of an expert's width"),
    ],
)
def test_what_keeps_experts_from_float8_is_named(
    is_native: Callable[..., bool], changes: dict[str, Any], words: str, caplog: pytest.LogCaptureFixture
):
    """`auto` dequantises, and says why in one line; who asks for `native` gets an error."""
    with caplog.at_level(logging.INFO):
        assert not is_native("dequantised", **changes)
        assert not caplog.records
        assert not is_native("auto", **changes)
    assert [words in record.getMessage() for record in caplog.records] == [True]
    with pytest.raises(UsageError, match=f"--fp8 native: .*{words}"):
        is_native("native", **changes)


def test_float8_that_is_not_there_is_not_missed(is_native: Callable[..., bool], caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        assert not is_native("auto", **WITHOUT_FP8)
    assert not caplog.records
    with pytest.raises(UsageError, match=r"--fp8 native: .*no quantization_config"):
        is_native("native", **WITHOUT_FP8)


def test_torchs_kernels_take_no_float8(config: ModelConfig, caplog: pytest.LogCaptureFixture):
    config = replace(config, quantization_config=BLOCKS)
    with caplog.at_level(logging.INFO):
        assert not choose_backends(EngineOptions(), config, BF16, CPU).kernels.native_fp8
    assert "FP8 experts are dequantised: only the fused kernels" in caplog.text
    with pytest.raises(UsageError, match="--fp8 native: only the fused kernels"):
        choose_backends(EngineOptions(fp8="native"), config, BF16, CPU)
