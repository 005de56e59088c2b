"""Rotary embedding of the projections' heads in-place, and the reverse for attention's gradients.

The fused projection is ``[T, G, Q/G + 2, D]`` in every Falcon with rotary embedding: in each group the query
heads, then its key and its value. 7B, which has one key head, is one group of 71 query heads. Where queries,
keys and values are projections of their own, side by side, they are one group with G keys and values.

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
_HEADS_A_PROGRAM = 8  # of up to 128; fewer larger ones, which stay in registers too
_WARPS = 4


def rotate_(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """`ops.rotate_` in one pass."""
    _launch(heads, (heads, heads, heads), cosine, sine, 1.0, join=False)
    return heads


def rotate_join(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cosine: Tensor,
    sine: Tensor,
    out: Tensor,
    scale: float = 1.0,
) -> Tensor:
    """`ops.rotate_join` in one pass; all tensors may have any strides with the last one 1."""
    _launch(out, (query, key, value), cosine, sine, scale, join=True)
    return out


def _launch(
    fused: Tensor,
    parts: tuple[Tensor, Tensor, Tensor],
    cosine: Tensor,
    sine: Tensor,
    scale: float,
    *,
    join: bool,
) -> None:
    tokens, groups, group, head_dim = fused.shape
    keys = parts[1].shape[1] // groups if join else 1
    if join:
        expected = (groups * (group - 2 * keys), groups * keys, groups * keys)
        for part, heads in zip(parts, expected, strict=True):
            if part.shape != (tokens, heads, head_dim):
                raise ValueError(f"expected {(tokens, heads, head_dim)}, not {tuple(part.shape)}")
    for tensor in (fused, *parts, cosine, sine):
        if tensor.stride(-1) != 1:
            raise ValueError("heads, cosines and sines need a contiguous last dimension")
    if not fused.numel():
        return
    query, key, value = parts
    options = _options(head_dim)
    head_blocks = triton.cdiv(groups * group, options["HEADS"])
    _rotate[(triton.cdiv(tokens, _TOKENS_A_PROGRAM) * head_blocks,)](
        fused, query, key, value, cosine, sine,
        *fused.stride()[:3], *query.stride()[:2], *key.stride()[:2], *value.stride()[:2],
        cosine.stride(0), sine.stride(0), tokens, groups, group, keys, scale, JOIN=join, **options,
    )  # fmt: skip


def _options(head_dim: int) -> dict[str, int]:
    half = head_dim // 2
    lanes = triton.next_power_of_2(half)
    heads = max(min(_HEADS_A_PROGRAM, 512 // lanes), 1)
    tile = {"TOKENS": _TOKENS_A_PROGRAM, "HEADS": heads, "num_warps": _WARPS}
    return {"HALF": half, "LANES": lanes, **tile}


@triton.jit
def _store(ptr, offset, values, mask):
    tl.store(ptr + offset, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])  # it differs from one micro-batch to the next
def _rotate(
    fused_ptr,  # [T, groups, group, D], by its strides
    query_ptr,  # [T, Q, D], by its strides; used where JOIN, as the next two
    key_ptr,  # [T, G, D], by its strides
    value_ptr,  # [T, G, D], by its strides
    cosine_ptr,  # [T, D], rows cosine_stride apart
    sine_ptr,  # [T, D], rows sine_stride apart
    fused_token,
    fused_group,
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
    groups,
    group,  # heads of each
    keys,  # and key heads among them, as many as value heads
    scale,  # used where JOIN
    JOIN: tl.constexpr,  # rotate the parts back into fused; else in-place
    HALF: tl.constexpr,  # D / 2
    LANES: tl.constexpr,  # HALF, up to a power of two
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
):
    # Programs that share tokens, and so cosines and sines, are consecutive.
    head_blocks = tl.cdiv(groups * group, HEADS)
    token = (tl.program_id(0) // head_blocks) * TOKENS + tl.arange(0, TOKENS)
    head = (tl.program_id(0) % head_blocks) * HEADS + tl.arange(0, HEADS)
    lane = tl.arange(0, LANES)
    row_mask = (token < tokens)[:, None] & (lane < HALF)[None, :]
    row = token.to(tl.int64)
    cosine = read(cosine_ptr, row[:, None] * cosine_stride + lane[None, :], row_mask)[:, None, :]
    sine = read(sine_ptr, row[:, None] * sine_stride + lane[None, :], row_mask)[:, None, :]
    if JOIN:
        cosine, sine = scale * cosine, -scale * sine

    of_group, member = head // group, head % group
    mask = (token < tokens)[:, None, None] & (head < groups * group)[None, :, None]
    mask = mask & (lane < HALF)[None, None, :]
    row, lane = row[:, None, None], lane[None, None, :]
    at_fused = row * fused_token + (of_group * fused_group + member * fused_head)[None, :, None] + lane
    if JOIN:
        queries = group - 2 * keys
        of_query = mask & (member < queries)[None, :, None]
        of_key = mask & ((member >= queries) & (member < queries + keys))[None, :, None]
        of_value = mask & (member >= queries + keys)[None, :, None]
        key_place = of_group * keys + member - queries
        at_query = row * query_token + ((of_group * queries + member) * query_head)[None, :, None] + lane
        at_key = row * key_token + (key_place * key_head)[None, :, None] + lane
        at_value = row * value_token + ((key_place - keys) * value_head)[None, :, None] + lane
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
        turned_first = tl.where(of_value, scale * first, turned_first)
        turned_second = tl.where(of_value, scale * second, turned_second)
    _store(fused_ptr, at_fused, turned_first, mask)
    _store(fused_ptr, at_fused + HALF, turned_second, mask)
