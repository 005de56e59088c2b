"""Triton's forms of `dropout`'s operations, each in one pass over its matrix."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from falcon_qlora.kernels.low_rank import NO_DROPOUT, Dropout, LowRank
from falcon_qlora.kernels.low_rank_triton import low_rank_arguments, low_rank_tile, tile, tiles

_BLOCK, _BLOCK_WARPS = 2048, 4
_TILE = 64, 128, 8  # tokens and features, and warps


def dropped(x: Tensor, dropout: Dropout) -> Tensor:
    """See `dropout.dropped`."""
    tokens, features = x.shape
    out = torch.empty(tokens, features, dtype=x.dtype, device=x.device)
    assert x.stride(1) == 1
    if x.numel():
        grid = (tokens, triton.cdiv(features, _BLOCK))
        _drop[grid](
            x, out, x.stride(0), features, *_hashed(dropout), BLOCK=_BLOCK, num_warps=_BLOCK_WARPS
        )  # fmt: skip
    return out


def add_dropped(x: Tensor, left: Tensor, right: Tensor, dropout: Dropout | None) -> Tensor:
    """See `dropout.add_dropped`."""
    tokens, features = x.shape
    assert x.stride(1) == 1
    if x.numel():
        left, right, options = low_rank_arguments(LowRank(left, right), x)
        grid, how = tiles(x, _TILE)
        _add_dropped[grid](
            x, left, right, x.stride(0), left.stride(0), *right.stride(), left.shape[1], tokens, features,
            *_hashed(dropout or NO_DROPOUT), **how, **options,
        )  # fmt: skip
    return x


def _hashed(dropout: Dropout) -> tuple[int, int, int, float]:
    # Shifted so that the threshold fits into a signed 32-bit integer.
    return dropout.low, dropout.high, dropout.threshold - 2**31, 1.0 / (1.0 - dropout.p)


@triton.jit
def _mixed(h):
    """MurmurHash3's finalizer of uint32."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _kept(place, low, high, threshold):
    """Whether the values at these indices, uint32, are kept."""
    h = _mixed(_mixed(place ^ low.to(tl.uint32)) ^ high.to(tl.uint32))
    # The hash is shifted by 2^31 as the threshold is, see `_hashed`.
    return (h ^ 0x80000000).to(tl.int32, bitcast=True) >= threshold


@triton.jit(do_not_specialize=["low", "high", "threshold"])  # they differ from call to call
def _drop(
    x_ptr,  # [T, C], rows x_stride apart
    out_ptr,  # [T, C]
    x_stride,
    features,  # C
    low,
    high,
    threshold,
    factor,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < features
    at = row * features + column
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(_kept(at.to(tl.uint32), low, high, threshold), x * factor, 0.0)
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "low", "high", "threshold"])
def _add_dropped(
    x_ptr,  # [T, C], rows x_stride apart
    left_ptr,  # [T, R], rows left_stride apart
    right_ptr,  # [R, C], any strides
    x_stride,
    left_stride,
    right_stride,
    right_feature_stride,
    rank,  # R
    tokens,  # T
    features,  # C
    low,
    high,
    threshold,
    factor,
    RANK: tl.constexpr,  # a power of 2 ≥ R
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    token, feature, in_tokens, in_features = tile(tokens, features, TOKENS, FEATURES)
    mask = in_tokens[:, None] & in_features[None, :]
    row = token.to(tl.int64)[:, None]
    factors = left_ptr, right_ptr, left_stride, right_stride, right_feature_stride, rank
    added, _ = low_rank_tile(factors, token, in_tokens, feature, in_features, RANK)
    kept = _kept((row * features + feature[None, :]).to(tl.uint32), low, high, threshold)
    x_ptr += row * x_stride + feature[None, :]
    x = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    x += tl.where(kept, added * factor, 0.0)
    tl.store(x_ptr, x.to(x_ptr.dtype.element_ty), mask=mask)
