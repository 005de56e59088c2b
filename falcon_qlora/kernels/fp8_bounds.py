"""What bounds rows beside LoRA's part, and how its columns share their size: a launch or two each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from falcon_qlora.kernels.fp8_rows import LARGEST
from falcon_qlora.kernels.low_rank import LowRank

_FEATURES, _TOKENS, _LANES = 128, 32, 1024  # of a program
_MOST_RANKS = 64  # of LoRA's, that a program has in registers at once
_WARPS = 4


def bound_scales(bound: Tensor, low: LowRank | None, factor: float = 1.0) -> Tensor:
    """`fp8.bound_scales` in one launch, and one more with LoRA."""
    out = torch.empty(len(bound), dtype=torch.float32, device=bound.device)
    left, longest, rank = bound, bound[:1], 0
    if low is not None:
        assert low.left.stride(1) == 1
        left, rank = low.left, low.left.shape[1]
        longest, _ = measured(low.right)
    if len(out):
        _bound_scales[(triton.cdiv(len(out), _TOKENS),)](
            bound, left, longest, out, bound.stride(0), left.stride(0), len(out), rank, len(longest),
            factor / LARGEST, LOW=low is not None, PARTS=triton.next_power_of_2(len(longest)), **_rows(rank),
        )  # fmt: skip
    return out


def balance(into: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    """`fp8_gelu_products.balance` in two launches."""
    _, largest = measured(right)
    out = torch.empty(len(into), dtype=torch.float32, device=into.device)
    _balance[(len(into),)](
        into, largest, scale, out, *into.stride(), into.shape[1], *largest.shape,
        PARTS=triton.next_power_of_2(len(largest)), LANES=_LANES, num_warps=_WARPS,
    )  # fmt: skip
    return out


def least(balance: Tensor, low: LowRank) -> Tensor:
    """`fp8_gelu_products.least` in one launch."""
    (tokens, rank), left = low.left.shape, low.left
    assert left.stride(1) == 1
    out = torch.empty(tokens, dtype=torch.float32, device=left.device)
    if tokens:
        _least[(triton.cdiv(tokens, _TOKENS),)](
            left, balance, out, left.stride(0), tokens, rank, **_rows(rank)
        )
    return out


def _rows(rank: int) -> dict[str, int]:
    return {"TOKENS": _TOKENS, "RANK": piece_of(rank), "num_warps": _WARPS}


def piece_of(rank: int) -> int:
    """Of a rank, what a program takes at once."""
    return min(max(triton.next_power_of_2(rank), 16), _MOST_RANKS)


def measured(right: Tensor) -> tuple[Tensor, Tensor]:
    """Of every `_FEATURES` columns the length of the longest, and each row's largest absolute value.

    Args:
        right: ``[R, F]``, any strides.

    Returns:
        float32 ``[P]`` and ``[P, R]``.
    """
    rank, features = right.shape
    parts = triton.cdiv(features, _FEATURES)
    longest, largest = (torch.empty(shape, device=right.device) for shape in ((parts,), (parts, rank)))
    _measure[(parts,)](
        right, longest, largest, *right.stride(), rank, features,
        RANK=piece_of(rank), FEATURES=_FEATURES, num_warps=_WARPS,
    )  # fmt: skip
    return longest, largest


@triton.jit
def _measure(
    right_ptr,  # [R, F], any strides
    longest_ptr,  # float32 [P]
    largest_ptr,  # float32 [P, R]
    right_stride,
    right_feature_stride,
    rank,  # R
    features,  # F
    RANK: tl.constexpr,  # at once, a power of 2
    FEATURES: tl.constexpr,
):
    part = tl.program_id(0)
    feature = part * FEATURES + tl.arange(0, FEATURES)
    squares = tl.zeros([FEATURES], tl.float32)
    for start in range(0, rank, RANK):
        index = start + tl.arange(0, RANK)
        mask = (index < rank)[:, None] & (feature < features)[None, :]
        at = index[:, None] * right_stride + feature[None, :] * right_feature_stride
        right = tl.load(right_ptr + at, mask=mask, other=0.0).to(tl.float32)
        squares += tl.sum(right * right, 0)
        tl.store(largest_ptr + part * rank + index, tl.max(tl.abs(right), 1), mask=index < rank)
    tl.store(longest_ptr + part, tl.sqrt(tl.max(squares, 0)))


@triton.jit
def _balance(
    into_ptr,  # [R, C], any strides
    largest_ptr,  # float32 [P, R]
    scale_ptr,  # float32 []
    out_ptr,  # float32 [R]
    into_stride,
    into_feature_stride,
    features,  # C
    parts,  # P
    rank,  # R
    PARTS: tl.constexpr,  # a power of 2 ≥ P
    LANES: tl.constexpr,
):
    row = tl.program_id(0)
    part = tl.arange(0, PARTS)
    largest = tl.max(tl.load(largest_ptr + part * rank + row, mask=part < parts, other=0.0), 0)
    squares = tl.zeros([LANES], tl.float32)
    for start in range(0, features, LANES):
        feature = start + tl.arange(0, LANES)
        at = row * into_stride + feature * into_feature_stride
        into = tl.load(into_ptr + at, mask=feature < features, other=0.0).to(tl.float32)
        squares += into * into
    largest = largest / tl.load(scale_ptr) + 1e-20
    of_rows = 112.0 * tl.sqrt(tl.sum(squares, 0)) + 1e-20
    tl.store(out_ptr + row, tl.minimum(tl.sqrt(of_rows / largest), 448.0 / largest))


@triton.jit
def _left(left_ptr, left_stride, token, in_tokens, index, rank):
    """Rows ``[TOKENS, RANK]``, zeros where they end."""
    at = token.to(tl.int64)[:, None] * left_stride + index[None, :]
    return tl.load(left_ptr + at, mask=in_tokens[:, None] & (index < rank)[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens"])  # one compilation for any number
def _least(
    left_ptr,  # [T, R], rows left_stride apart
    balance_ptr,  # float32 [R]
    out_ptr,  # float32 [T]
    left_stride,
    tokens,  # T
    rank,  # R
    TOKENS: tl.constexpr,
    RANK: tl.constexpr,  # at once, a power of 2
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    largest = tl.zeros([TOKENS], tl.float32)
    for start in range(0, rank, RANK):
        index = start + tl.arange(0, RANK)
        left = _left(left_ptr, left_stride, token, token < tokens, index, rank)
        balance = tl.load(balance_ptr + index, mask=index < rank, other=1.0)
        largest = tl.maximum(largest, tl.max(tl.abs(left) / balance[None, :], 1))
    tl.store(out_ptr + token, largest, mask=token < tokens)


@triton.jit(do_not_specialize=["tokens"])  # one compilation for any number
def _bound_scales(
    bound_ptr,  # float32 [T], bound_stride apart
    left_ptr,  # [T, R], rows left_stride apart; used where LOW, as the next
    longest_ptr,  # float32 [P], of right's columns
    out_ptr,  # float32 [T]
    bound_stride,
    left_stride,
    tokens,  # T
    rank,  # R
    parts,  # P
    factor,
    LOW: tl.constexpr,
    PARTS: tl.constexpr,  # a power of 2 ≥ P
    TOKENS: tl.constexpr,
    RANK: tl.constexpr,  # at once, a power of 2
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    in_tokens = token < tokens
    bound = tl.load(bound_ptr + token * bound_stride, mask=in_tokens, other=0.0)
    if LOW:
        squares = tl.zeros([TOKENS], tl.float32)
        for start in range(0, rank, RANK):
            left = _left(left_ptr, left_stride, token, in_tokens, start + tl.arange(0, RANK), rank)
            squares += tl.sum(left * left, 1)
        part = tl.arange(0, PARTS)
        bound += tl.sqrt(squares) * tl.max(tl.load(longest_ptr + part, mask=part < parts, other=0.0), 0)
    tl.store(out_ptr + token, tl.where(bound > 0, bound * factor, 1.0), mask=in_tokens)
