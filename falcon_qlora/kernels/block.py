"""A whole Falcon block with frozen weights and LoRA, forward and backward, as one autograd function.

Shapes: T tokens of all documents, H hidden size, W width of the fused query, key and value, F feed-forward
size, Q query heads, K key/value heads, D head size, R columns for LoRA's ranks.

The block's parallel forms: ``y = x + dense(attention(n1)) + 4h_to_h(gelu(h_to_4h(n2)))`` with n1 and n2 two
norms of x, or one and the same.

Products are few and large, see `frozen_linear`: query_key_value and h_to_4h are one where there is one norm,
and so are dense and 4h_to_h, with x as addend.

What is kept for the backward pass: x, the outputs of query_key_value (rotated) and h_to_4h, attention's
output and statistics, and LoRA's t. Norms and GELU are computed again. Weights are dequantized again too,
each time into the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from falcon_qlora.kernels import ops
from falcon_qlora.kernels.frozen_linear import Adapter, Projection, SharedInput, SharedOutput, Workspace


class Attention(Protocol):
    """Attention within documents; what backward needs beside its inputs are `statistics`."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``[T, Q, D]``, ``[T, K, D]``, ``[T, K, D]`` → ``[T, Q, D]`` and statistics."""

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        statistics: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of query, key and value."""


@dataclass(frozen=True, eq=False)
class Norm:
    """A frozen layer norm: weight ``[H]`` and bias ``[H]``."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        return ops.layer_norm(x, self.weight, self.bias, self.eps, out)


@dataclass(frozen=True, eq=False)
class Block:
    """One block as the function takes it.

    Attributes:
        norms: one, or attention's and the feed-forward's.
        query_key_value: K groups of query heads, a key head and a value head each.
        dense_h_to_4h: before GELU.
        dense_4h_to_h: after GELU.
        dense: after attention.
        kv_heads: K.
        head_dim: D.
        workspace: shared by all blocks of a model.
    """

    norms: tuple[Norm, ...]
    query_key_value: Projection
    dense_h_to_4h: Projection
    dense_4h_to_h: Projection
    dense: Projection
    kv_heads: int
    head_dim: int
    workspace: Workspace

    @property
    def projections(self) -> tuple[Projection, Projection, Projection, Projection]:
        """In the order of the function's adapters."""
        return self.query_key_value, self.dense_h_to_4h, self.dense_4h_to_h, self.dense

    def heads(self, fused: Tensor) -> Tensor:
        """``[T, W]`` → ``[T, K, Q/K + 2, D]``, a view."""
        return fused.unflatten(1, (self.kv_heads, -1, self.head_dim))


def run_block(
    hidden: Tensor,
    cosine: Tensor,
    sine: Tensor,
    block: Block,
    attention: Attention,
    adapters: Sequence[Adapter],
) -> Tensor:
    """Run a block.

    Args:
        hidden: ``[T, H]``, in the dtype to compute in.
        cosine: ``[T, D]``, of the rotary embedding; so too `sine`.
        sine: ``[T, D]``.
        block: the frozen part.
        attention: within documents.
        adapters: LoRA's A and B for each of ``block.projections``, (None, None) where there is none.

    Returns:
        ``[T, H]``, connected to `hidden` and the adapters.
    """
    flat = [matrix for adapter in adapters for matrix in adapter]
    return _BlockFunction.apply(hidden, cosine, sine, block, attention, *flat)


class _BlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        cosine: Tensor,
        sine: Tensor,
        block: Block,
        attention: Attention,
        *adapters: Tensor | None,
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            into, out_of = _groups(block, adapters)
            projected, low_rank = [], []
            for norm, group in zip(block.norms, into, strict=True):
                normal = hidden.new_empty(hidden.shape[0], group.features + group.columns)
                norm(hidden, normal[:, : group.features])
                output, low = group.forward(normal)
                projected.append(output)
                low_rank.append(low)
                del normal
            fused, before_gelu = _parts(block, projected)
            heads = block.heads(fused)
            ops.rotate_(heads[:, :, :-1], cosine, sine)
            attended, statistics = attention.forward(*_query_key_value(heads))
            joined = hidden.new_empty(hidden.shape[0], out_of.features + out_of.columns)
            ops.gelu(before_gelu, joined[:, : block.dense_4h_to_h.in_features])
            joined[:, block.dense_4h_to_h.in_features : out_of.features] = attended.flatten(1)
            output, low = out_of.forward(joined, hidden)
            ctx.block, ctx.attention, ctx.groups = block, attention, len(projected)
            ctx.save_for_backward(
                hidden, cosine, sine, attended, low, *projected, *low_rank, *adapters, *statistics
            )
            return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        block, attention, groups = ctx.block, ctx.attention, ctx.groups
        hidden, cosine, sine, attended, low_out, *rest = ctx.saved_tensors
        projected, low_in = rest[:groups], rest[groups : 2 * groups]
        adapters, statistics = rest[2 * groups : 2 * groups + 8], tuple(rest[2 * groups + 8 :])
        with torch.autocast(hidden.device.type, enabled=False):
            into, out_of = _groups(block, adapters)
            fused, before_gelu = _parts(block, projected)
            grads = [grad.new_empty(grad.shape[0], group.width + group.columns) for group in into]
            grad_fused, grad_before_gelu = _parts(block, grads)

            grad_joined, grad_low = out_of.input_gradient(grad)
            split = block.dense_4h_to_h.in_features
            _, after_gelu = ops.gelu_backward(grad_joined[:, :split], before_gelu, grad_before_gelu)
            inputs = [after_gelu, attended.flatten(1)]
            adapter_grads = out_of.adapter_gradients(grad, grad_low, low_out, inputs)
            del after_gelu, inputs

            heads = block.heads(fused)
            of_attended = grad_joined[:, split:].unflatten(1, (-1, block.head_dim))
            of_query, of_key, of_value = attention.backward(
                of_attended, *_query_key_value(heads), attended, statistics
            )
            del grad_joined, of_attended
            ops.rotate_join(of_query, of_key, of_value, cosine, sine, block.heads(grad_fused))
            del of_query, of_key, of_value

            in_grads: list[Tensor | None] = []
            grad_hidden = grad
            for norm, group, group_grad, low in zip(block.norms, into, grads, low_in, strict=True):
                normal, mean, rstd = norm(hidden)
                in_grads += group.adapter_gradients(group_grad, low, normal)
                del normal
                if ctx.needs_input_grad[0]:
                    grad_normal = group.input_gradient(group_grad)
                    grad_hidden = ops.layer_norm_backward(
                        grad_normal, hidden, mean, rstd, norm.weight, grad_hidden
                    )
                    del grad_normal
        first = grad_hidden if ctx.needs_input_grad[0] else None
        return (first, None, None, None, None, *in_grads, *adapter_grads)


def _parts(block: Block, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The slices for query_key_value and for h_to_4h, of one tensor for both or of one each."""
    width, wide = block.query_key_value.out_features, block.dense_h_to_4h.out_features
    start = width if len(tensors) == 1 else 0
    return tensors[0][:, :width], tensors[-1][:, start : start + wide]


def _query_key_value(heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views, but for the query where there are several groups."""
    return heads[:, :, :-2].flatten(1, 2), heads[:, :, -2], heads[:, :, -1]


def _groups(block: Block, flat: Sequence[Tensor | None]) -> tuple[list[SharedInput], SharedOutput]:
    adapters = list(zip(flat[::2], flat[1::2], strict=True))
    first, last = block.projections[:2], block.projections[2:]
    if len(block.norms) == 1:
        into = [SharedInput(first, adapters[:2], block.workspace)]
    else:
        into = [SharedInput(first[i : i + 1], adapters[i : i + 1], block.workspace) for i in range(2)]
    return into, SharedOutput(last, adapters[2:], block.workspace)
