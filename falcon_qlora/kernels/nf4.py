"""Dequantizes NF4 weights in one launch, into the place and layout that a product reads.

Shapes: B = ceil(O·I / 64) blocks of weights, S = ceil(B / 256) blocks of scales.

The layout is bitsandbytes': the weight row by row, two 4-bit codes per byte, the earlier weight in the high
nibble; one scale for 64 weights. Under double quantization the scales are 8-bit codes themselves, with one
float32 scale for 256 of them, plus one offset for all. A weight is 0.5 bytes to read and 2 to write in
bfloat16. Nothing else should cost time, so no intermediate result is stored.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 64  # weights that share one scale
_NESTED_BLOCK = 256  # scales that share one scale
_WORD = 8  # weights in 32 bits

# Tuned on the sizes of Falcon's linears.
_WORDS_A_PROGRAM = 512
_WARPS = 4
_TILE_ROWS, _TILE_WORDS = 64, 8  # transposed: 64 × 64 weights a program


def can_dequantize_nf4(state: Any) -> bool:
    """Whether `dequantize_nf4` takes weights of this bitsandbytes ``QuantState``."""
    if state.quant_type != "nf4" or state.blocksize != _BLOCK or len(state.shape) != 2:
        return False
    if state.shape[1] % _WORD or state.shape.numel() >= 2**31:
        return False
    return not state.nested or state.state2.blocksize == _NESTED_BLOCK


def dequantize_nf4(
    packed: Tensor, state: Any, out: Tensor, *, transpose: bool = False, scale: Tensor | None = None
) -> Tensor:
    """Dequantize `packed` into `out`.

    Bitwise the same as bitsandbytes in `out`'s dtype: the scale in float32, one product, one rounding.

    Args:
        packed: uint8 ``[O·I / 2, 1]``, a ``Params4bit``'s data.
        state: its bitsandbytes ``QuantState``, whose tensors are on the same device.
        out: ``[O, I]``, or ``[I, O]`` with `transpose`, bfloat16, float16, float32, or FP8 (e4m3) with
            `scale`. The last dimension is contiguous; with any row stride, so it can be part of a larger
            buffer.
        transpose: write the transposed weight.
        scale: float32 ``[]`` to divide the weights by, or None.

    Returns:
        `out`.

    Raises:
        ValueError: if `can_dequantize_nf4` is false, or `out` does not fit.
    """
    if not can_dequantize_nf4(state):
        raise ValueError(
            f"dequantize_nf4 takes NF4 in blocks of 64 with rows of a multiple of 8 weights, not "
            f"{state.quant_type} in blocks of {state.blocksize} of shape {tuple(state.shape)}"
        )
    rows, columns = state.shape
    expected = (columns, rows) if transpose else (rows, columns)
    if tuple(out.shape) != expected or (out.stride(1) != 1 and out.shape[1] > 1):
        raise ValueError(
            f"out must be {expected} with a contiguous last dimension, not {tuple(out.shape)} with strides "
            f"{out.stride()}"
        )
    words = packed.view(-1).view(torch.uint8).view(torch.int32)  # [O·I / 8]
    nested = state.state2 if state.nested else None
    scales = (
        state.absmax,
        state.offset if nested else state.absmax,
        nested.code if nested else state.absmax,
        nested.absmax if nested else state.absmax,
        state.code if scale is None else scale,
    )
    row_words = columns // _WORD
    # No fused multiply-add: the nested scale is rounded before the offset is added, as in bitsandbytes.
    options = {"NESTED": nested is not None, "num_warps": _WARPS, "enable_fp_fusion": False}
    options["SCALED"] = scale is not None
    if transpose:
        tiles = (triton.cdiv(row_words, _TILE_WORDS), triton.cdiv(rows, _TILE_ROWS))
        _dequantize_transposed[tiles](
            words, state.code, *scales, out, out.stride(0), rows, row_words,
            ROWS=_TILE_ROWS, WORDS=_TILE_WORDS, **options,
        )  # fmt: skip
        return out
    _dequantize_rows[(triton.cdiv(words.numel(), _WORDS_A_PROGRAM),)](
        words, state.code, *scales, out, out.stride(0), words.numel(), row_words,
        CONTIGUOUS=out.is_contiguous(), WORDS=_WORDS_A_PROGRAM, **options,
    )  # fmt: skip
    return out


@triton.jit
def _scale(block, mask, absmax_ptr, offset_ptr, nested_code_ptr, nested_absmax_ptr, NESTED: tl.constexpr):
    """Float32 scales of the blocks with indices `block`, in its shape."""
    absmax = tl.load(absmax_ptr + block, mask=mask, other=0)
    if NESTED:
        code = tl.load(nested_code_ptr + absmax.to(tl.int32))
        # 256 is _NESTED_BLOCK.
        nested_absmax = tl.load(nested_absmax_ptr + block // 256, mask=mask, other=0.0)
        return code * nested_absmax + tl.load(offset_ptr)
    return absmax.to(tl.float32)


@triton.jit
def _divided(weight, scale_ptr, dtype: tl.constexpr, SCALED: tl.constexpr):
    """The weight in `dtype`; where SCALED, divided by the scale and clamped to FP8's range."""
    if SCALED:
        weight = tl.clamp(weight * (1.0 / tl.load(scale_ptr)), -448.0, 448.0)
    return weight.to(dtype)


@triton.jit
def _weights(word, scale, code_ptr):
    """The eight weights of every word, in memory order along a new last dimension, in float32."""
    # Weight j is in byte j // 2, the even one in the high nibble: bits from 4 (j xor 1) on.
    shift = 4 * (tl.arange(0, 8) ^ 1)
    code = (tl.expand_dims(word, -1) >> shift) & 15
    return tl.load(code_ptr + code) * tl.expand_dims(scale, -1)


@triton.jit
def _dequantize_rows(
    word_ptr,  # int32 [O·I / 8]
    code_ptr,  # float32 [16]
    absmax_ptr,  # uint8 [B] if NESTED, else float32 [B]
    offset_ptr,  # float32 []; used where NESTED, as the next two
    nested_code_ptr,  # float32 [256]
    nested_absmax_ptr,  # float32 [S]
    scale_ptr,  # float32 []; used where SCALED
    out_ptr,  # [O, I], rows out_stride apart
    out_stride,
    words,  # O·I / 8
    row_words,  # I / 8
    NESTED: tl.constexpr,
    SCALED: tl.constexpr,
    CONTIGUOUS: tl.constexpr,  # out_stride == I
    WORDS: tl.constexpr,
):
    index = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    mask = index < words
    word = tl.load(word_ptr + index, mask=mask, other=0)
    scale = _scale(index // 8, mask, absmax_ptr, offset_ptr, nested_code_ptr, nested_absmax_ptr, NESTED)
    weight = _weights(word, scale, code_ptr)  # [WORDS, 8]
    if CONTIGUOUS:
        start = index * 8
    else:
        start = (index // row_words).to(tl.int64) * out_stride + (index % row_words) * 8
    out = out_ptr + start[:, None] + tl.arange(0, 8)[None, :]
    weight = _divided(weight, scale_ptr, out_ptr.dtype.element_ty, SCALED)
    tl.store(out, weight, mask=mask[:, None])


@triton.jit
def _dequantize_transposed(
    word_ptr,  # int32 [O, I / 8]
    code_ptr,  # float32 [16]
    absmax_ptr,  # uint8 [B] if NESTED, else float32 [B]
    offset_ptr,  # float32 []; used where NESTED, as the next two
    nested_code_ptr,  # float32 [256]
    nested_absmax_ptr,  # float32 [S]
    scale_ptr,  # float32 []; used where SCALED
    out_ptr,  # [I, O], rows out_stride apart
    out_stride,
    rows,  # O
    row_words,  # I / 8
    NESTED: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * WORDS + tl.arange(0, WORDS)  # in words
    index = row[:, None] * row_words + column[None, :]
    mask = (row < rows)[:, None] & (column < row_words)[None, :]
    word = tl.load(word_ptr + index, mask=mask, other=0)
    scale = _scale(index // 8, mask, absmax_ptr, offset_ptr, nested_code_ptr, nested_absmax_ptr, NESTED)
    weight = _weights(word, scale, code_ptr)  # [ROWS, WORDS, 8]
    weight = _divided(weight, scale_ptr, out_ptr.dtype.element_ty, SCALED)
    weight = tl.trans(tl.reshape(weight, [ROWS, WORDS * 8]))
    out_row = tl.program_id(0) * WORDS * 8 + tl.arange(0, WORDS * 8)
    out = out_ptr + out_row.to(tl.int64)[:, None] * out_stride + row[None, :]
    tl.store(out, weight, mask=(out_row < row_words * 8)[:, None] & (row < rows)[None, :])
