"""LoRA's products with matrices in FP8, which they read once for every 64 ranks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from falcon_qlora.kernels.fp8_bounds import measured, piece_of
from falcon_qlora.kernels.fp8_quantize import halves
from falcon_qlora.kernels.fp8_rows import DTYPE, Rows
from falcon_qlora.kernels.low_rank_triton import splits

# Tokens and features of a tile, warps and stages; how many programs share the tokens of a sum over them.
_INTO = 128, 128, 8, 3
_SUM = 64, 128, 4, 3
_SUM_PROGRAMS = 1152
_SPLIT_FEATURES = 64


def into_low_rank(a: Tensor, rows: Rows) -> Tensor:
    """`fp8.into_low_rank`, with each value of `a` as the sum of two in FP8."""
    (tokens, features), rank = rows.values.shape, len(a)
    out = torch.empty(tokens, rank, dtype=a.dtype, device=a.device)
    if out.numel():
        _, largest = measured(a)
        both = torch.empty(2, rank, features, dtype=DTYPE, device=a.device)
        scales = torch.empty(rank, dtype=torch.float32, device=a.device)
        piece, lanes = piece_of(rank), triton.next_power_of_2(len(largest))
        _split_rows[(triton.cdiv(features, _SPLIT_FEATURES), triton.cdiv(rank, piece))](
            a, largest, both, scales, *a.stride(), features, rank, len(largest),
            PARTS=lanes, RANK=piece, FEATURES=_SPLIT_FEATURES, num_warps=4 if lanes <= 256 else 8,
        )  # fmt: skip
        grid = triton.cdiv(tokens, _INTO[0]), triton.cdiv(rank, piece)
        _into_low_rank[grid](
            *rows, both, scales, out, rows.values.stride(0), tokens, features, rank,
            RANK=piece, **_options(_INTO),
        )  # fmt: skip
    return out


def gathered(low: Tensor, rows: Rows) -> Tensor:
    """`fp8.gathered`; sums over tokens are made in a fixed order."""
    (tokens, features), rank = rows.values.shape, low.shape[1]
    assert low.stride(1) == 1
    programs, piece = triton.cdiv(features, _SUM[1]), piece_of(rank)
    pieces = triton.cdiv(rank, piece)
    parts, each = splits(_SUM_PROGRAMS // (programs * max(pieces, 1)), tokens, _SUM[0])
    out = torch.empty(parts, rank, features, dtype=torch.float32, device=low.device)
    if out.numel():
        _gathered[programs, parts, pieces](
            *rows, low, out, rows.values.stride(0), low.stride(0), tokens, features, rank, each,
            RANK=piece, **_options(_SUM),
        )  # fmt: skip
    return out.sum(0)


def _options(tile: tuple[int, int, int, int]) -> dict[str, int]:
    return dict(zip(("TOKENS", "FEATURES", "num_warps", "STAGES"), tile, strict=True))


@triton.jit
def _split_rows(
    a_ptr,  # [R, F], any strides
    largest_ptr,  # float32 [P, R], of each row's absolute values
    halves_ptr,  # fp8 [2, R, F]: the nearest values, and what they leave
    scales_ptr,  # float32 [R]
    a_stride,
    a_feature_stride,
    features,  # F
    rank,  # R
    parts,  # P
    PARTS: tl.constexpr,  # a power of 2 ≥ P
    RANK: tl.constexpr,  # of a program, a power of 2
    FEATURES: tl.constexpr,
):
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    index = tl.program_id(1) * RANK + tl.arange(0, RANK)
    in_rank = index < rank
    part = tl.arange(0, PARTS)
    mask = (part < parts)[:, None] & in_rank[None, :]
    most = tl.max(tl.load(largest_ptr + part[:, None] * rank + index[None, :], mask=mask, other=0.0), 0)
    scale = tl.where(most > 0, most / 448.0, 1.0)
    tl.store(scales_ptr + index, scale, mask=in_rank & (tl.program_id(0) == 0))
    mask = in_rank[:, None] & (feature < features)[None, :]
    at = index[:, None] * a_stride + feature[None, :] * a_feature_stride
    a = tl.load(a_ptr + at, mask=mask, other=0.0).to(tl.float32) / scale[:, None]
    high, low = halves(a, halves_ptr.dtype.element_ty)
    at = index.to(tl.int64)[:, None] * features + feature[None, :]
    tl.store(halves_ptr + at, high, mask=mask)
    at = (index + rank).to(tl.int64)[:, None] * features + feature[None, :]
    tl.store(halves_ptr + at, low, mask=mask)


@triton.jit(do_not_specialize=["tokens"])  # one compilation for any number
def _into_low_rank(
    values_ptr,  # fp8 [T, F], rows values_stride apart
    scales_ptr,  # float32 [T]
    halves_ptr,  # fp8 [2, R, F], as `_split_rows` writes them
    of_rank_ptr,  # float32 [R], their scales
    out_ptr,  # [T, R]
    values_stride,
    tokens,  # T
    features,  # F
    rank,  # R
    RANK: tl.constexpr,  # of a program, a power of 2
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    STAGES: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    index = tl.program_id(1) * RANK + tl.arange(0, RANK)
    in_tokens, in_rank = token < tokens, index < rank
    row = values_ptr + token.to(tl.int64)[:, None] * values_stride
    high_ptr = halves_ptr + index.to(tl.int64)[None, :] * features
    low_ptr = halves_ptr + (index + rank).to(tl.int64)[None, :] * features
    found = tl.zeros([TOKENS, RANK], tl.float32)
    for start in tl.range(0, features, FEATURES, num_stages=STAGES):
        feature = start + tl.arange(0, FEATURES)
        in_features = feature < features
        values = tl.load(row + feature[None, :], mask=in_tokens[:, None] & in_features[None, :], other=0.0)
        mask = in_features[:, None] & in_rank[None, :]
        high = tl.load(high_ptr + feature[:, None], mask=mask, other=0.0)
        low = tl.load(low_ptr + feature[:, None], mask=mask, other=0.0)
        found = tl.dot(values, high, found, max_num_imprecise_acc=FEATURES)
        found = tl.dot(values, low, found, max_num_imprecise_acc=FEATURES)
    scale = tl.load(scales_ptr + token, mask=in_tokens, other=0.0)[:, None]
    scale *= tl.load(of_rank_ptr + index, mask=in_rank, other=0.0)[None, :]
    at = token.to(tl.int64)[:, None] * rank + index[None, :]
    narrow = (found * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, narrow, mask=in_tokens[:, None] & in_rank[None, :])


@triton.jit(do_not_specialize=["tokens", "each"])  # one compilation for any number
def _gathered(
    values_ptr,  # fp8 [T, F], rows values_stride apart
    scales_ptr,  # float32 [T]
    low_ptr,  # [T, R], rows low_stride apart
    sums_ptr,  # float32 [parts, R, F]
    values_stride,
    low_stride,
    tokens,  # T
    features,  # F
    rank,  # R
    each,  # tokens of a part, a multiple of TOKENS
    RANK: tl.constexpr,  # of a program, a power of 2
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    STAGES: tl.constexpr,
):
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    index = tl.program_id(2) * RANK + tl.arange(0, RANK)
    in_features, in_rank = feature < features, index < rank
    found = tl.zeros([RANK, FEATURES], tl.float32)
    first = tl.program_id(1) * each
    for start in tl.range(first, tl.minimum(first + each, tokens), TOKENS, num_stages=STAGES):
        token = start + tl.arange(0, TOKENS)
        in_tokens = token < tokens
        row = token.to(tl.int64)
        at = row[None, :] * low_stride + index[:, None]
        low = tl.load(low_ptr + at, mask=in_rank[:, None] & in_tokens[None, :], other=0.0)
        scale = tl.load(scales_ptr + token, mask=in_tokens, other=0.0)
        at = row[:, None] * values_stride + feature[None, :]
        values = tl.load(values_ptr + at, mask=in_tokens[:, None] & in_features[None, :], other=0.0)
        left = (low.to(tl.float32) * scale[None, :]).to(low.dtype)
        found += tl.dot(left, values.to(low.dtype), input_precision="ieee")
    at = (tl.program_id(1) * rank + index[:, None]).to(tl.int64) * features + feature[None, :]
    tl.store(sums_ptr + at, found, mask=in_rank[:, None] & in_features[None, :])
