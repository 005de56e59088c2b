"""Triton's form of `prefix`, in one pass over the queries in each direction.

The T·Q/G queries of a key/value head are the rows of products with its keys and values, which stay in
registers. A backward program goes through many rows and sums the gradients of its head's keys and values. The
programs' sums are added up at the end, in a fixed order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Four for each multiprocessor of an H200, enough to hide the memory latency.
_PROGRAMS = 528


def add(query: Tensor, output: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
    """See `prefix.add`."""
    result = torch.empty(output.shape, dtype=output.dtype, device=output.device)
    if not query.numel():
        return result
    _check(query, output, key, value)
    rows = query.shape[0] * query.shape[2]
    options = _options(query, key, "forward")
    _add_read[(triton.cdiv(rows, options["ROWS"]), query.shape[1])](
        query, output, result, key, value, gate,
        *query.stride()[:3], *output.stride()[:2], *key.stride()[:2], *value.stride()[:2],
        rows, query.shape[2], key.shape[0], 1.0 / math.sqrt(query.shape[-1]), **options,
    )  # fmt: skip
    return result


def add_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, gate: Tensor, of_query: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `prefix.add_backward`; the queries' gradient is added in-place."""
    _check(query, grad, key, value, of_query)
    tokens, kv_heads, group, _ = query.shape
    rows, options = tokens * group, _options(query, key, "backward")
    programs = max(min(triton.cdiv(rows, options["ROWS"]), _PROGRAMS // kv_heads), 1)
    of_gate = torch.empty(tokens, gate.shape[0], dtype=torch.float32, device=query.device)
    sums = torch.empty(programs, 2, *key.shape, dtype=torch.float32, device=query.device)
    _add_read_backward[(programs, kv_heads)](
        grad, query, key, value, gate, of_query, of_gate, sums,
        *grad.stride()[:2], *query.stride()[:3], *key.stride()[:2], *value.stride()[:2],
        *of_query.stride()[:2], rows, group, key.shape[0], 1.0 / math.sqrt(query.shape[-1]), **options,
    )  # fmt: skip
    of_key, of_value = sums.sum(0)
    return of_query, of_key, of_value, of_gate.sum(0)


def _check(query: Tensor, output: Tensor, *others: Tensor) -> None:
    tokens, kv_heads, group, head_dim = query.shape
    if output.shape != (tokens, kv_heads * group, head_dim):
        raise ValueError(f"expected {(tokens, kv_heads * group, head_dim)}, not {tuple(output.shape)}")
    if any(tensor.stride(-1) != 1 for tensor in (query, output, *others)):
        raise ValueError("heads need a contiguous last dimension")


def _options(query: Tensor, key: Tensor, direction: str) -> dict[str, Any]:
    """Tiles that fit into registers; matrix units take at least 16 rows and columns."""
    lanes, prefix = (max(triton.next_power_of_2(size), 16) for size in (query.shape[-1], key.shape[0]))
    rows = 64 if lanes <= 64 and prefix <= 16 else 32 if lanes <= 128 else 16
    return {
        "HEAD": query.shape[-1],
        "LANES": lanes,
        "PREFIX": prefix,
        "ROWS": rows * (2 if direction == "forward" else 1),
        "num_warps": 8 if lanes > 128 and prefix > 16 else 4,
        "num_stages": 1,  # several programs on a multiprocessor already hide the memory latency
    }


@triton.jit
def _load_prefix(ptr, row_stride, prefix, HEAD: tl.constexpr, LANES: tl.constexpr, PREFIX: tl.constexpr):
    """``[PREFIX, LANES]``, zeros beyond P and D."""
    row, lane = tl.arange(0, PREFIX), tl.arange(0, LANES)
    mask = (row < prefix)[:, None] & (lane < HEAD)[None, :]
    return tl.load(ptr + row[:, None] * row_stride + lane[None, :], mask=mask, other=0.0)


@triton.jit
def _softmax(query, key, prefix, scale, PREFIX: tl.constexpr):
    """float32 ``[ROWS, PREFIX]``, zeros beyond P."""
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * (scale * 1.4426950408889634)  # log2(e)
    scores = tl.where((tl.arange(0, PREFIX) < prefix)[None, :], scores, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit(do_not_specialize=["queries"])  # it differs from one micro-batch to the next
def _add_read(
    query_ptr,  # [T, G, Q/G, D], by its strides
    output_ptr,  # [T, Q, D], by its strides
    result_ptr,  # [T, Q, D]
    key_ptr,  # [P, G, D], by its strides
    value_ptr,  # [P, G, D], by its strides
    gate_ptr,  # float32 [Q]
    query_token,
    query_kv,
    query_head,
    output_token,
    output_head,
    key_row,
    key_head,
    value_row,
    value_head,
    queries,  # T Q/G
    group,  # Q/G
    prefix,  # P
    scale,
    HEAD: tl.constexpr,  # D
    LANES: tl.constexpr,  # D, up to a power of two
    PREFIX: tl.constexpr,  # P, up to a power of two
    ROWS: tl.constexpr,
):
    kv_head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)[None, :]
    token, member = (row // group).to(tl.int64)[:, None], (row % group)[:, None]
    head = kv_head * group + member
    mask = (row < queries)[:, None] & (lane < HEAD)
    key = _load_prefix(key_ptr + kv_head * key_head, key_row, prefix, HEAD, LANES, PREFIX)
    value = _load_prefix(value_ptr + kv_head * value_head, value_row, prefix, HEAD, LANES, PREFIX)
    at_query = token * query_token + kv_head * query_kv + member * query_head + lane
    query = tl.load(query_ptr + at_query, mask=mask, other=0.0)
    weights = _softmax(query, key, prefix, scale, PREFIX)
    read = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    gate = tl.load(gate_ptr + head, mask=(row < queries)[:, None], other=0.0)
    output = tl.load(output_ptr + token * output_token + head * output_head + lane, mask=mask, other=0.0)
    result = output.to(tl.float32) + gate * read
    at_result = (token * (tl.num_programs(1) * group) + head) * HEAD + lane
    tl.store(result_ptr + at_result, result.to(result_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["queries"])
def _add_read_backward(
    grad_ptr,  # [T, Q, D], by its strides
    query_ptr,  # [T, G, Q/G, D], by its strides
    key_ptr,  # [P, G, D], by its strides
    value_ptr,  # [P, G, D], by its strides
    gate_ptr,  # float32 [Q]
    of_query_ptr,  # [T, Q, D], by its strides
    of_gate_ptr,  # float32 [T, Q]
    sums_ptr,  # float32 [programs, 2, P, G, D]
    grad_token,
    grad_head,
    query_token,
    query_kv,
    query_head,
    key_row,
    key_head,
    value_row,
    value_head,
    of_query_token,
    of_query_head,
    queries,  # T Q/G
    group,  # Q/G
    prefix,  # P
    scale,
    HEAD: tl.constexpr,  # D
    LANES: tl.constexpr,  # D, up to a power of two
    PREFIX: tl.constexpr,  # P, up to a power of two
    ROWS: tl.constexpr,
):
    kv_head, kv_heads = tl.program_id(1), tl.num_programs(1)
    lane = tl.arange(0, LANES)[None, :]
    key = _load_prefix(key_ptr + kv_head * key_head, key_row, prefix, HEAD, LANES, PREFIX)
    value = _load_prefix(value_ptr + kv_head * value_head, value_row, prefix, HEAD, LANES, PREFIX)
    of_key = tl.zeros([PREFIX, LANES], tl.float32)
    of_value = tl.zeros([PREFIX, LANES], tl.float32)
    for start in range(tl.program_id(0) * ROWS, queries, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        token, member = (row // group).to(tl.int64)[:, None], (row % group)[:, None]
        head = kv_head * group + member
        inside = (row < queries)[:, None]
        mask = inside & (lane < HEAD)
        at_query = token * query_token + kv_head * query_kv + member * query_head + lane
        query = tl.load(query_ptr + at_query, mask=mask, other=0.0)
        grad = tl.load(grad_ptr + token * grad_token + head * grad_head + lane, mask=mask, other=0.0)
        gate = tl.load(gate_ptr + head, mask=inside, other=0.0)
        weights = _softmax(query, key, prefix, scale, PREFIX)
        along = tl.dot(grad, tl.trans(value), input_precision="ieee")
        of_gate = tl.sum(weights * along, 1)[:, None]
        tl.store(of_gate_ptr + token * (kv_heads * group) + head, of_gate, mask=inside)
        weights *= gate
        of_scores = (weights * (along - of_gate) * scale).to(key.dtype)
        at_of_query = token * of_query_token + head * of_query_head + lane
        of_query = tl.load(of_query_ptr + at_of_query, mask=mask, other=0.0).to(tl.float32)
        of_query += tl.dot(of_scores, key, input_precision="ieee")
        tl.store(of_query_ptr + at_of_query, of_query.to(of_query_ptr.dtype.element_ty), mask=mask)
        of_key += tl.dot(tl.trans(of_scores), query, input_precision="ieee")
        of_value += tl.dot(tl.trans(weights.to(grad.dtype)), grad, input_precision="ieee")
    row = tl.arange(0, PREFIX)[:, None]
    mask = (row < prefix) & (lane < HEAD)
    at = ((tl.program_id(0) * 2 * prefix + row) * kv_heads + kv_head) * HEAD + lane
    tl.store(sums_ptr + at, of_key, mask=mask)
    tl.store(sums_ptr + at + prefix * kv_heads * HEAD, of_value, mask=mask)
