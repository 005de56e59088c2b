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

from falcon_qlora.kernels.fp8_low_rank import gathered
from falcon_qlora.kernels.fp8_rows import DTYPE, Rows, largest_row
from falcon_qlora.kernels.gelu import gelu_and_slope
from falcon_qlora.kernels.low_rank import LowRank
from falcon_qlora.kernels.low_rank_triton import (
    left_tile,
    low_rank_arguments,
    low_rank_tile,
    right_tile,
    splits,
    tile,
    tiles,
)

# Tokens and features of a tile, and warps: two programs or more fit on a multiprocessor.
_FORWARD = 64, 128, 8
_BACKWARD = 64, 64, 8
# The same for programs that go along columns and keep LoRA's products in registers; how many, so that the
# last wave is a small part; and where there are registers for them.
_ALONG_COLUMNS = 64, 64, 4
_COLUMN_PROGRAMS = 2304
_LARGEST_RANK, WITH_REGISTERS = 64, (9, 10)  # the GPUs' major capabilities


def gelu(x: Tensor, low: LowRank | None, bound: Tensor) -> Rows:
    """`fp8.gelu` in one pass."""
    tokens, features = x.shape
    values, scales = _empty_rows(x)
    if x.numel():
        left, right, rank = low_rank_arguments(low, x)
        grid, options = tiles(x, _FORWARD)
        _gelu[grid](
            x, values, scales, bound, left, right, _longest(low, bound),
            x.stride(0), bound.stride(0), left.stride(0), *right.stride(), left.shape[1], tokens, features,
            **rank, **options,
        )  # fmt: skip
    return Rows(values, scales)


def gelu_backward(
    grad: Tensor, low_grad: LowRank | None, grad_bound: Tensor, x: Tensor, low: LowRank | None, bound: Tensor
) -> tuple[Rows, Tensor | None, Tensor | None]:
    """`fp8.gelu_backward`, in one pass where it can; sums over tokens are made in a fixed order."""
    if low is None or low_grad is None or not _fits(x, low.left.shape[1], low_grad.left.shape[1]):
        rows, y = _gelu_backward_alone(grad, low_grad, grad_bound, x, low, bound)
        of_a, of_b = (
            None if part is None else gathered(part.left, other)
            for part, other in ((low_grad, y), (low, rows))
        )
        return rows, of_a, of_b
    tokens, features = x.shape
    assert grad.is_contiguous()
    values, scales = _empty_rows(x)
    programs = triton.cdiv(features, _ALONG_COLUMNS[1])
    parts, each = splits(_COLUMN_PROGRAMS // programs, tokens, _ALONG_COLUMNS[0])
    left, right, rank = low_rank_arguments(low, x)
    of_left, of_right, of_rank = low_rank_arguments(low_grad, x)
    of_a, of_b = (
        torch.empty(parts, one.shape[1], features, dtype=torch.float32, device=x.device)
        for one in (of_left, left)
    )
    _gelu_backward_and_low_rank[programs, parts](
        grad, x, values, scales, grad_bound, left, right, of_left, of_right, _longest(low_grad, bound),
        of_a, of_b, x.stride(0), grad_bound.stride(0), left.stride(0), *right.stride(), left.shape[1],
        of_left.stride(0), *of_right.stride(), of_left.shape[1],
        tokens, features, each, OF_RANK=of_rank["RANK"], **rank, **_along_columns(),
    )  # fmt: skip
    return Rows(values, scales), of_a.sum(0), of_b.sum(0)


def _fits(x: Tensor, *ranks: int) -> bool:
    """Whether there is something to do, and room for products of these ranks."""
    fits_gpu = not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] in WITH_REGISTERS
    return bool(x.numel()) and max(ranks) <= _LARGEST_RANK and fits_gpu


def _along_columns() -> dict[str, int]:
    return dict(zip(("TOKENS", "FEATURES", "num_warps"), _ALONG_COLUMNS, strict=True))


def _gelu_backward_alone(
    grad: Tensor, low_grad: LowRank | None, grad_bound: Tensor, x: Tensor, low: LowRank | None, bound: Tensor
) -> tuple[Rows, Rows]:
    """The input's gradient and the output in FP8, each ``[T, F]``."""
    tokens, features = x.shape
    (values, scales), (of_values, of_scales) = _empty_rows(x), _empty_rows(x)
    assert grad.is_contiguous()
    if x.numel():
        left, right, rank = low_rank_arguments(low, x)
        of_left, of_right, of_rank = low_rank_arguments(low_grad, x)
        grid, options = tiles(x, _BACKWARD)
        _gelu_backward[grid](
            grad, of_values, of_scales, grad_bound, x, values, scales, bound,
            left, right, _longest(low, bound), of_left, of_right, _longest(low_grad, bound),
            grad_bound.stride(0), x.stride(0), bound.stride(0),
            left.stride(0), *right.stride(), left.shape[1],
            of_left.stride(0), *of_right.stride(), of_left.shape[1], tokens, features,
            OF_RANK=of_rank["RANK"], **rank, **options,
        )  # fmt: skip
    return Rows(of_values, of_scales), Rows(values, scales)


def _empty_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Empty: a matrix in FP8, and its scales."""
    assert x.stride(1) == 1
    values = torch.empty(x.shape, dtype=DTYPE, device=x.device)
    return values, torch.empty(x.shape[0], dtype=torch.float32, device=x.device)


def _longest(low: LowRank | None, unused: Tensor) -> Tensor:
    return unused if low is None else largest_row(low.right.T)


@triton.jit
def _store_rows(y, bound, values_ptr, scales_ptr, token, feature, mask, in_tokens, features):
    """Write a tile in FP8, and by the first program of a row its scale, from a bound of each row."""
    scale = tl.where(bound > 0, bound / 448.0, 1.0)
    at = token.to(tl.int64)[:, None] * features + feature[None, :]
    values = tl.clamp(y * (1.0 / scale)[:, None], -448.0, 448.0)
    tl.store(values_ptr + at, values.to(values_ptr.dtype.element_ty), mask=mask)
    first = tl.program_id(0) % tl.cdiv(features, feature.shape[0]) == 0
    tl.store(scales_ptr + token, scale, mask=in_tokens & first)


@triton.jit(do_not_specialize=["tokens"])  # one compilation for any number
def _gelu(
    x_ptr,  # [T, F], rows x_stride apart
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
    y, _ = gelu_and_slope(x)
    _store_rows(y, bound, values_ptr, scales_ptr, token, feature, mask, in_tokens, features)


@triton.jit(do_not_specialize=["tokens"])  # one compilation for any number
def _gelu_backward(
    grad_ptr,  # [T, F]
    of_values_ptr,  # fp8 [T, F], of the input's gradient
    of_scales_ptr,  # float32 [T]
    grad_bound_ptr,  # float32 [T], grad_bound_stride apart
    x_ptr,  # [T, F], rows x_stride apart
    values_ptr,  # fp8 [T, F], of the output
    scales_ptr,  # float32 [T]
    bound_ptr,  # float32 [T], bound_stride apart
    left_ptr,  # [T, R], rows left_stride apart; used where RANK, as the next two
    right_ptr,  # [R, F], any strides
    longest_ptr,  # float32 [], of right's columns
    of_left_ptr,  # the same for the gradient; used where OF_RANK
    of_right_ptr,
    of_longest_ptr,
    grad_bound_stride,
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
    x = tl.load(x_ptr + row * x_stride + feature[None, :], mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * features + feature[None, :], mask=mask, other=0.0).to(tl.float32)
    bound = tl.load(bound_ptr + token * bound_stride, mask=in_tokens, other=0.0)
    grad_bound = tl.load(grad_bound_ptr + token * grad_bound_stride, mask=in_tokens, other=0.0)
    if RANK:
        factors = left_ptr, right_ptr, left_stride, right_stride, right_feature_stride, rank
        low, length = low_rank_tile(factors, token, in_tokens, feature, in_features, RANK)
        x += low
        bound += length * tl.load(longest_ptr)
    if OF_RANK:
        factors = of_left_ptr, of_right_ptr, of_left_stride, of_right_stride, of_right_feature_stride, of_rank
        low, length = low_rank_tile(factors, token, in_tokens, feature, in_features, OF_RANK)
        grad += low
        grad_bound += length * tl.load(of_longest_ptr)
    y, slope = gelu_and_slope(x)
    _store_rows(y, bound, values_ptr, scales_ptr, token, feature, mask, in_tokens, features)
    dx, bound = grad * slope, 1.13 * grad_bound
    _store_rows(dx, bound, of_values_ptr, of_scales_ptr, token, feature, mask, in_tokens, features)


@triton.jit
def _lengths(left):
    wide = left.to(tl.float32)
    return tl.sqrt(tl.sum(wide * wide, 1))


@triton.jit(do_not_specialize=["tokens", "each"])  # one compilation for any number
def _gelu_backward_and_low_rank(
    grad_ptr,  # [T, F]
    x_ptr,  # [T, F], rows x_stride apart
    values_ptr,  # fp8 [T, F], of the input's gradient
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
    low = left_ptr, right_ptr, left_stride, right_stride, right_feature_stride, rank
    of_low = of_left_ptr, of_right_ptr, of_left_stride, of_right_stride, of_right_feature_stride, of_rank
    right = right_tile(low, feature, in_features, RANK)
    of_right = right_tile(of_low, feature, in_features, OF_RANK)
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
        left = left_tile(low, token, in_tokens, RANK)
        of_left = left_tile(of_low, token, in_tokens, OF_RANK)
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
        of_a += tl.dot(tl.trans(of_left), y.to(of_left.dtype), input_precision="ieee")
        of_b += tl.dot(tl.trans(left), dx.to(left.dtype), input_precision="ieee")
    index = tl.arange(0, OF_RANK)
    at = (tl.program_id(1) * of_rank + index[:, None]).to(tl.int64) * features + feature[None, :]
    tl.store(of_a_ptr + at, of_a, mask=(index < of_rank)[:, None] & in_features[None, :])
    index = tl.arange(0, RANK)
    at = (tl.program_id(1) * rank + index[:, None]).to(tl.int64) * features + feature[None, :]
    tl.store(of_b_ptr + at, of_b, mask=(index < rank)[:, None] & in_features[None, :])
