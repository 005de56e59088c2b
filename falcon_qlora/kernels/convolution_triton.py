"""Triton's form of `ssd_ops`' convolution over documents.

A program goes down its channels through some tokens and keeps the last rows in registers, so that it reads
each number once. Going back, it recomputes the input of SiLU and goes three tokens past its own, whose
gradients are part of its own tokens'. Convolutions with fewer than four taps have zeros for the others.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from falcon_qlora.kernels.rows import check_rows, common_unit, read
from falcon_qlora.kernels.ssd import StateSpace

_TILE: dict[str, Any] = {"TOKENS": 32, "CHANNELS": 256, "num_warps": 2}


def convolve(channels: Tensor, space: StateSpace, positions: Tensor) -> Tensor:
    """See `ssd_ops.convolve`."""
    out = torch.empty(channels.shape, dtype=channels.dtype, device=channels.device)
    check_rows(channels, out)
    if channels.numel():
        _convolve[_grid(channels)](
            channels, *_parameters(space), positions, out, channels.stride(0), out.stride(0),
            *channels.shape, UNIT=common_unit(channels), **_options(space),
        )  # fmt: skip
    return out


def convolve_backward(
    grad: Tensor, channels: Tensor, space: StateSpace, positions: Tensor, out: Tensor
) -> Tensor:
    """See `ssd_ops.convolve_backward`."""
    check_rows(channels, grad, out)
    if channels.numel():
        _convolve_backward[_grid(channels)](
            grad, channels, *_parameters(space), positions, out, grad.stride(0), channels.stride(0),
            out.stride(0), *channels.shape, UNIT=common_unit(channels, out), **_options(space),
        )  # fmt: skip
    return out


def _grid(channels: Tensor) -> tuple[int, int]:
    tokens, columns = channels.shape
    return triton.cdiv(columns, _TILE["CHANNELS"]), triton.cdiv(tokens, _TILE["TOKENS"])


def _parameters(space: StateSpace) -> tuple[Tensor, Tensor, Tensor]:
    weight = space.weight.contiguous()
    bias = weight if space.bias is None else space.bias
    return space.split(space.multipliers)[1], weight, bias


def _options(space: StateSpace) -> dict[str, Any]:
    return {"TAPS": space.weight.shape[1], "BIAS": space.bias is not None, **_TILE}


@triton.jit
def _tap(weight_ptr, multiplier, channel, own, BACK: tl.constexpr, TAPS: tl.constexpr):
    """For the token BACK before, times the multiplier."""
    return multiplier * read(weight_ptr, channel * TAPS + (TAPS - 1 - BACK), own & (BACK < TAPS))


@triton.jit
def _within(rows, position, BACK: tl.constexpr):
    """Zeros where the document has no token BACK before."""
    return tl.where(position >= BACK, rows, 0.0)


@triton.jit(do_not_specialize=["tokens"])  # it differs from one micro-batch to the next
def _convolve(
    x_ptr,  # [T, C], rows x_stride apart
    multipliers_ptr,  # float32 [C]
    weight_ptr,  # [C, K]
    bias_ptr,  # [C]; used where BIAS
    positions_ptr,  # int64 [T]
    y_ptr,  # [T, C], rows y_stride apart
    x_stride,
    y_stride,
    tokens,  # T
    channels,  # C
    TAPS: tl.constexpr,  # K
    BIAS: tl.constexpr,
    UNIT: tl.constexpr,  # divides x_stride
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    x_stride = x_stride // UNIT * UNIT
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    own = channel < channels
    multiplier = read(multipliers_ptr, channel, own)
    tap_0 = _tap(weight_ptr, multiplier, channel, own, 0, TAPS)
    tap_1 = _tap(weight_ptr, multiplier, channel, own, 1, TAPS)
    tap_2 = _tap(weight_ptr, multiplier, channel, own, 2, TAPS)
    tap_3 = _tap(weight_ptr, multiplier, channel, own, 3, TAPS)
    bias = read(bias_ptr, channel, own & BIAS)
    first = tl.program_id(1).to(tl.int64) * TOKENS
    x_1 = read(x_ptr, (first - 1) * x_stride + channel, own & (first >= 1))
    x_2 = read(x_ptr, (first - 2) * x_stride + channel, own & (first >= 2))
    x_3 = read(x_ptr, (first - 3) * x_stride + channel, own & (first >= 3))
    for place in range(TOKENS):
        token = first + place
        inside = own & (token < tokens)
        position = tl.load(positions_ptr + token, mask=token < tokens, other=0)
        x_0 = read(x_ptr, token * x_stride + channel, inside)
        before = bias + tap_0 * x_0 + tap_1 * _within(x_1, position, 1)
        before += tap_2 * _within(x_2, position, 2) + tap_3 * _within(x_3, position, 3)
        y = before * tl.sigmoid(before)
        tl.store(y_ptr + token * y_stride + channel, y.to(y_ptr.dtype.element_ty), mask=inside)
        x_3, x_2, x_1 = x_2, x_1, x_0


@triton.jit(do_not_specialize=["tokens"])
def _convolve_backward(
    grad_ptr,  # [T, C], rows grad_stride apart
    x_ptr,  # [T, C], rows x_stride apart
    multipliers_ptr,  # float32 [C]
    weight_ptr,  # [C, K]
    bias_ptr,  # [C]; used where BIAS
    positions_ptr,  # int64 [T]
    dx_ptr,  # [T, C], rows dx_stride apart
    grad_stride,
    x_stride,
    dx_stride,
    tokens,  # T
    channels,  # C
    TAPS: tl.constexpr,  # K
    BIAS: tl.constexpr,
    UNIT: tl.constexpr,  # divides x_stride and dx_stride
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    x_stride, dx_stride = x_stride // UNIT * UNIT, dx_stride // UNIT * UNIT
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    own = channel < channels
    multiplier = read(multipliers_ptr, channel, own)
    tap_0 = _tap(weight_ptr, multiplier, channel, own, 0, TAPS)
    tap_1 = _tap(weight_ptr, multiplier, channel, own, 1, TAPS)
    tap_2 = _tap(weight_ptr, multiplier, channel, own, 2, TAPS)
    tap_3 = _tap(weight_ptr, multiplier, channel, own, 3, TAPS)
    bias = read(bias_ptr, channel, own & BIAS)
    first = tl.program_id(1).to(tl.int64) * TOKENS
    x_1 = read(x_ptr, (first - 1) * x_stride + channel, own & (first >= 1))
    x_2 = read(x_ptr, (first - 2) * x_stride + channel, own & (first >= 2))
    x_3 = read(x_ptr, (first - 3) * x_stride + channel, own & (first >= 3))
    # What the tokens read so far give to those one, two and three before the next.
    dx_1 = tl.zeros([CHANNELS], tl.float32)
    dx_2 = tl.zeros([CHANNELS], tl.float32)
    dx_3 = tl.zeros([CHANNELS], tl.float32)
    for place in range(TOKENS + 3):
        token = first + place
        inside = own & (token < tokens)
        position = tl.load(positions_ptr + token, mask=token < tokens, other=0)
        x_0 = read(x_ptr, token * x_stride + channel, inside)
        before = bias + tap_0 * x_0 + tap_1 * _within(x_1, position, 1)
        before += tap_2 * _within(x_2, position, 2) + tap_3 * _within(x_3, position, 3)
        share = tl.sigmoid(before)
        grad = read(grad_ptr, token * grad_stride + channel, inside)
        grad *= share * (1.0 + before * (1.0 - share))
        dx_3 += tap_3 * _within(grad, position, 3)
        done = token - 3
        at = dx_ptr + done * dx_stride + channel
        tl.store(at, dx_3.to(dx_ptr.dtype.element_ty), mask=own & (place >= 3) & (done < tokens))
        dx_3 = dx_2 + tap_2 * _within(grad, position, 2)
        dx_2 = dx_1 + tap_1 * _within(grad, position, 1)
        dx_1 = tap_0 * grad
        x_3, x_2, x_1 = x_2, x_1, x_0
