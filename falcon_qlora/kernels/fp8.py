"""Products in FP8 (e4m3), and the operations that quantize their operands, behind one seam.

e4m3 has four significant bits: rounding moves a value by at most 2^-4 of itself, whatever the scale, as long
as the scaled value is at least 2^-6. From 448, the largest, down to there is a factor of 2^14.8 in which the
scale does not matter. So one scale is enough for a frozen weight. Where finding a row's largest value would
take another pass, an upper bound of it is as good, even one that is ten times too large.

Each operation has a plain PyTorch form, its reference. As in `ops`, `ops.using` or else the tensors' device
decides which form runs. FP8 outputs come with a scale for each row: a value is its code times the scale.
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
from falcon_qlora.kernels.frozen_linear import mm_float32
from falcon_qlora.kernels.low_rank import LowRank

UNIT = 16
"""Matrix units take rows and columns of frozen weights in multiples of it."""

STEEPEST = 1.13  # GELU's derivative is nowhere larger

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


def is_emulated() -> bool:
    """Whether `emulated` is in force."""
    return _emulated


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
        weight: ``[O, I]``, with a scale for every row; O and I are multiples of `UNIT`.
        dtype: of the result; bfloat16 unless emulated.

    Returns:
        ``[T, O]``.
    """
    assert not any(size % UNIT for size in weight.values.shape), weight.values.shape
    if _emulated:
        return (x.float() @ weight.float().T).to(dtype)
    scales = {"scale_a": x.scales[:, None], "scale_b": weight.scales[None]}
    return torch._scaled_mm(x.values, weight.values.t(), **scales, out_dtype=dtype, use_fast_accum=True)


@ops.or_triton("fp8_quantize")
def quantize_rows(x: Tensor, out: Tensor | None = None, least: Tensor | None = None) -> tuple[Rows, Tensor]:
    """Quantize ``[T, C]`` to FP8, with each row's largest value mapped to FP8's largest.

    Args:
        x: any row stride.
        out: in FP8 ``[T, C]`` to write into, any row stride; None for a new tensor.
        least: float32 ``[T]``: a row whose values are all smaller is scaled as if this were its largest.

    Returns:
        the rows, and the Euclidean length of each in float32 ``[T]``.
    """
    wide = x.float()
    largest = wide.abs().amax(1)
    rows = to_rows(wide, _scales(largest if least is None else torch.maximum(largest, least)))
    if out is not None:
        rows = Rows(out.copy_(rows.values), rows.scales)
    return rows, wide.norm(dim=1)


@ops.or_triton("fp8_quantize")
def quantize_weight(layer: Any, scale: Tensor, out: Tensor, transpose: bool) -> Tensor:
    """The frozen weight of `layer`, divided by `scale`, in FP8.

    Args:
        layer: as `ops.dequantize` takes it.
        scale: float32 ``[]``.
        out: ``[out, in]`` to write into, or ``[in, out]`` with `transpose`; any row stride.
        transpose: write the transposed weight.

    Returns:
        `out`.
    """
    shape = out.shape[::-1] if transpose else out.shape
    weight = ops.dequantize(layer, torch.empty(shape, device=out.device))
    values = (weight.T if transpose else weight) / scale
    return out.copy_(values.clamp_(-LARGEST, LARGEST))


@ops.or_triton("fp8_quantize")
def split_columns(matrix: Tensor, scales: Tensor, balance: Tensor, out: Tensor, of_weight: bool) -> None:
    """Balance a matrix, and write each value as the sum of two FP8 values, high and low.

    Args:
        matrix: ``[N, R]``, any strides.
        scales: float32 ``[N]``, any stride: each row is divided by its own.
        balance: float32 ``[R]``: each column is divided by its own, or with `of_weight` multiplied.
        out: in FP8 ``[N, C]`` to write into, C ≥ 3 R, any row stride: the high values, the low ones and the
            high ones again, then zeros.
        of_weight: write the high values twice and then the low ones.
    """
    wide = matrix.float() / scales[:, None]
    high, low = _split(wide * balance if of_weight else wide / balance)
    together = torch.cat([high, high, low] if of_weight else [high, low, high], dim=1)
    width = together.shape[1]
    out[:, :width] = together
    out[:, width:] = 0


@ops.or_triton("fp8_low_rank")
def into_low_rank(a: Tensor, rows: Rows) -> Tensor:
    """``rows @ aᵀ``.

    Args:
        a: ``[R, C]``, any strides.
        rows: ``[T, C]``.

    Returns:
        ``[T, R]`` in `a`'s dtype.
    """
    return (rows.float() @ a.float().T).to(a.dtype)


@ops.or_triton("fp8_low_rank")
def gathered(low: Tensor, rows: Rows) -> Tensor:
    """``lowᵀ @ rows``.

    Args:
        low: ``[T, R]``, in the dtype in which rows' values are multiplied.
        rows: ``[T, C]``.

    Returns:
        float32 ``[R, C]``.
    """
    return low.float().T @ rows.float()


@ops.or_triton("fp8_gelu")
def gelu(x: Tensor, low: LowRank | None, bound: Tensor) -> Rows:
    """Exact GELU of the sum of `x` and LoRA's part.

    Args:
        x: ``[T, F]``.
        low: LoRA's part, or None.
        bound: float32 ``[T]``, any stride: an upper bound of each row's absolute values in `x`.

    Returns:
        GELU's output in FP8 ``[T, F]``.
    """
    return to_rows(F.gelu(_added(x, low)), bound_scales(bound, low))


@ops.or_triton("fp8_gelu")
def gelu_backward(
    grad: Tensor, low_grad: LowRank | None, grad_bound: Tensor, x: Tensor, low: LowRank | None, bound: Tensor
) -> tuple[Rows, Tensor | None, Tensor | None]:
    """The gradient of `gelu`'s input, and what the adapters on both sides have of the same matrices.

    Args:
        grad: ``[T, F]``, of the output, without `low_grad`.
        low_grad: added to it.
        grad_bound: float32 ``[T]``, any stride: an upper bound of each row's absolute values in `grad`.
        x: ``[T, F]``, as in `gelu`; likewise the others.
        low: LoRA's part, or None.
        bound: float32 ``[T]``.

    Returns:
        the gradient dx in FP8 ``[T, F]``; ``low_grad.leftᵀ @ y``, float32 ``[R, F]``, with GELU's output y;
        ``low.leftᵀ @ dx`` likewise, of y and dx in `x`'s dtype or in FP8. None without LoRA there.
    """
    wide = _added(x, low)
    dx = torch.ops.aten.gelu_backward(_added(grad, low_grad), wide)
    rows = to_rows(dx, bound_scales(grad_bound, low_grad, STEEPEST))
    y, dx = F.gelu(wide).to(x.dtype), dx.to(x.dtype)
    of_a, of_b = (
        None if part is None else mm_float32(part.left.T, other) for part, other in ((low_grad, y), (low, dx))
    )
    return rows, of_a, of_b


@ops.or_triton("fp8_swiglu")
def swiglu(gate_up: Tensor, out: Tensor, gate_multiplier: float = 1.0, multiplier: float = 1.0) -> Rows:
    """`ops.swiglu`, with the output in FP8 as `quantize_rows` gives it.

    Args:
        gate_up: ``[T, 2F]``, as in `ops.swiglu`; likewise the others.
        out: ``[T, F]`` to write the output into.
        gate_multiplier: of the gate.
        multiplier: of the result.

    Returns:
        the output in FP8 ``[T, F]``.
    """
    return quantize_rows(ops.swiglu(gate_up, out, gate_multiplier, multiplier))[0]


@ops.or_triton("fp8_swiglu")
def swiglu_backward(
    grad: Tensor, gate_up: Tensor, out: Tensor, gate_multiplier: float = 1.0, multiplier: float = 1.0
) -> tuple[Rows, Tensor]:
    """`ops.swiglu_backward`, with the gradient in FP8 as `quantize_rows` gives it.

    Args:
        grad: ``[T, F]``, as in `ops.swiglu_backward`; likewise the others.
        gate_up: ``[T, 2F]``.
        out: ``[T, 2F]`` to write the gradient into; may be `gate_up`.
        gate_multiplier: of the gate.
        multiplier: of the output.

    Returns:
        the gradient in FP8 ``[T, 2F]``, and the output ``[T, F]``.
    """
    gradient, output = ops.swiglu_backward(grad, gate_up, out, gate_multiplier, multiplier)
    return quantize_rows(gradient)[0], output


@ops.or_triton("fp8_quantize")
def add(x: Tensor, low: LowRank | None, addends: tuple[Tensor, ...] = ()) -> Tensor:
    """Add LoRA's part, and up to two more ``[T, C]``, to `x` ``[T, C]`` in-place, rounding once.

    Returns:
        `x`.
    """
    return x.copy_(sum(addends, start=_added(x, low)))


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest FP8 value, and what is left of `x`; both in float32."""
    high = x.clamp(-LARGEST, LARGEST).to(DTYPE).float()
    return high, x - high


def to_rows(x: Tensor, scales: Tensor) -> Rows:
    """Quantize ``[T, C]`` with these scales, float32 ``[T]``."""
    values = (x.float() / scales[:, None]).clamp(-LARGEST, LARGEST)
    return Rows(values.to(DTYPE), scales)


def _scales(largest: Tensor) -> Tensor:
    """Rows' scales from their largest values; 1 for a row of zeros."""
    return torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))


def _added(x: Tensor, low: LowRank | None) -> Tensor:
    return x.float() if low is None else x.float() + low.left.float() @ low.right.float()


@ops.or_triton("fp8_bounds")
def bound_scales(bound: Tensor, low: LowRank | None, factor: float = 1.0) -> Tensor:
    """Scales for rows ``[T, C]`` that are at most `factor` times a matrix with LoRA's part.

    Args:
        bound: float32 ``[T]``, any stride: an upper bound of each row's absolute values without `low`.
        low: LoRA's part, or None.
        factor: applied to both.

    Returns:
        float32 ``[T]``.
    """
    if low is not None:
        bound = bound + low.left.float().norm(dim=1) * largest_row(low.right.T)
    return _scales(factor * bound)
