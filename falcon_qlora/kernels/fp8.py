"""Products in FP8 (e4m3), and the operations that bring their operands into it, behind one seam.

e4m3 has four significant bits: a rounding moves a value by up to 2^-4 of itself, whatever the scale, as long
as it does not come out below 2^-6 of 448. From the largest value down that leaves a factor of 2^14.8 in which
the scale does not matter. So a frozen weight has one scale, and where the largest of a row would take another
pass to find, a bound of it serves as well, also one that is ten times too large.

Each operation has a plain PyTorch form, its reference; as in `ops`, which of the forms runs is `ops.using`'s
to say, or else the tensors' device's. Outputs in FP8 come with their rows' scales: the value is the product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from falcon_qlora.common.fp8 import fp8_excludes
from falcon_qlora.kernels import ops
from falcon_qlora.kernels.fp8_rows import DTYPE, LARGEST, Rows, largest_row
from falcon_qlora.kernels.low_rank import LowRank

_STEEPEST = 1.13  # GELU's derivative is nowhere larger

_emulated = False


@contextmanager
def emulated() -> Iterator[None]:
    """Multiply FP8 operands in float32, on any device: for tests."""
    global _emulated
    before, _emulated = _emulated, True
    try:
        yield
    finally:
        _emulated = before


def why_not(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Why FP8 products beside activations in `dtype` cannot run on `device`; None where they can."""
    if _emulated:
        return None
    named: dict[str, Any] = {"device": device.type, "capability": None}
    if device.type == "cuda":
        named["device"] = torch.cuda.get_device_name(device)
        named["capability"] = torch.cuda.get_device_capability(device)
    return fp8_excludes(dtype=str(dtype).removeprefix("torch."), **named)


def product(x: Rows, weight: Rows, dtype: torch.dtype) -> Tensor:
    """``x @ weightᵀ``.

    Args:
        x: ``[T, I]``.
        weight: ``[O, I]``, with a scale for every row.
        dtype: of the result; bfloat16 where it is not emulated.

    Returns:
        ``[T, O]``.
    """
    if _emulated:
        return (x.float() @ weight.float().T).to(dtype)
    scales = {"scale_a": x.scales[:, None], "scale_b": weight.scales[None]}
    return torch._scaled_mm(x.values, weight.values.t(), **scales, out_dtype=dtype, use_fast_accum=True)


@ops.or_triton("fp8_quantize")
def quantize_rows(x: Tensor) -> tuple[Rows, Tensor]:
    """``[T, C]`` into FP8, a row's largest value onto the largest there is.

    Args:
        x: rows may be any distance apart.

    Returns:
        the rows, and the Euclidean length of each in float32 ``[T]``.
    """
    wide = x.float()
    return _to_fp8(wide, _scales(wide.abs().amax(1))), wide.norm(dim=1)


@ops.or_triton("fp8_quantize")
def quantize_weight(layer: Any, scale: Tensor, out: Tensor, transpose: bool) -> Tensor:
    """The frozen weight that `layer` stands for in FP8, divided by `scale`.

    Args:
        layer: as `ops.dequantize` takes it.
        scale: float32 ``[]``.
        out: ``[out, in]`` to write into, or ``[in, out]`` with `transpose`; contiguous.
        transpose: write the transposed weight.

    Returns:
        `out`.
    """
    shape = out.shape[::-1] if transpose else out.shape
    weight = ops.dequantize(layer, torch.empty(shape, device=out.device))
    values = (weight.T if transpose else weight) / scale
    return out.copy_(values.clamp_(-LARGEST, LARGEST))


@ops.or_triton("fp8_gelu")
def gelu(x: Tensor, low: LowRank | None, bound: Tensor) -> tuple[Rows, Tensor]:
    """Exact GELU of the sum of `x` and what LoRA adds to it.

    Args:
        x: ``[T, F]``.
        low: added to it.
        bound: float32 ``[T]`` of any stride: no value of a row of `x` is larger.

    Returns:
        the output in FP8, and in `x`'s dtype ``[T, F]``.
    """
    y = F.gelu(_added(x, low))
    return _to_fp8(y, _scales(_bound(bound, low))), y.to(x.dtype)


@ops.or_triton("fp8_gelu")
def gelu_backward(
    grad: Tensor, low_grad: LowRank | None, x: Tensor, low: LowRank | None, bound: Tensor
) -> tuple[Rows, Tensor, Tensor]:
    """The input's gradient of `gelu`, and its output once more.

    Args:
        grad: ``[T, F]``, of the output but for `low_grad`; may be overwritten.
        low_grad: added to it.
        x: ``[T, F]``, as in `gelu`.
        low: as in `gelu`.
        bound: float32 ``[T]``: no value of a row of `grad` is larger.

    Returns:
        the gradient in FP8 and in `x`'s dtype ``[T, F]``, and the output ``[T, F]``.
    """
    wide = _added(x, low)
    dx = torch.ops.aten.gelu_backward(_added(grad, low_grad), wide)
    scales = _scales(_STEEPEST * _bound(bound, low_grad))
    return _to_fp8(dx, scales), dx.to(x.dtype), F.gelu(wide).to(x.dtype)


@ops.or_triton("fp8_quantize")
def add(x: Tensor, low: LowRank | None, addends: tuple[Tensor, ...] = ()) -> Tensor:
    """Add what LoRA adds, and up to two more ``[T, C]``, to `x` ``[T, C]`` in place, rounding once.

    Returns:
        `x`.
    """
    return x.copy_(sum(addends, start=_added(x, low)))


def _to_fp8(x: Tensor, scales: Tensor) -> Rows:
    values = (x.float() / scales[:, None]).clamp(-LARGEST, LARGEST)
    return Rows(values.to(DTYPE), scales)


def _scales(largest: Tensor) -> Tensor:
    """A row of nothing but zeros is divided by one."""
    return torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))


def _added(x: Tensor, low: LowRank | None) -> Tensor:
    return x.float() if low is None else x.float() + low.left.float() @ low.right.float()


def _bound(bound: Tensor, low: LowRank | None) -> Tensor:
    if low is None:
        return bound
    return bound + low.left.float().norm(dim=1) * largest_row(low.right.T)
