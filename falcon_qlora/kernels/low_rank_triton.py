"""LoRA's part of a matrix, one tile at a time, for kernels that read or write that matrix anyway."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from falcon_qlora.kernels.low_rank import LowRank

# Lanes for LoRA's rank that are loaded together. Whole tiles of a larger rank do not fit into the shared
# memory of most GPUs, so they are loaded in pieces.
WHOLE, _PIECE = tl.constexpr(128), tl.constexpr(64)


def low_rank_arguments(low: LowRank | None, like: Tensor) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Both matrices as kernels take them, and the lanes for their rank; placeholders and 0 without LoRA."""
    if low is None:
        return like, like, {"RANK": 0}
    assert low.left.stride(1) == 1
    return *low, {"RANK": max(triton.next_power_of_2(low.left.shape[1]), 16)}


def tiles(x: Tensor, tile: tuple[int, int, int]) -> tuple[tuple[int], dict[str, int]]:
    """The grid and options of a launch over a matrix; `tile` is a program's tokens, features and warps."""
    tokens, features, warps = tile
    count = triton.cdiv(x.shape[0], tokens) * triton.cdiv(x.shape[1], features)
    return (count,), {"TOKENS": tokens, "FEATURES": features, "num_warps": warps}


def splits(wanted: int, size: int, tile: int) -> tuple[int, int]:
    """How many programs share `size`, and what each has of it, in whole tiles."""
    each = triton.cdiv(triton.cdiv(size, max(wanted, 1)), tile) * tile
    return triton.cdiv(size, max(each, 1)), each


@triton.jit
def tile(tokens, features, TOKENS: tl.constexpr, FEATURES: tl.constexpr):
    """This program's part of ``[tokens, features]``: its rows, its columns, and which of them exist."""
    blocks = tl.cdiv(features, FEATURES)
    token = (tl.program_id(0) // blocks) * TOKENS + tl.arange(0, TOKENS)
    feature = (tl.program_id(0) % blocks) * FEATURES + tl.arange(0, FEATURES)
    return token, feature, token < tokens, feature < features


@triton.jit
def low_rank_tile(low, token, in_tokens, feature, in_features, RANK: tl.constexpr):
    """``left @ right`` of a tile in float32, and the length of each of its rows in `left`.

    `low` is both pointers, the strides of `left`'s rows, of `right`'s rows and of its columns, and the rank.
    """
    if RANK <= WHOLE:
        product, squares = _columns(low, token, in_tokens, feature, in_features, 0, RANK)
    else:
        product, squares = _columns(low, token, in_tokens, feature, in_features, 0, _PIECE)
        for start in tl.range(_PIECE, RANK, _PIECE, num_stages=1):
            more, more_squares = _columns(low, token, in_tokens, feature, in_features, start, _PIECE)
            product += more
            squares += more_squares
    return product, tl.sqrt(squares)


@triton.jit
def _columns(low, token, in_tokens, feature, in_features, start, COLUMNS: tl.constexpr):
    """The product of some columns of `left` and rows of `right`, and the sums of those columns' squares."""
    left_ptr, right_ptr, left_stride, right_stride, right_feature_stride, rank = low
    index = start + tl.arange(0, COLUMNS)
    mask = in_tokens[:, None] & (index < rank)[None, :]
    left = tl.load(
        left_ptr + token.to(tl.int64)[:, None] * left_stride + index[None, :], mask=mask, other=0.0
    )
    mask = (index < rank)[:, None] & in_features[None, :]
    at = index[:, None] * right_stride + feature[None, :] * right_feature_stride
    right = tl.load(right_ptr + at, mask=mask, other=0.0)
    wide = left.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee"), tl.sum(wide * wide, 1)


@triton.jit
def left_tile(low, token, in_tokens, RANK: tl.constexpr):
    """Rows ``[TOKENS, RANK]`` of `left`, zeros where it ends."""
    left_ptr, _, stride, _, _, rank = low
    index = tl.arange(0, RANK)
    mask = in_tokens[:, None] & (index < rank)[None, :]
    return tl.load(left_ptr + token.to(tl.int64)[:, None] * stride + index[None, :], mask=mask, other=0.0)


@triton.jit
def right_tile(low, feature, in_features, RANK: tl.constexpr):
    """Columns ``[RANK, FEATURES]`` of `right`, likewise."""
    _, right_ptr, _, stride, feature_stride, rank = low
    index = tl.arange(0, RANK)
    mask = (index < rank)[:, None] & in_features[None, :]
    return tl.load(
        right_ptr + index[:, None] * stride + feature[None, :] * feature_stride, mask=mask, other=0.0
    )
