"""Triton's form of `ops.dequantize`, for frozen weights in any storage format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from falcon_qlora.kernels import ops
from falcon_qlora.kernels.int8 import dequantize_int8
from falcon_qlora.kernels.nf4 import can_dequantize_nf4, dequantize_nf4


def dequantize(layer: Any, out: Tensor | None = None) -> Tensor:
    """`ops.dequantize` in one pass; the plain form unless the weight is int8 or NF4 in blocks of 64."""
    weight = layer.weight
    if weight.dtype == torch.int8:
        if out is None:
            out = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device)
        return dequantize_int8(weight.data, ops.int8_scales(layer), out)
    state = getattr(weight, "quant_state", None)
    if state is None or not can_dequantize_nf4(state):
        with ops.using("torch"):
            return ops.dequantize(layer, out)
    if out is None:
        out = torch.empty(state.shape, dtype=state.dtype, device=weight.device)
    return dequantize_nf4(weight.data, state, out)
