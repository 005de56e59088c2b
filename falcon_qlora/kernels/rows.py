"""Helpers for matrices of any row stride, and a copy between them at memory speed."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048
_WARPS = 4


def contiguous_rows(matrix: Tensor) -> Tensor:
    """The matrix itself if its rows are contiguous, else a copy."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def check_rows(x: Tensor, *others: Tensor) -> None:
    """Raise ValueError unless all have the shape of the first, and contiguous rows."""
    for each in (x, *others):
        if each.shape != x.shape or (each.stride(1) != 1 and each.shape[1] > 1):
            raise ValueError(
                f"expected {tuple(x.shape)} with a contiguous last dimension, not {tuple(each.shape)} with "
                f"strides {each.stride()}"
            )


def common_unit(*matrices: Tensor) -> int:
    """8, 4, 2 or 1, which divides all row strides: kernels cannot see it of those that 16 does not divide."""
    return math.gcd(8, *(each.stride(0) for each in matrices))


def copy_rows(x: Tensor, out: Tensor, scale: float = 1.0) -> Tensor:
    """Copy `scale` times `x` into `out`, both ``[T, C]`` of one dtype and any row stride. Returns `out`."""
    assert x.shape == out.shape
    assert x.stride(1) == out.stride(1) == 1
    if x.numel():
        grid = (x.shape[0], triton.cdiv(x.shape[1], _BLOCK))
        _copy[grid](x, out, x.stride(0), out.stride(0), x.shape[1], scale, BLOCK=_BLOCK, num_warps=_WARPS)
    return out


@triton.jit
def read(ptr, offset, mask):
    """Load as float32, with zeros outside the mask."""
    return tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def row_part(columns, BLOCK: tl.constexpr):
    """This program's row, its columns, and which of these exist; programs go along rows."""
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    return row, column, column < columns


@triton.jit
def _copy(
    x_ptr,  # [T, C]
    out_ptr,  # [T, C]
    x_stride,
    out_stride,
    columns,
    scale,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = places < columns
    y = scale * read(x_ptr, row * x_stride + places, inside)
    tl.store(out_ptr + row * out_stride + places, y.to(out_ptr.dtype.element_ty), mask=inside)
