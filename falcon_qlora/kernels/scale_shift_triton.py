"""Triton's forms of `scale_shift`'s operations.

Programs take tiles of few tokens and many columns, so that vectors are read once for several tokens. Programs
that compute sums go down their columns through a part of the tokens. The parts' sums are added up at the end.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from falcon_qlora.kernels.gelu import gelu_and_slope
from falcon_qlora.kernels.rows import check_rows, read

_TILE: dict[str, Any] = {"TOKENS": 8, "COLUMNS": 512, "num_warps": 4}
_SUMS_TILE: dict[str, Any] = {"TOKENS": 8, "COLUMNS": 256, "num_warps": 4}
# Eight for each multiprocessor of an H200.
_PROGRAMS = 1056


def scale_shift(x: Tensor, scale: Tensor, bias: Tensor, out: Tensor, gelu: Tensor | None = None) -> Tensor:
    """See `scale_shift.scale_shift`."""
    after = out if gelu is None else gelu
    check_rows(x, out, after)
    if x.numel():
        _scale_shift[_grid(x)](
            x, scale, bias, out, after, x.stride(0), out.stride(0), after.stride(0), *x.shape,
            GELU=gelu is not None, **_TILE,
        )  # fmt: skip
    return out


def add_scaled(
    x: Tensor, first: tuple[Tensor, Tensor, Tensor], second: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """See `scale_shift.add_scaled`."""
    check_rows(x, first[0], second[0])
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        _add_scaled[_grid(x)](
            x, *first, *second, out, x.stride(0), first[0].stride(0), second[0].stride(0), out.stride(0),
            *x.shape, **_TILE,
        )  # fmt: skip
    return out


def scale_backward(grad: Tensor, x: Tensor, scale: Tensor, out: Tensor, through_gelu: bool) -> Tensor:
    """See `scale_shift.scale_backward`."""
    check_rows(x, grad, out)
    return _sum(grad, x, (scale, scale, scale), out, {"GELU": through_gelu, "NORM": False})


def norm_gradients(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """See `scale_shift.norm_gradients`."""
    check_rows(x, grad)
    return _sum(grad, x, (mean, mean, rstd), grad, {"GELU": False, "NORM": True})


def _sum(
    grad: Tensor, x: Tensor, vectors: tuple[Tensor, Tensor, Tensor], out: Tensor, options: dict[str, Any]
) -> Tensor:
    tokens, columns = x.shape
    blocks = triton.cdiv(columns, _SUMS_TILE["COLUMNS"])
    tiles = triton.cdiv(tokens, _SUMS_TILE["TOKENS"])
    parts = max(min(tiles, _PROGRAMS // blocks), 1)
    sums = torch.empty(parts, 2, columns, dtype=torch.float32, device=x.device)
    _sum_columns[(blocks, parts)](
        grad, x, *vectors, out, sums, grad.stride(0), x.stride(0), out.stride(0), tokens, columns,
        **options, **_SUMS_TILE,
    )  # fmt: skip
    return sums.sum(0)


def _grid(x: Tensor) -> tuple[int, int]:
    return triton.cdiv(x.shape[1], _TILE["COLUMNS"]), triton.cdiv(x.shape[0], _TILE["TOKENS"])


@triton.jit
def _tile(first, tokens, columns, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows ``[TOKENS, 1]`` from `first` on, the program's columns ``[1, COLUMNS]``, and which exist."""
    row = (first + tl.arange(0, TOKENS))[:, None]
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return row.to(tl.int64), column, (row < tokens) & (column < columns)


@triton.jit(do_not_specialize=["tokens"])  # it differs from one micro-batch to the next
def _scale_shift(
    x_ptr,  # [T, C], rows x_stride apart
    scale_ptr,  # float32 [C]
    bias_ptr,  # float32 [C]
    out_ptr,  # [T, C], rows out_stride apart
    gelu_ptr,  # [T, C], rows gelu_stride apart; used where GELU
    x_stride,
    out_stride,
    gelu_stride,
    tokens,  # T
    columns,  # C
    GELU: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column, mask = _tile(tl.program_id(1) * TOKENS, tokens, columns, TOKENS, COLUMNS)
    scale = read(scale_ptr, column, column < columns)
    bias = read(bias_ptr, column, column < columns)
    y = (scale * (read(x_ptr, row * x_stride + column, mask) + bias)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_stride + column, y, mask=mask)
    if GELU:
        after, _ = gelu_and_slope(y.to(tl.float32))
        tl.store(gelu_ptr + row * gelu_stride + column, after.to(gelu_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def _add_scaled(
    x_ptr,  # [T, C], rows x_stride apart
    first_ptr,  # [T, C], rows first_stride apart
    first_scale_ptr,  # float32 [C]
    first_bias_ptr,  # float32 [C]
    second_ptr,  # [T, C], rows second_stride apart
    second_scale_ptr,  # float32 [C]
    second_bias_ptr,  # float32 [C]
    out_ptr,  # [T, C], rows out_stride apart
    x_stride,
    first_stride,
    second_stride,
    out_stride,
    tokens,  # T
    columns,  # C
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column, mask = _tile(tl.program_id(1) * TOKENS, tokens, columns, TOKENS, COLUMNS)
    inside = column < columns
    first = read(first_ptr, row * first_stride + column, mask) + read(first_bias_ptr, column, inside)
    second = read(second_ptr, row * second_stride + column, mask) + read(second_bias_ptr, column, inside)
    total = read(x_ptr, row * x_stride + column, mask)
    total += read(first_scale_ptr, column, inside) * first
    total += read(second_scale_ptr, column, inside) * second
    tl.store(out_ptr + row * out_stride + column, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def _sum_columns(
    grad_ptr,  # [T, C], rows grad_stride apart
    x_ptr,  # [T, C], rows x_stride apart
    scale_ptr,  # float32 [C]; not used where NORM
    mean_ptr,  # float32 [T]; used where NORM
    rstd_ptr,  # float32 [T]; used where NORM
    out_ptr,  # [T, C], rows out_stride apart; not used where NORM
    sums_ptr,  # float32 [parts, 2, C]
    grad_stride,
    x_stride,
    out_stride,
    tokens,  # T
    columns,  # C
    GELU: tl.constexpr,
    NORM: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    along = tl.zeros([TOKENS, COLUMNS], tl.float32)
    total = tl.zeros([TOKENS, COLUMNS], tl.float32)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    if not NORM:
        scale = read(scale_ptr, column, column < columns)[None, :]
    for first in range(tl.program_id(1) * TOKENS, tokens, tl.num_programs(1) * TOKENS):
        row, place, mask = _tile(first, tokens, columns, TOKENS, COLUMNS)
        x = read(x_ptr, row * x_stride + place, mask)
        grad = read(grad_ptr, row * grad_stride + place, mask)
        if GELU:
            _, slope = gelu_and_slope(x)
            grad *= slope
        if NORM:
            x = (x - read(mean_ptr, row, row < tokens)) * read(rstd_ptr, row, row < tokens)
        else:
            out = out_ptr + row * out_stride + place
            tl.store(out, (grad * scale).to(out_ptr.dtype.element_ty), mask=mask)
        along += grad * x
        total += grad
    sums_ptr += tl.program_id(1).to(tl.int64) * 2 * columns + column
    tl.store(sums_ptr, tl.sum(along, 0), mask=column < columns)
    tl.store(sums_ptr + columns, tl.sum(total, 0), mask=column < columns)
