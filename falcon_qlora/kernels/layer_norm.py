"""Layer norm, one or two over the same input, and the input's gradient.

Weights and biases are frozen and get no gradient, so the backward pass reads its inputs once and writes once.
Two norms over one input (Falcon-40B's attention and MLP norms) differ only in weight and bias: they share the
statistics, and their gradients are added before the sums over a row. Sums are taken in float32 over a row in
registers, so nothing is read twice.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton decides the types of a kernel's arguments)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from falcon_qlora.kernels.rows import contiguous_rows

_LANES_A_THREAD = {"forward": 32, "backward": 16}
_MOST_WARPS = 16


def layer_norms(
    x: Tensor,
    norms: Sequence[tuple[Tensor, Tensor]],
    eps: float,
    outs: Sequence[Tensor | None] = (None, None),
) -> tuple[list[Tensor], Tensor, Tensor]:
    """`ops.layer_norms` in one pass."""
    x = contiguous_rows(x)
    tokens, hidden = x.shape
    results = [
        torch.empty_like(x, memory_format=torch.contiguous_format) if y is None else y
        for y in outs[: len(norms)]
    ]
    assert all(y.shape == x.shape and y.stride(1) == 1 for y in results)
    mean = torch.empty(tokens, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    (weight_1, bias_1), (weight_2, bias_2) = norms[0], norms[-1]
    if tokens:
        _layer_norm[(tokens,)](
            x, weight_1, bias_1, weight_2, bias_2, results[0], results[-1], mean, rstd,
            x.stride(0), results[0].stride(0), results[-1].stride(0), hidden, eps,
            TWO=len(norms) == 2, **row_options(hidden, "forward"),
        )  # fmt: skip
    return results, mean, rstd


def layer_norms_backward(
    x: Tensor,
    grads: Sequence[Tensor],
    mean: Tensor,
    rstd: Tensor,
    weights: Sequence[Tensor],
    addend: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`ops.layer_norms_backward` in one pass; `out` may be a gradient or `addend`."""
    x = contiguous_rows(x)
    tokens, hidden = x.shape
    grad_1, grad_2 = (contiguous_rows(grad) for grad in (grads[0], grads[-1]))
    weight_1, weight_2 = weights[0], weights[-1]
    added = x if addend is None else contiguous_rows(addend)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    assert out.stride(1) == 1
    assert all(t.shape == x.shape for t in (grad_1, grad_2, added, out))
    if tokens:
        _layer_norm_backward[(tokens,)](
            grad_1, grad_2, x, mean, rstd, weight_1, weight_2, added, out,
            grad_1.stride(0), grad_2.stride(0), x.stride(0), added.stride(0), out.stride(0), hidden,
            TWO=len(grads) == 2, ADD=addend is not None, **row_options(hidden, "backward"),
        )  # fmt: skip
    return out


def row_options(hidden: int, direction: str) -> dict[str, int]:
    """How a program holds a row: in a power of two of lanes, plus a second, smaller one if that saves many.

    7B's 4,544 columns are held in 4,096 + 512 lanes: with 8,192 nearly half of all lanes would be idle.
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
def _load(ptr, column, hidden):
    return tl.load(ptr + column, mask=column < hidden, other=0.0).to(tl.float32)


@triton.jit
def _store_norm(y_ptr, weight_ptr, bias_ptr, normalized, column, hidden):
    y = normalized * _load(weight_ptr, column, hidden) + _load(bias_ptr, column, hidden)
    tl.store(y_ptr + column, y.to(y_ptr.dtype.element_ty), mask=column < hidden)


@triton.jit
def _layer_norm(
    x_ptr,  # [T, H], rows x_stride apart
    weight_1_ptr,  # [H]
    bias_1_ptr,  # [H]
    weight_2_ptr,  # [H]; used where TWO, as the next
    bias_2_ptr,  # [H]
    y_1_ptr,  # [T, H], rows y_1_stride apart
    y_2_ptr,  # [T, H], rows y_2_stride apart; used where TWO
    mean_ptr,  # float32 [T]
    rstd_ptr,  # float32 [T]
    x_stride,
    y_1_stride,
    y_2_stride,
    hidden,  # H
    eps,
    TWO: tl.constexpr,
    MAIN: tl.constexpr,  # H ≤ MAIN + TAIL
    TAIL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    y_1_ptr += row * y_1_stride
    y_2_ptr += row * y_2_stride
    column = tl.arange(0, MAIN)
    x = _load(x_ptr, column, hidden)
    total = tl.sum(x, 0)
    if TAIL:
        column_t = MAIN + tl.arange(0, TAIL)
        x_t = _load(x_ptr, column_t, hidden)
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
    _store_norm(y_1_ptr, weight_1_ptr, bias_1_ptr, x * rstd, column, hidden)
    if TWO:
        _store_norm(y_2_ptr, weight_2_ptr, bias_2_ptr, x * rstd, column, hidden)
    if TAIL:
        _store_norm(y_1_ptr, weight_1_ptr, bias_1_ptr, x_t * rstd, column_t, hidden)
        if TWO:
            _store_norm(y_2_ptr, weight_2_ptr, bias_2_ptr, x_t * rstd, column_t, hidden)


@triton.jit
def _scaled_gradient(
    grad_1_ptr, grad_2_ptr, weight_1_ptr, weight_2_ptr, column, hidden, TWO: tl.constexpr
):  # fmt: skip
    scaled = _load(grad_1_ptr, column, hidden) * _load(weight_1_ptr, column, hidden)
    if TWO:
        scaled += _load(grad_2_ptr, column, hidden) * _load(weight_2_ptr, column, hidden)
    return scaled


@triton.jit
def _store_gradient(dx_ptr, add_ptr, dx, column, hidden, ADD: tl.constexpr):
    if ADD:
        dx += _load(add_ptr, column, hidden)
    tl.store(dx_ptr + column, dx.to(dx_ptr.dtype.element_ty), mask=column < hidden)


@triton.jit
def _layer_norm_backward(
    grad_1_ptr,  # [T, H], rows grad_1_stride apart
    grad_2_ptr,  # [T, H], rows grad_2_stride apart; used where TWO
    x_ptr,  # [T, H], rows x_stride apart
    mean_ptr,  # float32 [T]
    rstd_ptr,  # float32 [T]
    weight_1_ptr,  # [H]
    weight_2_ptr,  # [H]; used where TWO
    add_ptr,  # [T, H], rows add_stride apart; used where ADD
    dx_ptr,  # [T, H], rows dx_stride apart
    grad_1_stride,
    grad_2_stride,
    x_stride,
    add_stride,
    dx_stride,
    hidden,  # H
    TWO: tl.constexpr,
    ADD: tl.constexpr,
    MAIN: tl.constexpr,  # H ≤ MAIN + TAIL
    TAIL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    grad_1_ptr += row * grad_1_stride
    grad_2_ptr += row * grad_2_stride
    x_ptr += row * x_stride
    add_ptr += row * add_stride
    dx_ptr += row * dx_stride
    mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    column = tl.arange(0, MAIN)
    # Beyond H the scaled gradient is zero and adds nothing to the sums.
    scaled = _scaled_gradient(grad_1_ptr, grad_2_ptr, weight_1_ptr, weight_2_ptr, column, hidden, TWO)
    normalized = (_load(x_ptr, column, hidden) - mean) * rstd
    of_mean = tl.sum(scaled, 0)
    of_rstd = tl.sum(scaled * normalized, 0)
    if TAIL:
        column_t = MAIN + tl.arange(0, TAIL)
        scaled_t = _scaled_gradient(grad_1_ptr, grad_2_ptr, weight_1_ptr, weight_2_ptr, column_t, hidden, TWO)
        normalized_t = (_load(x_ptr, column_t, hidden) - mean) * rstd
        of_mean += tl.sum(scaled_t, 0)
        of_rstd += tl.sum(scaled_t * normalized_t, 0)
    of_mean = of_mean / hidden
    of_rstd = of_rstd / hidden
    dx = rstd * (scaled - of_mean - normalized * of_rstd)
    _store_gradient(dx_ptr, add_ptr, dx, column, hidden, ADD)
    if TAIL:
        dx_t = rstd * (scaled_t - of_mean - normalized_t * of_rstd)
        _store_gradient(dx_ptr, add_ptr, dx_t, column_t, hidden, ADD)
