"""Quantizes rows and frozen weights to FP8, and sums with LoRA's part, in one launch each."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from falcon_qlora.kernels import nf4, ops
from falcon_qlora.kernels.fp8_rows import DTYPE, Rows
from falcon_qlora.kernels.low_rank import LowRank
from falcon_qlora.kernels.low_rank_triton import (
    WHOLE,
    left_tile,
    low_rank_arguments,
    low_rank_tile,
    right_tile,
    splits,
)
from falcon_qlora.kernels.rows import contiguous_rows

_LANES_A_THREAD = 32
_MOST_WARPS = 16
_LONGEST, _PIECE = 32_768, 8192  # longer rows are read twice, in pieces
_TILE, _TILE_WARPS = 64, 4  # of a weight: 64 × 64
_SUM = 64, 64, 4, 1  # tokens and features of a tile, warps and stages
_SUM_PROGRAMS = 1584  # that go along columns
_SPLIT_ROWS = 32


def quantize_rows(x: Tensor, out: Tensor | None = None, least: Tensor | None = None) -> tuple[Rows, Tensor]:
    """`fp8.quantize_rows` in one launch."""
    x = contiguous_rows(x)
    tokens, features = x.shape
    values = torch.empty(tokens, features, dtype=DTYPE, device=x.device) if out is None else out
    assert values.shape == x.shape
    assert values.stride(1) == 1
    scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
    lengths = torch.empty_like(scales)
    if tokens:
        _quantize_rows[(tokens,)](
            x, values, scales, lengths, scales if least is None else least, x.stride(0), values.stride(0),
            features, LEAST=least is not None, **_row_options(features),
        )  # fmt: skip
    return Rows(values, scales), lengths


def quantize_weight(layer: Any, scale: Tensor, out: Tensor, transpose: bool) -> Tensor:
    """`fp8.quantize_weight` in one pass, from NF4, int8 or floating point."""
    weight = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is not None and nf4.can_dequantize_nf4(state):
        return nf4.dequantize_nf4(weight.data, state, out, transpose=transpose, scale=scale)
    plain, factors = weight.data, scale
    if weight.dtype == torch.int8:
        factors = ops.int8_scales(layer).float()
    elif state is not None:
        from bitsandbytes.functional import dequantize_4bit

        plain = dequantize_4bit(weight.data, state)
    rows, columns = plain.shape
    grid = (triton.cdiv(columns, _TILE), triton.cdiv(rows, _TILE))
    _quantize_weight[grid](
        plain, factors, scale, out, plain.stride(0), out.stride(0), rows, columns,
        INT8=weight.dtype == torch.int8, TRANSPOSE=transpose, TILE=_TILE, num_warps=_TILE_WARPS,
    )  # fmt: skip
    return out


def split_columns(matrix: Tensor, scales: Tensor, balance: Tensor, out: Tensor, of_weight: bool) -> None:
    """`fp8.split_columns` in one launch."""
    (rows, rank), columns = matrix.shape, out.shape[1]
    assert out.stride(1) == 1
    if rows and columns:
        _split_columns[(triton.cdiv(rows, _SPLIT_ROWS),)](
            matrix, scales, balance, out, *matrix.stride(), scales.stride(0), out.stride(0), rows, rank,
            columns, OF_WEIGHT=of_weight, ROWS=_SPLIT_ROWS, RANK=triton.next_power_of_2(rank), num_warps=4,
        )  # fmt: skip


def add(x: Tensor, low: LowRank | None, addends: tuple[Tensor, ...] = ()) -> Tensor:
    """`fp8.add` in one pass."""
    tokens, features = x.shape
    if not tokens or (low is None and not addends):
        return x
    first, second = (*addends, x, x)[:2]
    assert all(matrix.stride(1) == 1 and matrix.shape == x.shape for matrix in (x, first, second))
    left, right, options = low_rank_arguments(low, x)
    programs = triton.cdiv(features, _SUM[1])
    parts, each = splits(_SUM_PROGRAMS // programs, tokens, _SUM[0])
    _add[programs, parts](
        x, first, second, left, right, x.stride(0), first.stride(0), second.stride(0),
        left.stride(0), *right.stride(), left.shape[1], tokens, features, each,
        ADDENDS=len(addends), **sum_options(), **options,
    )  # fmt: skip
    return x


def sum_options() -> dict[str, int]:
    """How a program of `add` works."""
    return dict(zip(("TOKENS", "FEATURES", "num_warps", "STAGES"), _SUM, strict=True))


def _row_options(features: int) -> dict[str, int]:
    lanes = triton.next_power_of_2(features) if features <= _LONGEST else _PIECE
    warps = min(max(lanes // (32 * _LANES_A_THREAD), 1), _MOST_WARPS)
    return {"LANES": lanes, "WHOLE": features <= lanes, "num_warps": warps}


@triton.jit
def row_scale(largest):
    """The scale of a row from absolute values of which one is its largest; 1 for a row of zeros."""
    most = tl.max(largest, 0)
    return tl.where(most > 0, most / 448.0, 1.0)


@triton.jit
def _quantize_rows(
    x_ptr,  # [T, C], rows x_stride apart
    values_ptr,  # fp8 [T, C], rows values_stride apart
    scales_ptr,  # float32 [T]
    lengths_ptr,  # float32 [T]
    least_ptr,  # float32 [T]; used where LEAST
    x_stride,
    values_stride,
    features,  # C
    LANES: tl.constexpr,
    WHOLE: tl.constexpr,  # whether C ≤ LANES
    LEAST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, LANES)
    x_ptr += row * x_stride
    values_ptr += row * values_stride
    x = tl.load(x_ptr + column, mask=column < features, other=0.0).to(tl.float32)
    largest, square = tl.abs(x), x * x
    if not WHOLE:
        for start in range(LANES, features, LANES):
            more = tl.load(x_ptr + start + column, mask=start + column < features, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(more))
            square += more * more
    if LEAST:
        largest = tl.maximum(largest, tl.load(least_ptr + row))
    scale = row_scale(largest)
    tl.store(scales_ptr + row, scale)
    tl.store(lengths_ptr + row, tl.sqrt(tl.sum(square, 0)))
    values = (x * (1.0 / scale)).to(values_ptr.dtype.element_ty)
    tl.store(values_ptr + column, values, mask=column < features)
    if not WHOLE:
        for start in range(LANES, features, LANES):
            more = tl.load(x_ptr + start + column, mask=start + column < features, other=0.0).to(tl.float32)
            values = (more * (1.0 / scale)).to(values_ptr.dtype.element_ty)
            tl.store(values_ptr + start + column, values, mask=start + column < features)


@triton.jit
def _quantize_weight(
    weight_ptr,  # int8 or floating point [O, I], rows weight_stride apart
    factors_ptr,  # float32 [O], 127 times the rows' scales; used where INT8
    scale_ptr,  # float32 []
    out_ptr,  # fp8 [O, I] or [I, O], rows out_stride apart
    weight_stride,
    out_stride,
    rows,  # O
    columns,  # I
    INT8: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * weight_stride + column[None, :]
    weight = tl.load(weight_ptr + at, mask=mask, other=0).to(tl.float32)
    factor = 1.0 / tl.load(scale_ptr)
    if INT8:
        weight *= (tl.load(factors_ptr + row, mask=row < rows, other=0.0) * (factor / 127.0))[:, None]
    else:
        weight *= factor
    weight = tl.clamp(weight, -448.0, 448.0).to(out_ptr.dtype.element_ty)
    if TRANSPOSE:
        weight = tl.trans(weight)
        at = column.to(tl.int64)[:, None] * out_stride + row[None, :]
        mask = (column < columns)[:, None] & (row < rows)[None, :]
    else:
        at = row.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(out_ptr + at, weight, mask=mask)


@triton.jit(do_not_specialize=["tokens", "each"])  # one compilation for any number
def _add(
    x_ptr,  # [T, C], rows x_stride apart
    first_ptr,  # [T, C], rows first_stride apart; used where ADDENDS > 0
    second_ptr,  # [T, C], rows second_stride apart; used where ADDENDS > 1
    left_ptr,  # [T, R], rows left_stride apart; used where RANK, as the next
    right_ptr,  # [R, C], any strides
    x_stride,
    first_stride,
    second_stride,
    left_stride,
    right_stride,
    right_feature_stride,
    rank,  # R
    tokens,  # T
    features,  # C
    each,  # tokens of a program, a multiple of TOKENS
    ADDENDS: tl.constexpr,
    RANK: tl.constexpr,  # a power of 2 ≥ R, or 0
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    STAGES: tl.constexpr,
):
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    in_features = feature < features
    factors = left_ptr, right_ptr, left_stride, right_stride, right_feature_stride, rank
    if RANK > 0 and RANK <= WHOLE:
        right = right_tile(factors, feature, in_features, RANK)
    first = tl.program_id(1) * each
    for start in tl.range(first, tl.minimum(first + each, tokens), TOKENS, num_stages=STAGES):
        token = start + tl.arange(0, TOKENS)
        in_tokens = token < tokens
        mask = in_tokens[:, None] & in_features[None, :]
        row = token.to(tl.int64)[:, None]
        x_at = x_ptr + row * x_stride + feature[None, :]
        x = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
        if ADDENDS > 0:
            at = row * first_stride + feature[None, :]
            x += tl.load(first_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if ADDENDS > 1:
            at = row * second_stride + feature[None, :]
            x += tl.load(second_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if RANK > WHOLE:
            low, _ = low_rank_tile(factors, token, in_tokens, feature, in_features, RANK)
            x += low
        elif RANK:
            x += tl.dot(left_tile(factors, token, in_tokens, RANK), right, input_precision="ieee")
        tl.store(x_at, x.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def halves(x, dtype: tl.constexpr):
    """The nearest values in FP8, and what they leave.

    By the bits of float32: Triton 3.6 on Hopper gets the difference wrong where it is taken from values that
    it has just converted to FP8.
    """
    x = tl.clamp(x, -448.0, 448.0)
    bits = x.to(tl.int32, bitcast=True)
    nearest = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000  # three bits after the first, to even
    in_steps = (x + 24576.0) - 24576.0  # of 2^-9, as below 2^-6
    high = tl.where(tl.abs(x) < 0.015625, in_steps, nearest.to(tl.float32, bitcast=True))
    return high.to(dtype), (x - high).to(dtype)


@triton.jit(do_not_specialize=["rows"])  # one compilation for any number
def _split_columns(
    matrix_ptr,  # [N, R], any strides
    scales_ptr,  # float32 [N], scales_stride apart
    balance_ptr,  # float32 [R], that divides, or multiplies where OF_WEIGHT
    values_ptr,  # fp8 [N, C], rows values_stride apart
    row_stride,
    column_stride,
    scales_stride,
    values_stride,
    rows,  # N
    rank,  # R
    columns,  # C
    OF_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,  # a power of 2 ≥ R
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    index = tl.arange(0, RANK)
    in_rows, in_rank = row < rows, index < rank
    mask = in_rows[:, None] & in_rank[None, :]
    at = row.to(tl.int64)[:, None]
    x = tl.load(matrix_ptr + at * row_stride + index[None, :] * column_stride, mask=mask, other=0.0)
    scale = tl.load(scales_ptr + row * scales_stride, mask=in_rows, other=1.0)
    balance = tl.load(balance_ptr + index, mask=in_rank, other=1.0)
    x = x.to(tl.float32) / scale[:, None]
    x = x * balance[None, :] if OF_WEIGHT else x / balance[None, :]
    high, low = halves(x, values_ptr.dtype.element_ty)
    start = values_ptr + at * values_stride + index[None, :]
    tl.store(start, high, mask=mask)
    tl.store(start + (rank if OF_WEIGHT else 2 * rank), high, mask=mask)
    tl.store(start + (2 * rank if OF_WEIGHT else rank), low, mask=mask)
    left = 3 * rank + tl.arange(0, 16)
    empty = tl.zeros([ROWS, 16], tl.float32).to(values_ptr.dtype.element_ty)
    mask = in_rows[:, None] & (left < columns)[None, :]
    tl.store(values_ptr + at * values_stride + left[None, :], empty, mask=mask)
