"""What queries read from a learned prefix, added to attention's output: forward and backward.

Every query attends to all P rows in a separate softmax; the result, times its head's gate, is added to the
output. With a = softmax(q kᵀ / √D), that is output + gate · a v. The backward pass recomputes a from the
queries, so it needs only what is kept for attention itself. With c = dy vᵀ and δ = Σ a c, the gate's gradient
is δ summed over tokens, and the scores' is gate · a (c - δ): a v is not recomputed.

Everything is computed in float32 and rounded once: a gate rounded to bfloat16 would move in steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from falcon_qlora.kernels import ops


def are_few(rows: int, head_dim: int) -> bool:
    """Whether there are few enough rows for Triton's form, a program of which holds all of them."""
    return rows <= (64 if head_dim <= 128 else 32)


def _few_rows(first: Tensor, second: Tensor, key: Tensor, *others: Tensor) -> bool:
    return are_few(key.shape[0], key.shape[2])


@ops.or_triton("prefix_triton", where=_few_rows)
def add(query: Tensor, output: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
    """Add what the queries read from the prefix.

    Args:
        query: ``[T, G, Q/G, D]``, rotated; any strides with the last one 1, as for all tensors.
        output: ``[T, Q, D]``, attention's own.
        key: ``[P, G, D]``.
        value: ``[P, G, D]``.
        gate: float32 ``[Q]``.

    Returns:
        ``[T, Q, D]`` in `output`'s dtype.
    """
    read = torch.einsum("tkgp,pkd->tkgd", _attention(query, key), value.float())
    added = output.float() + gate[:, None] * read.flatten(1, 2)
    return added.to(output.dtype)


@ops.or_triton("prefix_triton", where=_few_rows)
def add_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, gate: Tensor, of_query: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `add`'s inputs, except `output`'s, which is `grad` itself.

    Args:
        grad: ``[T, Q, D]``, of the sum.
        query: as in `add`; likewise the next three.
        key: ``[P, G, D]``.
        value: ``[P, G, D]``.
        gate: float32 ``[Q]``.
        of_query: ``[T, Q, D]``, to which the queries' gradient is added; may be overwritten.

    Returns:
        the sum for the queries ``[T, Q, D]``, and the gradients of key, value and gate in float32.
    """
    kv_heads, scale = key.shape[1], 1.0 / math.sqrt(query.shape[-1])
    attention = _attention(query, key)
    of_output = grad.unflatten(1, (kv_heads, -1)).float()  # [T, G, Q/G, D]
    gate = gate.view(kv_heads, -1, 1)
    along = torch.einsum("tkgd,pkd->tkgp", of_output, value.float())
    of_gate = (attention * along).sum(-1)  # [T, G, Q/G]
    of_scores = scale * gate * attention * (along - of_gate[..., None])
    added = torch.einsum("tkgp,pkd->tkgd", of_scores, key.float())
    of_key = torch.einsum("tkgp,tkgd->pkd", of_scores, query.float())
    of_value = torch.einsum("tkgp,tkgd->pkd", gate * attention, of_output)
    of_query = (of_query.float() + added.flatten(1, 2)).to(of_query.dtype)
    return of_query, of_key, of_value, of_gate.sum(0).flatten()


def _attention(query: Tensor, key: Tensor) -> Tensor:
    """``[T, G, Q/G, P]``, float32."""
    scores = torch.einsum("tkgd,pkd->tkgp", query.float(), key.float())
    return (scores / math.sqrt(query.shape[-1])).softmax(-1)
