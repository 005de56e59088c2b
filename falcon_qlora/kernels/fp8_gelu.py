"""GELU between FP8 products, which also adds LoRA's part to its input and to its output's gradient.

The tensors here are a block's largest, and adding LoRA's part to one in a separate pass takes a quarter of
its product's time. So the product's output is stored without it, and its reader adds it: a small product per
tile. Rows are quantized by bounds, as a program sees only a part of a row. LoRA's part is bounded by the
length of a row of `left` times that of the longest column of `right`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from falcon_qlora.kernels.fp8_rows import DTYPE, Rows, largest_row
from falcon_qlora.kernels.gelu import gelu_and_slope
from falcon_qlora.kernels.low_rank import LowRank
from falcon_qlora.kernels.low_rank_triton import low_rank_arguments, low_rank_tile, tile, tiles

# Tokens and features of a tile, and warps: two programs or more fit on a multiprocessor.
_FORWARD = 64, 128, 8
_BACKWARD = 64, 64, 4


def gelu(x: Tensor, low: LowRank | None, bound: Tensor) -> tuple[Rows, Tensor]:
    """`fp8.gelu` in one pass."""
    tokens, features = x.shape
    values, scales, y = _empty(x)
    if x.numel():
        left, right, rank = low_rank_arguments(low, x)
        grid, options = tiles(x, _FORWARD)
        _gelu[grid](
            x, y, values, scales, bound, left, right, _longest(low, bound),
            x.stride(0), bound.stride(0), left.stride(0), *right.stride(), left.shape[1], tokens, features,
            **rank, **options,
        )  # fmt: skip
    return Rows(values, scales), y


def gelu_backward(
    grad: Tensor, low_grad: LowRank | None, x: Tensor, low: LowRank | None, bound: Tensor
) -> tuple[Rows, Tensor, Tensor]:
    """`fp8.gelu_backward` in one pass; the output overwrites `grad`."""
    tokens, features = x.shape
    values, scales, dx = _empty(x)
    assert grad.is_contiguous()
    if x.numel():
        left, right, rank = low_rank_arguments(low, x)
        of_left, of_right, of_rank = low_rank_arguments(low_grad, x)
        grid, options = tiles(x, _BACKWARD)
        _gelu_backward[grid](
            grad, x, dx, values, scales, bound, left, right, of_left, of_right, _longest(low_grad, bound),
            x.stride(0), bound.stride(0), left.stride(0), *right.stride(), left.shape[1],
            of_left.stride(0), *of_right.stride(), of_left.shape[1], tokens, features,
            OF_RANK=of_rank["RANK"], **rank, **options,
        )  # fmt: skip
    return Rows(values, scales), dx, grad


def _empty(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Empty: a matrix in FP8, its scales, and a matrix in `x`'s dtype."""
    assert x.stride(1) == 1
    values = torch.empty(x.shape, dtype=DTYPE, device=x.device)
    scales = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    return values, scales, torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _longest(low: LowRank | None, unused: Tensor) -> Tensor:
    return unused if low is None else largest_row(low.right.T)


@triton.jit(do_not_specialize=["tokens"])  # one compilation for any number
def _gelu(
    x_ptr,  # [T, F], rows x_stride apart
    y_ptr,  # [T, F]
    values_ptr,  # fp8 [T, F]
    scales_ptr,  # float32 [T]
    bound_ptr,  # float32 [T], bound_stride apart
    left_ptr,  # [T, R], rows left_stride apart; used where RANK, as the next two
    right_ptr,  # [R, F], any strides
    longest_ptr,  # float32 [], of right's columns
    x_stride,
    bound_stride,
    left_stride,
    right_stride,
    right_feature_stride,
    rank,  # R
    tokens,  # T
    features,  # F
    RANK: tl.constexpr,  # a power of 2 ≥ R, or 0
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    token, feature, in_tokens, in_features = tile(tokens, features, TOKENS, FEATURES)
    mask = in_tokens[:, None] & in_features[None, :]
    row = token.to(tl.int64)[:, None]
    x = tl.load(x_ptr + row * x_stride + feature[None, :], mask=mask, other=0.0).to(tl.float32)
    bound = tl.load(bound_ptr + token * bound_stride, mask=in_tokens, other=0.0)
    if RANK:
        factors = left_ptr, right_ptr, left_stride, right_stride, right_feature_stride, rank
        low, length = low_rank_tile(factors, token, in_tokens, feature, in_features, RANK)
        x += low
        bound += length * tl.load(longest_ptr)
    scale = tl.where(bound > 0, bound / 448.0, 1.0)
    tl.store(
        scales_ptr + token, scale, mask=in_tokens & (tl.program_id(0) % tl.cdiv(features, FEATURES) == 0)
    )
    y, _ = gelu_and_slope(x)
    at = row * features + feature[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
    values = tl.clamp(y * (1.0 / scale)[:, None], -448.0, 448.0)
    tl.store(values_ptr + at, values.to(values_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])  # one compilation for any number
def _gelu_backward(
    grad_ptr,  # [T, F]; overwritten by GELU's output
    x_ptr,  # [T, F], rows x_stride apart
    dx_ptr,  # [T, F]
    values_ptr,  # fp8 [T, F], dx again
    scales_ptr,  # float32 [T]
    bound_ptr,  # float32 [T], bound_stride apart
    left_ptr,  # [T, R], rows left_stride apart; used where RANK, as the next
    right_ptr,  # [R, F], any strides
    of_left_ptr,  # the same for the gradient; used where OF_RANK, as the next two
    of_right_ptr,
    longest_ptr,  # float32 [], of of_right's columns
    x_stride,
    bound_stride,
    left_stride,
    right_stride,
    right_feature_stride,
    rank,  # R
    of_left_stride,
    of_right_stride,
    of_right_feature_stride,
    of_rank,
    tokens,  # T
    features,  # F
    RANK: tl.constexpr,  # a power of 2 ≥ R, or 0
    OF_RANK: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    token, feature, in_tokens, in_features = tile(tokens, features, TOKENS, FEATURES)
    mask = in_tokens[:, None] & in_features[None, :]
    row = token.to(tl.int64)[:, None]
    at = row * features + feature[None, :]
    x = tl.load(x_ptr + row * x_stride + feature[None, :], mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    bound = tl.load(bound_ptr + token * bound_stride, mask=in_tokens, other=0.0)
    if RANK:
        factors = left_ptr, right_ptr, left_stride, right_stride, right_feature_stride, rank
        low, _ = low_rank_tile(factors, token, in_tokens, feature, in_features, RANK)
        x += low
    if OF_RANK:
        factors = of_left_ptr, of_right_ptr, of_left_stride, of_right_stride, of_right_feature_stride, of_rank
        low, length = low_rank_tile(factors, token, in_tokens, feature, in_features, OF_RANK)
        grad += low
        bound += length * tl.load(longest_ptr)
    scale = tl.where(bound > 0, bound * (1.13 / 448.0), 1.0)
    tl.store(
        scales_ptr + token, scale, mask=in_tokens & (tl.program_id(0) % tl.cdiv(features, FEATURES) == 0)
    )
    y, slope = gelu_and_slope(x)
    tl.store(grad_ptr + at, y.to(grad_ptr.dtype.element_ty), mask=mask)
    dx = grad * slope
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    values = tl.clamp(dx * (1.0 / scale)[:, None], -448.0, 448.0)
    tl.store(values_ptr + at, values.to(values_ptr.dtype.element_ty), mask=mask)
