"""Learned scales and biases of linears' outputs, ``s (z + b)``; and the gradients of trained norms.

Everything is computed in float32 and rounded once: folded into bfloat16 weights, small updates of a scale
would be lost. The vectors' gradients are sums over tokens, taken in float32 in a fixed order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from falcon_qlora.kernels import ops


@ops.or_triton("scale_shift_triton")
def scale_shift(x: Tensor, scale: Tensor, bias: Tensor, out: Tensor, gelu: Tensor | None = None) -> Tensor:
    """Write ``scale * (x + bias)``, and its exact GELU if `gelu` is given.

    Args:
        x: ``[T, C]``; any row stride, as for all tensors here.
        scale: float32 ``[C]``.
        bias: float32 ``[C]``.
        out: ``[T, C]`` to write into; may be `x`.
        gelu: ``[T, C]`` to write GELU of the result into, or None.

    Returns:
        `out`.
    """
    out.copy_(scale * (x.float() + bias))
    if gelu is not None:
        gelu.copy_(F.gelu(out))
    return out


@ops.or_triton("scale_shift_triton")
def add_scaled(
    x: Tensor, first: tuple[Tensor, Tensor, Tensor], second: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Add two scaled and shifted outputs to `x`.

    Args:
        x: ``[T, C]``.
        first: an output ``[T, C]``, its scale and its bias, float32 ``[C]`` each.
        second: likewise.

    Returns:
        ``[T, C]`` in `x`'s dtype.
    """
    total = x.float()
    for output, scale, bias in (first, second):
        total = total + scale * (output.float() + bias)
    return total.to(x.dtype)


@ops.or_triton("scale_shift_triton")
def scale_backward(grad: Tensor, x: Tensor, scale: Tensor, out: Tensor, *, through_gelu: bool) -> Tensor:
    """Write the gradient of the scaled values, and return the sums that the vectors' gradients need.

    Args:
        grad: ``[T, C]``, of the result of `scale_shift`, or of its GELU where `through_gelu`.
        x: ``[T, C]``; where `through_gelu`, the result of `scale_shift`.
        scale: float32 ``[C]``.
        out: ``[T, C]`` to write the gradient times `scale` into; may be `grad` or `x`.
        through_gelu: whether `grad` first goes back through GELU.

    Returns:
        float32 ``[2, C]``: sums over tokens of the result's gradient times `x`, and of the gradient.
    """
    wide, x = grad.float(), x.float()
    if through_gelu:
        wide = torch.ops.aten.gelu_backward(wide, x)
    sums = torch.stack([(wide * x).sum(0), wide.sum(0)])
    out.copy_(wide * scale)
    return sums


@ops.or_triton("scale_shift_triton")
def norm_gradients(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """The gradients of a layer norm's weight and bias.

    Args:
        grad: ``[T, C]``, of the norm's output.
        x: ``[T, C]``, its input.
        mean: float32 ``[T]``, from the forward pass.
        rstd: float32 ``[T]``, likewise.

    Returns:
        float32 ``[2, C]``.
    """
    wide, normal = grad.float(), (x.float() - mean[:, None]) * rstd[:, None]
    return torch.stack([(wide * normal).sum(0), wide.sum(0)])
