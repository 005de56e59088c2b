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
from falcon_qlora.kernels.low_rank_triton import low_rank_arguments, low_rank_tile, tile, tiles
from falcon_qlora.kernels.rows import contiguous_rows

_LANES_A_THREAD = 32
_MOST_WARPS = 16
_LONGEST, _PIECE = 32_768, 8192  # longer rows are read twice, in pieces
_TILE, _TILE_WARPS = 64, 4  # of a weight: 64 × 64
_SUM = 64, 128, 8  # tokens and features of a tile, and warps
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


def split_columns(matrix: Tensor, scales: Tensor, divisors: Tensor, out: Tensor, low_last: bool) -> None:
    """`fp8.split_columns` in one launch."""
    (rows, rank), columns = matrix.shape, out.shape[1]
    assert out.stride(1) == 1
    if rows and columns:
        _split_columns[(triton.cdiv(rows, _SPLIT_ROWS),)](
            matrix, scales, divisors, out, *matrix.stride(), scales.stride(0), out.stride(0), rows, rank,
            columns, LOW_LAST=low_last, ROWS=_SPLIT_ROWS, RANK=triton.next_power_of_2(rank), num_warps=4,
        )  # fmt: skip


def add(x: Tensor, low: LowRank | None, addends: tuple[Tensor, ...] = ()) -> Tensor:
    """`fp8.add` in one pass."""
    tokens, features = x.shape
    if not tokens or (low is None and not addends):
        return x
    first, second = (*addends, x, x)[:2]
    assert all(matrix.stride(1) == 1 and matrix.shape == x.shape for matrix in (x, first, second))
    left, right, options = low_rank_arguments(low, x)
    grid, how = tiles(x, _SUM)
    _add[grid](
        x, first, second, left, right, x.stride(0), first.stride(0), second.stride(0),
        left.stride(0), *right.stride(), left.shape[1], tokens, features,
        ADDENDS=len(addends), **how, **options,
    )  # fmt: skip
    return x


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


@triton.jit(do_not_specialize=["tokens"])  # one compilation for any number
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
    ADDENDS: tl.constexpr,
    RANK: tl.constexpr,  # a power of 2 ≥ R, or 0
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    token, feature, in_tokens, in_features = tile(tokens, features, TOKENS, FEATURES)
    mask = in_tokens[:, None] & in_features[None, :]
    row = token.to(tl.int64)[:, None]
    x_ptr += row * x_stride + feature[None, :]
    x = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    if ADDENDS > 0:
        x += tl.load(first_ptr + row * first_stride + feature[None, :], mask=mask, other=0.0).to(tl.float32)
    if ADDENDS > 1:
        x += tl.load(second_ptr + row * second_stride + feature[None, :], mask=mask, other=0.0).to(tl.float32)
    if RANK:
        factors = left_ptr, right_ptr, left_stride, right_stride, right_feature_stride, rank
        low, _ = low_rank_tile(factors, token, in_tokens, feature, in_features, RANK)
        x += low
    tl.store(x_ptr, x.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])  # one compilation for any number
def _split_columns(
    matrix_ptr,  # [N, R], any strides
    scales_ptr,  # float32 [N], scales_stride apart
    factors_ptr,  # float32 [R], that divide
    values_ptr,  # fp8 [N, C], rows values_stride apart
    row_stride,
    column_stride,
    scales_stride,
    values_stride,
    rows,  # N
    rank,  # R
    columns,  # C
    LOW_LAST: tl.constexpr,
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
    divisor = tl.load(factors_ptr + index, mask=in_rank, other=1.0)
    x = x.to(tl.float32) / scale[:, None] / divisor[None, :]
    high = tl.clamp(x, -448.0, 448.0).to(values_ptr.dtype.element_ty)
    low = (x - high.to(tl.float32)).to(values_ptr.dtype.element_ty)
    start = values_ptr + at * values_stride + index[None, :]
    tl.store(start, high, mask=mask)
    tl.store(start + (rank if LOW_LAST else 2 * rank), high, mask=mask)
    tl.store(start + (2 * rank if LOW_LAST else rank), low, mask=mask)
    left = 3 * rank + tl.arange(0, 16)
    empty = tl.zeros([ROWS, 16], tl.float32).to(values_ptr.dtype.element_ty)
    mask = in_rows[:, None] & (left < columns)[None, :]
    tl.store(values_ptr + at * values_stride + left[None, :], empty, mask=mask)
