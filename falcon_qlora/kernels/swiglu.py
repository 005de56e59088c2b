"""SwiGLU, up · silu(gate), and its gradient together with the output.

Gate and up lie side by side, as their one product leaves them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from falcon_qlora.kernels.rows import check_rows, contiguous_rows, read, row_part

_BLOCK = 2048
_WARPS = 4


def swiglu(
    gate_up: Tensor, out: Tensor | None = None, gate_multiplier: float = 1.0, multiplier: float = 1.0
) -> Tensor:
    """`ops.swiglu` in one pass."""
    gate_up = contiguous_rows(gate_up)
    tokens, features = gate_up.shape[0], gate_up.shape[1] // 2
    if out is None:
        out = gate_up.new_empty(tokens, features)
    check_rows(gate_up[:, features:], out)
    if out.numel():
        block, options = _block(features)
        _swiglu[(tokens * triton.cdiv(features, block),)](
            gate_up, out, gate_up.stride(0), out.stride(0), features, gate_multiplier, multiplier, **options
        )
    return out


def swiglu_backward(
    grad: Tensor,
    gate_up: Tensor,
    out: Tensor | None = None,
    gate_multiplier: float = 1.0,
    multiplier: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`ops.swiglu_backward` in one pass; `out` may be `gate_up`, and the output is written over `grad`."""
    grad, gate_up = contiguous_rows(grad), contiguous_rows(gate_up)
    if out is None:
        out = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    tokens, features = gate_up.shape[0], gate_up.shape[1] // 2
    check_rows(gate_up, out)
    check_rows(gate_up[:, features:], grad)
    if grad.numel():
        block, options = _block(features)
        _swiglu_backward[(tokens * triton.cdiv(features, block),)](
            grad, gate_up, out,
            grad.stride(0), gate_up.stride(0), out.stride(0), features,
            gate_multiplier, multiplier, **options,
        )  # fmt: skip
    return out, grad


def _block(features: int) -> tuple[int, dict[str, int]]:
    block = min(_BLOCK, triton.next_power_of_2(features))
    return block, {"BLOCK": block, "num_warps": _WARPS}


@triton.jit
def parts(x_ptr, at, features, mask, gate_multiplier):
    """The gate of values at these offsets, times its multiplier, its sigmoid, and up."""
    gate = read(x_ptr, at, mask) * gate_multiplier
    return gate, tl.sigmoid(gate), read(x_ptr, at + features, mask)


@triton.jit
def output_part(gate, share, up, multiplier):
    """SwiGLU of `parts`."""
    return multiplier * up * (gate * share)


@triton.jit
def gradient_parts(grad, gate, share, up, gate_multiplier):
    """The gradients of gate, before its multiplier, and up; `grad` is the output's times its multiplier."""
    of_gate = gate_multiplier * grad * up * share * (1.0 + gate * (1.0 - share))
    return of_gate, grad * (gate * share)


@triton.jit
def _swiglu(
    x_ptr,  # [T, 2F], rows x_stride apart
    y_ptr,  # [T, F], rows y_stride apart
    x_stride,
    y_stride,
    features,  # F
    gate_multiplier,
    multiplier,
    BLOCK: tl.constexpr,
):
    row, column, mask = row_part(features, BLOCK)
    gate, share, up = parts(x_ptr, row * x_stride + column, features, mask, gate_multiplier)
    y = output_part(gate, share, up, multiplier)
    tl.store(y_ptr + row * y_stride + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward(
    y_ptr,  # [T, F], rows y_stride apart: the output's gradient, overwritten by the output
    x_ptr,  # [T, 2F], rows x_stride apart
    dx_ptr,  # [T, 2F], rows dx_stride apart
    y_stride,
    x_stride,
    dx_stride,
    features,  # F
    gate_multiplier,
    multiplier,
    BLOCK: tl.constexpr,
):
    row, column, mask = row_part(features, BLOCK)
    gate, share, up = parts(x_ptr, row * x_stride + column, features, mask, gate_multiplier)
    grad = read(y_ptr, row * y_stride + column, mask) * multiplier
    of_gate, of_up = gradient_parts(grad, gate, share, up, gate_multiplier)
    y = output_part(gate, share, up, multiplier)
    dtype = dx_ptr.dtype.element_ty
    tl.store(dx_ptr + row * dx_stride + column, of_gate.to(dtype), mask=mask)
    tl.store(dx_ptr + row * dx_stride + features + column, of_up.to(dtype), mask=mask)
    tl.store(y_ptr + row * y_stride + column, y.to(y_ptr.dtype.element_ty), mask=mask)
