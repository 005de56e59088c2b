"""SwiGLU and its gradient with their results in FP8 too, a row a program.

A row's scale is known when its largest value is, so values are written in the activations' dtype first, and
read again while the caches have them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from falcon_qlora.kernels.fp8_quantize import row_scale
from falcon_qlora.kernels.fp8_rows import DTYPE, Rows
from falcon_qlora.kernels.rows import check_rows, contiguous_rows, read
from falcon_qlora.kernels.swiglu import gradient_parts, output_part, parts

_BLOCK = 4096
_WARPS = 16


def swiglu(gate_up: Tensor, out: Tensor, gate_multiplier: float = 1.0, multiplier: float = 1.0) -> Rows:
    """`fp8.swiglu` in one launch."""
    gate_up = contiguous_rows(gate_up)
    tokens, features = out.shape
    check_rows(gate_up[:, features:], out)
    rows = _empty_rows(out)
    if tokens:
        _swiglu[(tokens,)](
            gate_up, out, *rows, gate_up.stride(0), out.stride(0), features,
            gate_multiplier, multiplier, **_options(features),
        )  # fmt: skip
    return rows


def swiglu_backward(
    grad: Tensor, gate_up: Tensor, out: Tensor, gate_multiplier: float = 1.0, multiplier: float = 1.0
) -> tuple[Rows, Tensor]:
    """`fp8.swiglu_backward` in one launch; the output is written over `grad`."""
    grad, gate_up = contiguous_rows(grad), contiguous_rows(gate_up)
    tokens, features = grad.shape
    check_rows(gate_up, out)
    check_rows(gate_up[:, features:], grad)
    rows = _empty_rows(out)
    if tokens:
        _swiglu_backward[(tokens,)](
            grad, gate_up, out, *rows, grad.stride(0), gate_up.stride(0), out.stride(0), features,
            gate_multiplier, multiplier, **_options(features),
        )  # fmt: skip
    return rows, grad


def _empty_rows(x: Tensor) -> Rows:
    scales = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    return Rows(torch.empty(x.shape, dtype=DTYPE, device=x.device), scales)


def _options(features: int) -> dict[str, int]:
    block = min(_BLOCK, triton.next_power_of_2(features))
    return {"BLOCK": block, "num_warps": min(max(block // 128, 1), _WARPS)}


@triton.jit
def _swiglu(
    x_ptr,  # [T, 2F], rows x_stride apart
    y_ptr,  # [T, F], rows y_stride apart
    values_ptr,  # fp8 [T, F]
    scales_ptr,  # float32 [T]
    x_stride,
    y_stride,
    features,  # F
    gate_multiplier,
    multiplier,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    y_ptr += row * y_stride
    dtype = y_ptr.dtype.element_ty
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, features, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < features
        gate, share, up = parts(x_ptr, column, features, mask, gate_multiplier)
        y = output_part(gate, share, up, multiplier).to(dtype)
        tl.store(y_ptr + column, y, mask=mask)
        largest = tl.maximum(largest, tl.abs(y.to(tl.float32)))
    scale = row_scale(largest)
    tl.store(scales_ptr + row, scale)
    tl.debug_barrier()  # what this program has written is read by other threads of it
    _quantize(y_ptr, values_ptr + row * features, features, scale, BLOCK)


@triton.jit
def _swiglu_backward(
    y_ptr,  # [T, F], rows y_stride apart: the output's gradient, overwritten by the output
    x_ptr,  # [T, 2F], rows x_stride apart
    dx_ptr,  # [T, 2F], rows dx_stride apart
    values_ptr,  # fp8 [T, 2F]
    scales_ptr,  # float32 [T]
    y_stride,
    x_stride,
    dx_stride,
    features,  # F
    gate_multiplier,
    multiplier,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    y_ptr += row * y_stride
    x_ptr += row * x_stride
    dx_ptr += row * dx_stride
    dtype = dx_ptr.dtype.element_ty
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, features, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < features
        gate, share, up = parts(x_ptr, column, features, mask, gate_multiplier)
        grad = read(y_ptr, column, mask) * multiplier
        of_gate, of_up = gradient_parts(grad, gate, share, up, gate_multiplier)
        of_gate, of_up = of_gate.to(dtype), of_up.to(dtype)
        tl.store(dx_ptr + column, of_gate, mask=mask)
        tl.store(dx_ptr + features + column, of_up, mask=mask)
        y = output_part(gate, share, up, multiplier)
        tl.store(y_ptr + column, y.to(y_ptr.dtype.element_ty), mask=mask)
        both = tl.maximum(tl.abs(of_gate.to(tl.float32)), tl.abs(of_up.to(tl.float32)))
        largest = tl.maximum(largest, both)
    scale = row_scale(largest)
    tl.store(scales_ptr + row, scale)
    tl.debug_barrier()  # as in `_swiglu`
    _quantize(dx_ptr, values_ptr + row * 2 * features, 2 * features, scale, BLOCK)


@triton.jit
def _quantize(x_ptr, values_ptr, features, scale, BLOCK: tl.constexpr):
    """A row ``[C]`` divided by its scale, in FP8."""
    for start in range(0, features, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < features
        values = read(x_ptr, column, mask) * (1.0 / scale)
        tl.store(values_ptr + column, values.to(values_ptr.dtype.element_ty), mask=mask)
