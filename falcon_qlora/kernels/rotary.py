"""Rotary embedding of the fused projection's heads in-place, and the reverse for attention's gradients.

The fused projection is ``[T, G, Q/G + 2, D]`` in every Falcon with rotary embedding: in each group the query
heads, then its key and its value. 7B, which has one key head, is one group of 71 query heads.

As in Transformers, the first and second half of a head are the coordinates of D/2 planes, and cosines and
sines are given twice, once for each half. Rotation is in float32, rounded once. Its gradient is the opposite
rotation, so nothing has to be kept for it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from falcon_qlora.kernels.rows import read

# Tuned on Falcon's heads. All models but 7B have 8 groups, so 8 divides their number of heads.
_TOKENS_A_PROGRAM = 8
_HEADS_A_PROGRAM = 8
_WARPS = 4


def rotate_(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """`ops.rotate_` in one pass."""
    _launch(heads, (heads, heads, heads), cosine, sine, join=False)
    return heads


def rotate_join(
    query: Tensor, key: Tensor, value: Tensor, cosine: Tensor, sine: Tensor, out: Tensor
) -> Tensor:
    """`ops.rotate_join` in one pass; all tensors may have any strides with the last one 1."""
    _launch(out, (query, key, value), cosine, sine, join=True)
    return out


def _launch(
    fused: Tensor, parts: tuple[Tensor, Tensor, Tensor], cosine: Tensor, sine: Tensor, *, join: bool
) -> None:
    tokens, kv_heads, group, head_dim = fused.shape
    if join:
        expected = (kv_heads * (group - 2), kv_heads, kv_heads)
        for part, heads in zip(parts, expected, strict=True):
            if part.shape != (tokens, heads, head_dim):
                raise ValueError(f"expected {(tokens, heads, head_dim)}, not {tuple(part.shape)}")
    for tensor in (fused, *parts, cosine, sine):
        if tensor.stride(-1) != 1:
            raise ValueError("heads, cosines and sines need a contiguous last dimension")
    if not fused.numel():
        return
    query, key, value = parts
    head_blocks = triton.cdiv(kv_heads * group, _HEADS_A_PROGRAM)
    _rotate[(triton.cdiv(tokens, _TOKENS_A_PROGRAM) * head_blocks,)](
        fused, query, key, value, cosine, sine,
        *fused.stride()[:3], *query.stride()[:2], *key.stride()[:2], *value.stride()[:2],
        cosine.stride(0), sine.stride(0), tokens, kv_heads, group,
        JOIN=join,
        HALF=head_dim // 2, LANES=triton.next_power_of_2(head_dim // 2),
        TOKENS=_TOKENS_A_PROGRAM, HEADS=_HEADS_A_PROGRAM, num_warps=_WARPS,
    )  # fmt: skip


@triton.jit
def _store(ptr, offset, values, mask):
    tl.store(ptr + offset, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])  # it differs from one micro-batch to the next
def _rotate(
    fused_ptr,  # [T, G, Q/G + 2, D], by its strides
    query_ptr,  # [T, Q, D], by its strides; used where JOIN, as the next two
    key_ptr,  # [T, G, D], by its strides
    value_ptr,  # [T, G, D], by its strides
    cosine_ptr,  # [T, D], rows cosine_stride apart
    sine_ptr,  # [T, D], rows sine_stride apart
    fused_token,
    fused_kv,
    fused_head,
    query_token,
    query_head,
    key_token,
    key_head,
    value_token,
    value_head,
    cosine_stride,
    sine_stride,
    tokens,  # T
    kv_heads,  # G
    group,  # Q/G + 2
    JOIN: tl.constexpr,  # rotate the parts back into fused; else in-place
    HALF: tl.constexpr,  # D / 2
    LANES: tl.constexpr,  # HALF, up to a power of two
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
):
    # Programs that share tokens, and so cosines and sines, are consecutive.
    head_blocks = tl.cdiv(kv_heads * group, HEADS)
    token = (tl.program_id(0) // head_blocks) * TOKENS + tl.arange(0, TOKENS)
    head = (tl.program_id(0) % head_blocks) * HEADS + tl.arange(0, HEADS)
    lane = tl.arange(0, LANES)
    row_mask = (token < tokens)[:, None] & (lane < HALF)[None, :]
    row = token.to(tl.int64)
    cosine = read(cosine_ptr, row[:, None] * cosine_stride + lane[None, :], row_mask)[:, None, :]
    sine = read(sine_ptr, row[:, None] * sine_stride + lane[None, :], row_mask)[:, None, :]
    if JOIN:
        sine = -sine

    kv_head, member = head // group, head % group
    mask = (token < tokens)[:, None, None] & (head < kv_heads * group)[None, :, None]
    mask = mask & (lane < HALF)[None, None, :]
    row, lane = row[:, None, None], lane[None, None, :]
    at_fused = row * fused_token + (kv_head * fused_kv + member * fused_head)[None, :, None] + lane
    if JOIN:
        of_query = mask & (member < group - 2)[None, :, None]
        of_key = mask & (member == group - 2)[None, :, None]
        of_value = mask & (member == group - 1)[None, :, None]
        at_query = row * query_token + ((kv_head * (group - 2) + member) * query_head)[None, :, None] + lane
        at_key = row * key_token + (kv_head * key_head)[None, :, None] + lane
        at_value = row * value_token + (kv_head * value_head)[None, :, None] + lane
        # Each head is in one of the three; the other two give zeros without reading.
        first = read(query_ptr, at_query, of_query) + read(key_ptr, at_key, of_key)
        first += read(value_ptr, at_value, of_value)
        second = read(query_ptr, at_query + HALF, of_query) + read(key_ptr, at_key + HALF, of_key)
        second += read(value_ptr, at_value + HALF, of_value)
    else:
        first = read(fused_ptr, at_fused, mask)
        second = read(fused_ptr, at_fused + HALF, mask)
    turned_first = first * cosine - second * sine
    turned_second = second * cosine + first * sine
    if JOIN:
        turned_first = tl.where(of_value, first, turned_first)
        turned_second = tl.where(of_value, second, turned_second)
    _store(fused_ptr, at_fused, turned_first, mask)
    _store(fused_ptr, at_fused + HALF, turned_second, mask)
