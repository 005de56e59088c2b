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
from falcon_qlora.kernels.frozen_linear import mm_float32
from falcon_qlora.kernels.gelu import gelu_and_slope
from falcon_qlora.kernels.low_rank import LowRank
from falcon_qlora.kernels.low_rank_triton import low_rank_arguments, low_rank_tile, tile, tiles

# Tokens and features of a tile, and warps: two programs or more fit on a multiprocessor.
_FORWARD = 64, 128, 8
_BACKWARD = 64, 64, 4
# The same for programs that go along columns and keep LoRA's products in registers; how many, so that the
# last wave is a small part; and where there are registers for them. On an H200 that gained nothing forward.
_ALONG_COLUMNS = 64, 64, 4
_COLUMN_PROGRAMS = 2304
_LARGEST_RANK, WITH_REGISTERS = 64, (9, 10)  # the GPUs' major capabilities


def gelu(x: Tensor, low: LowRank | None, bound: Tensor, a: Tensor) -> tuple[Rows, Tensor]:
    """`fp8.gelu` in one pass, and a product."""
    tokens, features = x.shape
    values, scales = _empty_rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        left, right, rank = low_rank_arguments(low, x)
        grid, options = tiles(x, _FORWARD)
        _gelu[grid](
            x, y, values, scales, bound, left, right, _longest(low, bound),
            x.stride(0), bound.stride(0), left.stride(0), *right.stride(), left.shape[1], tokens, features,
            **rank, **options,
        )  # fmt: skip
    return Rows(values, scales), y @ a.T


def gelu_backward(
    grad: Tensor, low_grad: LowRank | None, x: Tensor, low: LowRank | None, bound: Tensor
) -> tuple[Rows, Tensor, Tensor | None, Tensor | None]:
    """`fp8.gelu_backward`, also in one pass where it can; sums over tokens are made in a fixed order."""
    tokens, features = x.shape
    if low is None or low_grad is None or not _fits(x, low.left.shape[1], low_grad.left.shape[1]):
        rows, dx, y = _gelu_backward_alone(grad, low_grad, x, low, bound)
        of_a = None if low_grad is None else mm_float32(low_grad.left.T, y)
        return rows, dx, of_a, None if low is None else mm_float32(dx.T, low.left)
    assert grad.is_contiguous()
    values, scales = _empty_rows(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    programs = triton.cdiv(features, _ALONG_COLUMNS[1])
    splits, each = _splits(_COLUMN_PROGRAMS // programs, tokens, _ALONG_COLUMNS[0])
    left, right, rank = low_rank_arguments(low, x)
    of_left, of_right, of_rank = low_rank_arguments(low_grad, x)
    of_a, of_b = (
        torch.empty(splits, each.shape[1], features, dtype=torch.float32, device=x.device)
        for each in (of_left, left)
    )
    _gelu_backward_and_low_rank[programs, splits](
        grad, x, dx, values, scales, bound, left, right, of_left, of_right, _longest(low_grad, bound),
        of_a, of_b, x.stride(0), bound.stride(0), left.stride(0), *right.stride(), left.shape[1],
        of_left.stride(0), *of_right.stride(), of_left.shape[1],
        tokens, features, each, OF_RANK=of_rank["RANK"], **rank, **_along_columns(),
    )  # fmt: skip
    return Rows(values, scales), dx, of_a.sum(0), of_b.sum(0).T.contiguous()


def _fits(x: Tensor, *ranks: int) -> bool:
    """Whether there is something to do, and room for products of these ranks."""
    fits_gpu = not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] in WITH_REGISTERS
    return bool(x.numel()) and max(ranks) <= _LARGEST_RANK and fits_gpu


def _splits(wanted: int, size: int, tile: int) -> tuple[int, int]:
    """How many programs share `size`, and what each has of it, in whole tiles."""
    each = triton.cdiv(triton.cdiv(size, max(wanted, 1)), tile) * tile
    return triton.cdiv(size, each), each


def _along_columns() -> dict[str, int]:
    return dict(zip(("TOKENS", "FEATURES", "num_warps"), _ALONG_COLUMNS, strict=True))


def _gelu_backward_alone(
    grad: Tensor, low_grad: LowRank | None, x: Tensor, low: LowRank | None, bound: Tensor
) -> tuple[Rows, Tensor, Tensor]:
    """The gradient in FP8 and as it is, and GELU's output, over `grad`; each ``[T, F]``."""
    tokens, features = x.shape
    values, scales = _empty_rows(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
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


def _empty_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Empty: a matrix in FP8, and its scales."""
    assert x.stride(1) == 1
    values = torch.empty(x.shape, dtype=DTYPE, device=x.device)
    return values, torch.empty(x.shape[0], dtype=torch.float32, device=x.device)


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


@triton.jit
def _left(ptr, stride, rank, token, in_tokens, RANK: tl.constexpr):
    """Rows ``[TOKENS, RANK]`` of a low rank's left matrix, zeros where it ends."""
    index = tl.arange(0, RANK)
    mask = in_tokens[:, None] & (index < rank)[None, :]
    return tl.load(ptr + token.to(tl.int64)[:, None] * stride + index[None, :], mask=mask, other=0.0)


@triton.jit
def _right(ptr, stride, feature_stride, rank, feature, in_features, RANK: tl.constexpr):
    """Columns ``[RANK, FEATURES]`` of its right matrix, likewise."""
    index = tl.arange(0, RANK)
    mask = (index < rank)[:, None] & in_features[None, :]
    return tl.load(ptr + index[:, None] * stride + feature[None, :] * feature_stride, mask=mask, other=0.0)


@triton.jit
def _lengths(left):
    wide = left.to(tl.float32)
    return tl.sqrt(tl.sum(wide * wide, 1))


@triton.jit(do_not_specialize=["tokens", "each"])  # one compilation for any number
def _gelu_backward_and_low_rank(
    grad_ptr,  # [T, F]
    x_ptr,  # [T, F], rows x_stride apart
    dx_ptr,  # [T, F]
    values_ptr,  # fp8 [T, F], dx again
    scales_ptr,  # float32 [T]
    bound_ptr,  # float32 [T], bound_stride apart
    left_ptr,  # [T, R], rows left_stride apart
    right_ptr,  # [R, F], any strides
    of_left_ptr,  # the same for the gradient
    of_right_ptr,
    longest_ptr,  # float32 [], of of_right's columns
    of_a_ptr,  # float32 [splits, Q, F], of of_left and the output over each split's tokens
    of_b_ptr,  # float32 [splits, R, F], of left and dx
    x_stride,
    bound_stride,
    left_stride,
    right_stride,
    right_feature_stride,
    rank,  # R
    of_left_stride,
    of_right_stride,
    of_right_feature_stride,
    of_rank,  # Q
    tokens,  # T
    features,  # F
    each,  # tokens of a split, a multiple of TOKENS
    RANK: tl.constexpr,  # a power of 2 ≥ R
    OF_RANK: tl.constexpr,  # the same for Q
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    in_features = feature < features
    right = _right(right_ptr, right_stride, right_feature_stride, rank, feature, in_features, RANK)
    of_right = _right(
        of_right_ptr, of_right_stride, of_right_feature_stride, of_rank, feature, in_features, OF_RANK
    )
    longest = tl.load(longest_ptr)
    of_a = tl.zeros([OF_RANK, FEATURES], tl.float32)
    of_b = tl.zeros([RANK, FEATURES], tl.float32)
    first = tl.program_id(1) * each
    last = tl.minimum(first + each, tokens)
    for start in tl.range(first, last, TOKENS, num_stages=1):
        token = start + tl.arange(0, TOKENS)
        in_tokens = token < tokens
        row = token.to(tl.int64)[:, None]
        mask = in_tokens[:, None] & in_features[None, :]
        at = row * features + feature[None, :]
        left = _left(left_ptr, left_stride, rank, token, in_tokens, RANK)
        of_left = _left(of_left_ptr, of_left_stride, of_rank, token, in_tokens, OF_RANK)
        x = tl.load(x_ptr + row * x_stride + feature[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        bound = tl.load(bound_ptr + token * bound_stride, mask=in_tokens, other=0.0)
        bound += _lengths(of_left) * longest
        scale = tl.where(bound > 0, bound * (1.13 / 448.0), 1.0)
        tl.store(scales_ptr + token, scale, mask=in_tokens & (tl.program_id(0) == 0))
        y, slope = gelu_and_slope(x + tl.dot(left, right, input_precision="ieee"))
        dx = (grad + tl.dot(of_left, of_right, input_precision="ieee")) * slope
        values = tl.clamp(dx * (1.0 / scale)[:, None], -448.0, 448.0)
        tl.store(values_ptr + at, values.to(values_ptr.dtype.element_ty), mask=mask)
        narrow = dx.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + at, narrow, mask=mask)
        of_a += tl.dot(tl.trans(of_left), y.to(dx_ptr.dtype.element_ty), input_precision="ieee")
        of_b += tl.dot(tl.trans(left), narrow, input_precision="ieee")
    index = tl.arange(0, OF_RANK)
    at = (tl.program_id(1) * of_rank + index[:, None]).to(tl.int64) * features + feature[None, :]
    tl.store(of_a_ptr + at, of_a, mask=(index < of_rank)[:, None] & in_features[None, :])
    index = tl.arange(0, RANK)
    at = (tl.program_id(1) * rank + index[:, None]).to(tl.int64) * features + feature[None, :]
    tl.store(of_b_ptr + at, of_b, mask=(index < rank)[:, None] & in_features[None, :])
