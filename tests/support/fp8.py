"""What products of float8 numbers with block scales are, in float32 and one step after the other, and how far they may be off."""

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

from common.kernels.interface import FP8_BLOCK, ExpertMatrices

LARGEST = 448.0
HALF_STEP = 2.0**-4
"""Largest error of rounding to float8, relative: numbers have three bits behind the leading one."""
LEAST_HALF_STEP = 2.0**-10 / LARGEST
"""Largest error of the smallest numbers, whose steps do not shrink any more, relative to the largest of their group."""


def random_matrices(num: int, rows: int, columns: int, device: str = "cpu") -> ExpertMatrices:
    """Products with these have about the variance of what they are given; the blocks' scales are far apart."""
    stored = torch.randn(num, rows, columns, device=device).mul(64).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    spread = torch.rand(num, rows // FP8_BLOCK, columns // FP8_BLOCK, device=device).mul(4).sub(2).exp2()
    return ExpertMatrices(stored, spread / (64 * 1.3 * columns**0.5))


def dequantised(matrices: ExpertMatrices) -> ExpertMatrices:
    """What the matrices mean, in float32."""
    return ExpertMatrices(torch.stack([matrices.of(each, torch.float32) for each in range(len(matrices.weight))]))


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float8 numbers, and float32 scales, one for each FP8_BLOCK of the last dimension, whose largest number becomes LARGEST."""
    groups = x.float().unflatten(-1, (-1, FP8_BLOCK))
    largest = groups.abs().amax(dim=-1, keepdim=True).clamp(min=1e-10)
    # A number divided by a tensor is two roundings in torch, and halves between two float8 numbers are common.
    factor = torch.full_like(largest, LARGEST) / largest
    return (groups * factor).to(torch.float8_e4m3fn).flatten(-2), (largest * (1 / LARGEST)).squeeze(-1)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """What is left of `x` when it has been quantised, in float32."""
    stored, scale = quantise(x)
    return stored.float() * scale.repeat_interleave(FP8_BLOCK, -1)


class Expected(NamedTuple):
    """One step's sums over each token's experts."""

    exact: torch.Tensor
    """With what the matrices mean and the activations as they are."""
    quantised: torch.Tensor
    """With activations quantised on their way into both products."""
    bound: torch.Tensor
    """How far the two may be apart at most, number by number."""


def expected_of(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, gate_up: ExpertMatrices, down: ExpertMatrices
) -> Expected:
    """Run tokens through their experts; an id that is not of `[0, E)` adds nothing.

    The bound follows the errors: rounding x, through a product, through `silu(gate) * up` (silu is nowhere steeper than 1.1),
    rounding that, through the other product; each product adds up its inputs' errors times its weights' sizes.
    """
    made = Expected(*(torch.zeros(x.shape, device=x.device) for _ in range(3)))
    for expert in range(len(gate_up.weight)):
        token, rank = (ids == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        first, second = gate_up.of(expert, torch.float32), down.of(expert, torch.float32)
        hidden, factor = x[token].float(), weights[token, rank, None].float()
        gate, up = (hidden @ first.T).chunk(2, dim=1)
        inner = F.silu(gate) * up
        made.exact.index_add_(0, token, (inner @ second.T) * factor)
        gate_8, up_8 = (rounded(hidden) @ first.T).chunk(2, dim=1)
        inner_8 = (F.silu(gate_8) * up_8).to(x.dtype)
        made.quantised.index_add_(0, token, (rounded(inner_8) @ second.T) * factor)
        gate_error, up_error = (_rounding_error(hidden) @ first.abs().T).chunk(2, dim=1)
        inner_error = 1.1 * gate_error * (up.abs() + up_error) + F.silu(gate).abs() * up_error
        error = inner_error + _rounding_error(inner.abs() + inner_error)
        made.bound.index_add_(0, token, (error @ second.abs().T) * factor.abs())
    return made


def _rounding_error(x: torch.Tensor) -> torch.Tensor:
    largest = x.abs().unflatten(-1, (-1, FP8_BLOCK)).amax(dim=-1).repeat_interleave(FP8_BLOCK, -1)
    return x.abs() * HALF_STEP + largest * LEAST_HALF_STEP
