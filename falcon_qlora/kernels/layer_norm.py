"""Layer norm, and its gradient for the input.

Weight and bias are frozen: they get no gradient, so the backward pass is one read of what it needs and one
write. Sums are taken in float32, of a row that is held in registers: no second read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from falcon_qlora.kernels.rows import contiguous_rows, read

_LANES_A_THREAD = {"forward": 32, "backward": 16}
_MOST_WARPS = 16


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.layer_norm` in one pass."""
    x = contiguous_rows(x)
    tokens, hidden = x.shape
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    assert out.shape == x.shape
    assert out.stride(1) == 1
    mean = torch.empty(tokens, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if tokens:
        _layer_norm[(tokens,)](
            x, weight, bias, out, mean, rstd, x.stride(0), out.stride(0), hidden, eps,
            **_row_options(hidden, "forward"),
        )  # fmt: skip
    return out, mean, rstd


def layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    addend: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`ops.layer_norm_backward` in one pass; `out` may be `grad` or `addend`."""
    grad, x = contiguous_rows(grad), contiguous_rows(x)
    tokens, hidden = x.shape
    added = x if addend is None else contiguous_rows(addend)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    assert out.stride(1) == 1
    assert all(t.shape == x.shape for t in (grad, added, out))
    if tokens:
        _layer_norm_backward[(tokens,)](
            grad, x, mean, rstd, weight, added, out,
            grad.stride(0), x.stride(0), added.stride(0), out.stride(0), hidden,
            ADD=addend is not None, **_row_options(hidden, "backward"),
        )  # fmt: skip
    return out


def _row_options(hidden: int, direction: str) -> dict[str, int]:
    """How a program holds a row: a power of two of lanes, and a second, smaller one where that saves many.

    7B's 4,544 are 4,096 + 512 lanes: with 8,192 nearly half of all instructions would do nothing.
    """
    lanes = triton.next_power_of_2(hidden)
    main, rest = lanes // 2, triton.next_power_of_2(max(hidden - lanes // 2, 1))
    if main >= 1024 and 2 * rest <= main:
        lanes, tail = main, max(rest, 128)
    else:
        tail = 0
    warps = min(max(lanes // (32 * _LANES_A_THREAD[direction]), 1), _MOST_WARPS)
    return {"MAIN": lanes, "TAIL": tail, "num_warps": warps}


@triton.jit
def _store_norm(y_ptr, weight_ptr, bias_ptr, normalized, column, hidden):
    inside = column < hidden
    y = normalized * read(weight_ptr, column, inside) + read(bias_ptr, column, inside)
    tl.store(y_ptr + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _layer_norm(
    x_ptr,  # [T, H], rows x_stride apart
    weight_ptr,  # [H]
    bias_ptr,  # [H]
    y_ptr,  # [T, H], rows y_stride apart
    mean_ptr,  # float32 [T]
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
    total = tl.sum(x, 0)
    if TAIL:
        column_t = MAIN + tl.arange(0, TAIL)
        x_t = read(x_ptr, column_t, column_t < hidden)
        total += tl.sum(x_t, 0)
    mean = total / hidden
    x = tl.where(column < hidden, x - mean, 0.0)
    squares = tl.sum(x * x, 0)
    if TAIL:
        x_t = tl.where(column_t < hidden, x_t - mean, 0.0)
        squares += tl.sum(x_t * x_t, 0)
    rstd = 1.0 / tl.sqrt(squares / hidden + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    _store_norm(y_ptr, weight_ptr, bias_ptr, x * rstd, column, hidden)
    if TAIL:
        _store_norm(y_ptr, weight_ptr, bias_ptr, x_t * rstd, column_t, hidden)


@triton.jit
def _store_gradient(dx_ptr, add_ptr, dx, column, hidden, ADD: tl.constexpr):
    if ADD:
        dx += read(add_ptr, column, column < hidden)
    tl.store(dx_ptr + column, dx.to(dx_ptr.dtype.element_ty), mask=column < hidden)


@triton.jit
def _layer_norm_backward(
    grad_ptr,  # [T, H], rows grad_stride apart
    x_ptr,  # [T, H], rows x_stride apart
    mean_ptr,  # float32 [T]
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
    mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    column = tl.arange(0, MAIN)
    # Beyond H the scaled gradient is zero, and so is what it adds to the sums.
    scaled = read(grad_ptr, column, column < hidden) * read(weight_ptr, column, column < hidden)
    normalized = (read(x_ptr, column, column < hidden) - mean) * rstd
    of_mean = tl.sum(scaled, 0)
    of_rstd = tl.sum(scaled * normalized, 0)
    if TAIL:
        column_t = MAIN + tl.arange(0, TAIL)
        scaled_t = read(grad_ptr, column_t, column_t < hidden) * read(weight_ptr, column_t, column_t < hidden)
        normalized_t = (read(x_ptr, column_t, column_t < hidden) - mean) * rstd
        of_mean += tl.sum(scaled_t, 0)
        of_rstd += tl.sum(scaled_t * normalized_t, 0)
    of_mean = of_mean / hidden
    of_rstd = of_rstd / hidden
    dx = rstd * (scaled - of_mean - normalized * of_rstd)
    _store_gradient(dx_ptr, add_ptr, dx, column, hidden, ADD)
    if TAIL:
        dx_t = rstd * (scaled_t - of_mean - normalized_t * of_rstd)
        _store_gradient(dx_ptr, add_ptr, dx_t, column_t, hidden, ADD)
