"""Frozen weights of every storage back into floating point: `ops.dequantize` by the kernels that can."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from falcon_qlora.kernels import ops
from falcon_qlora.kernels.nf4 import can_dequantize_nf4, dequantize_nf4
from falcon_qlora.kernels.rows import row_part

_BLOCK = 2048
_WARPS = 4


def dequantize(layer: Any, out: Tensor | None = None) -> Tensor:
    """`ops.dequantize` in one pass; what is neither int8 nor NF4 in blocks of 64 goes the plain way."""
    weight = layer.weight
    if weight.dtype == torch.int8:
        if out is None:
            out = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device)
        assert out.stride(1) == 1
        rows, columns = weight.shape
        grid = (rows * triton.cdiv(columns, _BLOCK),)
        _dequantize_int8[grid](
            weight.data, ops.int8_scales(layer), out, out.stride(0), columns, BLOCK=_BLOCK, num_warps=_WARPS
        )
        return out
    state = getattr(weight, "quant_state", None)
    if state is None or not can_dequantize_nf4(state):
        with ops.using("torch"):
            return ops.dequantize(layer, out)
    if out is None:
        out = torch.empty(state.shape, dtype=state.dtype, device=weight.device)
    return dequantize_nf4(weight.data, state, out)


@triton.jit
def _dequantize_int8(
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
