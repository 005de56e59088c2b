"""Copying rows into a slice of longer rows, or out of one, at the memory's speed.

Shapes: T tokens, N columns.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (a kernel's arguments are what Triton makes of them)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048
_WARPS = 4


def copy_rows(x: Tensor, out: Tensor) -> Tensor:
    """Copy `x` into `out`, both ``[T, N]`` of one dtype, rows any distance apart. Returns `out`."""
    assert x.shape == out.shape
    assert x.stride(1) == out.stride(1) == 1
    if x.numel():
        grid = (x.shape[0], triton.cdiv(x.shape[1], _BLOCK))
        _copy[grid](x, out, x.stride(0), out.stride(0), x.shape[1], BLOCK=_BLOCK, num_warps=_WARPS)
    return out


@triton.jit
def _copy(
    x_ptr,  # [T, N]
    out_ptr,  # [T, N]
    x_stride,
    out_stride,
    columns,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = places < columns
    tl.store(
        out_ptr + row * out_stride + places,
        tl.load(x_ptr + row * x_stride + places, mask=inside),
        mask=inside,
    )
