"""RMS norm, and its input's gradient.

The weight is frozen and gets no gradient, so each pass reads its inputs once and writes once. Sums are taken
in float32 over a row in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from falcon_qlora.kernels.layer_norm import row_options
from falcon_qlora.kernels.rows import check_rows, contiguous_rows, read


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`ops.rms_norm` in one pass."""
    x = contiguous_rows(x)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    check_rows(x, out)
    tokens, hidden = x.shape
    rstd = torch.empty(tokens, dtype=torch.float32, device=x.device)
    if tokens:
        _rms_norm[(tokens,)](
            x, weight, out, rstd, x.stride(0), out.stride(0), hidden, eps, **row_options(hidden, "forward")
        )
    return out, rstd


def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor,
    addend: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`ops.rms_norm_backward` in one pass; `out` may be `grad` or `addend`."""
    grad, x = contiguous_rows(grad), contiguous_rows(x)
    added = x if addend is None else contiguous_rows(addend)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    check_rows(x, grad, added, out)
    tokens, hidden = x.shape
    if tokens:
        _rms_norm_backward[(tokens,)](
            grad, x, rstd, weight, added, out,
            grad.stride(0), x.stride(0), added.stride(0), out.stride(0), hidden,
            ADD=addend is not None, **row_options(hidden, "backward"),
        )  # fmt: skip
    return out


@triton.jit
def _store(ptr, column, values, hidden):
    tl.store(ptr + column, values.to(ptr.dtype.element_ty), mask=column < hidden)


@triton.jit
def _rms_norm(
    x_ptr,  # [T, H], rows x_stride apart
    weight_ptr,  # [H]
    y_ptr,  # [T, H], rows y_stride apart
    rstd_ptr,  # float32 [T]
    x_stride,
    y_stride,
    hidden,  # H
    eps,
    MAIN: tl.constexpr,  # H ≤ MAIN + TAIL
    TAIL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    y_ptr += row * y_stride
    column = tl.arange(0, MAIN)
    x = read(x_ptr, column, column < hidden)
    squares = tl.sum(x * x, 0)
    if TAIL:
        column_t = MAIN + tl.arange(0, TAIL)
        x_t = read(x_ptr, column_t, column_t < hidden)
        squares += tl.sum(x_t * x_t, 0)
    rstd = 1.0 / tl.sqrt(squares / hidden + eps)
    tl.store(rstd_ptr + row, rstd)
    _store(y_ptr, column, x * rstd * read(weight_ptr, column, column < hidden), hidden)
    if TAIL:
        _store(y_ptr, column_t, x_t * rstd * read(weight_ptr, column_t, column_t < hidden), hidden)


@triton.jit
def _scaled_gradient(grad_ptr, weight_ptr, column, hidden):
    return read(grad_ptr, column, column < hidden) * read(weight_ptr, column, column < hidden)


@triton.jit
def _store_gradient(dx_ptr, add_ptr, dx, column, hidden, ADD: tl.constexpr):
    if ADD:
        dx += read(add_ptr, column, column < hidden)
    _store(dx_ptr, column, dx, hidden)


@triton.jit
def _rms_norm_backward(
    grad_ptr,  # [T, H], rows grad_stride apart
    x_ptr,  # [T, H], rows x_stride apart
    rstd_ptr,  # float32 [T]
    weight_ptr,  # [H]
    add_ptr,  # [T, H], rows add_stride apart; used where ADD
    dx_ptr,  # [T, H], rows dx_stride apart
    grad_stride,
    x_stride,
    add_stride,
    dx_stride,
    hidden,  # H
    ADD: tl.constexpr,
    MAIN: tl.constexpr,  # H ≤ MAIN + TAIL
    TAIL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    grad_ptr += row * grad_stride
    x_ptr += row * x_stride
    add_ptr += row * add_stride
    dx_ptr += row * dx_stride
    rstd = tl.load(rstd_ptr + row)
    column = tl.arange(0, MAIN)
    # Beyond H the scaled gradient is zero and adds nothing to the sum.
    scaled = _scaled_gradient(grad_ptr, weight_ptr, column, hidden)
    normalized = read(x_ptr, column, column < hidden) * rstd
    of_rstd = tl.sum(scaled * normalized, 0)
    if TAIL:
        column_t = MAIN + tl.arange(0, TAIL)
        scaled_t = _scaled_gradient(grad_ptr, weight_ptr, column_t, hidden)
        normalized_t = read(x_ptr, column_t, column_t < hidden) * rstd
        of_rstd += tl.sum(scaled_t * normalized_t, 0)
    of_rstd = of_rstd / hidden
    _store_gradient(dx_ptr, add_ptr, rstd * (scaled - normalized * of_rstd), column, hidden, ADD)
    if TAIL:
        _store_gradient(dx_ptr, add_ptr, rstd * (scaled_t - normalized_t * of_rstd), column_t, hidden, ADD)
