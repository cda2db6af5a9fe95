"""What the expert kernels share of float8: how activations are quantised on their way into a product.

The weights are in blocks with one scale each (`common.kernels.interface.ExpertMatrices`). Activations get a scale a token and
group of `FP8_BLOCK` numbers, so one step along such a group is one product of float8 tiles whose sum, in float32, is multiplied by
both scales.
"""

import triton
import triton.language as tl


@triton.jit
def quantise(x, AXIS: tl.constexpr):  # noqa: ANN201
    """Float8 numbers, and their float32 scales; all of `x` along `AXIS` is one group.

    A group's largest number becomes 448, the largest of float8; a group of zeros keeps a finite scale.
    """
    x = x.to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(x), AXIS), 1e-10)
    return (x * tl.expand_dims(448.0 / largest, AXIS)).to(tl.float8e4nv), largest * (1.0 / 448.0)
