"""Triton's form of `ssd_ops`' gate, in one pass over the rows; a program takes one group's channels of a row.

With p = y silu(z) and r = 1 / sqrt(mean(p²) + ε) the norm behind the gate is w p r. Its gradient of p is
``r (e - p r² mean(p e))``, with e = w dout. The norm before the gate has y in the place of p.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from falcon_qlora.kernels.rows import check_rows, common_unit, read
from falcon_qlora.kernels.ssd import StateSpace

_LANES_A_THREAD = 16


def gate(y: Tensor, z: Tensor, space: StateSpace, out: Tensor, scale: float = 1.0) -> Tensor:
    """See `ssd_ops.gate`."""
    check_rows(y, z, out)
    if y.numel():
        _gate[(y.shape[0] * space.groups,)](
            y, z, *_vectors(space), out, y.stride(0), z.stride(0), out.stride(0), space.groups,
            space.width // space.groups, space.epsilon, scale, UNIT=common_unit(z), **_options(space),
        )  # fmt: skip
    return out


def gate_backward(
    grad: Tensor, y: Tensor, z: Tensor, space: StateSpace, of_z: Tensor, out: Tensor, scale: float = 1.0
) -> Tensor:
    """See `ssd_ops.gate_backward`."""
    of_y = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    check_rows(y, z, grad, of_z, out)
    if y.numel():
        _gate_backward[(y.shape[0] * space.groups,)](
            grad, y, z, *_vectors(space), of_y, of_z, out, grad.stride(0), y.stride(0), z.stride(0),
            of_y.stride(0), of_z.stride(0), out.stride(0), space.groups, space.width // space.groups,
            space.epsilon, scale, UNIT=common_unit(z, of_z), **_options(space),
        )  # fmt: skip
    return of_y


def _vectors(space: StateSpace) -> tuple[Tensor, Tensor]:
    multipliers = space.split(space.multipliers)[0]
    return multipliers, multipliers if space.norm is None else space.norm


def _options(space: StateSpace) -> dict[str, Any]:
    norm = {"NORM": space.norm is not None, "NORM_BEFORE": space.norm_before_gate}
    return norm | _lanes(space.width // space.groups)


def _lanes(columns: int) -> dict[str, int]:
    lanes = triton.next_power_of_2(columns)
    return {"LANES": lanes, "num_warps": min(max(lanes // (32 * _LANES_A_THREAD), 1), 16)}


@triton.jit
def _row_and_group(groups, columns, LANES: tl.constexpr):
    """The program's row, its columns of all groups, and which of them exist."""
    lane = tl.arange(0, LANES)
    row = (tl.program_id(0) // groups).to(tl.int64)
    return row, (tl.program_id(0) % groups) * columns + lane, lane < columns


@triton.jit
def _gate(
    y_ptr,  # [T, MP], rows y_stride apart
    z_ptr,  # [T, MP], rows z_stride apart
    multipliers_ptr,  # float32 [MP]
    weight_ptr,  # [MP]; used where NORM
    out_ptr,  # [T, MP], rows out_stride apart
    y_stride,
    z_stride,
    out_stride,
    groups,  # G
    columns,  # MP / G
    eps,
    scale,
    NORM: tl.constexpr,
    NORM_BEFORE: tl.constexpr,
    UNIT: tl.constexpr,  # divides z_stride
    LANES: tl.constexpr,
):
    z_stride = z_stride // UNIT * UNIT
    row, column, mask = _row_and_group(groups, columns, LANES)
    y = read(y_ptr, row * y_stride + column, mask)
    z = read(z_ptr, row * z_stride + column, mask) * read(multipliers_ptr, column, mask)
    gate = z * tl.sigmoid(z)
    out = y * gate
    if NORM:
        normed = y if NORM_BEFORE else out
        out *= read(weight_ptr, column, mask) * tl.rsqrt(tl.sum(normed * normed, 0) / columns + eps)
    tl.store(out_ptr + row * out_stride + column, (scale * out).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gate_backward(
    grad_ptr,  # [T, MP], rows grad_stride apart
    y_ptr,  # [T, MP], rows y_stride apart
    z_ptr,  # [T, MP], rows z_stride apart
    multipliers_ptr,  # float32 [MP]
    weight_ptr,  # [MP]; used where NORM
    dy_ptr,  # [T, MP], rows dy_stride apart
    dz_ptr,  # [T, MP], rows dz_stride apart
    out_ptr,  # [T, MP], rows out_stride apart
    grad_stride,
    y_stride,
    z_stride,
    dy_stride,
    dz_stride,
    out_stride,
    groups,  # G
    columns,  # MP / G
    eps,
    scale,
    NORM: tl.constexpr,
    NORM_BEFORE: tl.constexpr,
    UNIT: tl.constexpr,  # divides z_stride and dz_stride
    LANES: tl.constexpr,
):
    z_stride, dz_stride = z_stride // UNIT * UNIT, dz_stride // UNIT * UNIT
    row, column, mask = _row_and_group(groups, columns, LANES)
    grad = scale * read(grad_ptr, row * grad_stride + column, mask)
    y = read(y_ptr, row * y_stride + column, mask)
    multiplier = read(multipliers_ptr, column, mask)
    z = read(z_ptr, row * z_stride + column, mask) * multiplier
    share = tl.sigmoid(z)
    gate = z * share
    slope = multiplier * share * (1.0 + z * (1.0 - share))
    out = y * gate
    dy, dz = grad * gate, grad * y * slope
    if NORM:
        normed = y if NORM_BEFORE else out
        weight = read(weight_ptr, column, mask)
        root = tl.rsqrt(tl.sum(normed * normed, 0) / columns + eps)
        # Of a gradient e of the norm's weighted input, only a multiple of the input is taken away.
        along = root * root * tl.sum(out * weight * grad, 0) / columns
        out *= weight * root
        if NORM_BEFORE:
            dy = root * (weight * dy - y * along)
            dz *= weight * root
        else:
            of_product = root * (weight * grad - normed * along)
            dy, dz = of_product * gate, of_product * y * slope
    tl.store(dy_ptr + row * dy_stride + column, dy.to(dy_ptr.dtype.element_ty), mask=mask)
    tl.store(dz_ptr + row * dz_stride + column, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + row * out_stride + column, (scale * out).to(out_ptr.dtype.element_ty), mask=mask)
