"""Dequantization of LLM.int8()'s weights: rows of int8, each with one scale."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from falcon_qlora.kernels.rows import row_part

_BLOCK = 2048
_WARPS = 4


def dequantize_int8(weight: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    """Write ``weight * scales / 127``, computed in float32 and rounded once.

    Args:
        weight: int8 ``[O, I]``, contiguous.
        scales: float32 ``[O]``, the largest absolute value of each row.
        out: ``[O, I]`` to write into; any row stride.

    Returns:
        `out`.
    """
    assert weight.shape == out.shape
    assert weight.is_contiguous()
    assert out.stride(1) == 1
    if weight.numel():
        rows, columns = weight.shape
        grid = (rows * triton.cdiv(columns, _BLOCK),)
        _dequantize[grid](weight, scales, out, out.stride(0), columns, BLOCK=_BLOCK, num_warps=_WARPS)
    return out


@triton.jit
def _dequantize(
    int8_ptr,  # int8 [O, I]
    scales_ptr,  # float32 [O]
    out_ptr,  # [O, I], rows out_stride apart
    out_stride,
    columns,
    BLOCK: tl.constexpr,
):
    row, places, inside = row_part(columns, BLOCK)
    scale = tl.load(scales_ptr + row).to(tl.float32) / 127.0
    values = tl.load(int8_ptr + row * columns + places, mask=inside, other=0).to(tl.float32)
    tl.store(out_ptr + row * out_stride + places, (values * scale).to(out_ptr.dtype.element_ty), mask=inside)
