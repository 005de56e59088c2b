"""A whole Falcon block with frozen weights and LoRA, forward and backward, as one autograd function.

Shapes: T tokens of all documents, H hidden size, W width of the fused query, key and value, F feed-forward
size, Q query heads, K key/value heads, D head size, R columns for LoRA's ranks.

The block's parallel forms: ``y = x + dense(attention(n1)) + 4h_to_h(gelu(h_to_4h(n2)))`` with n1 and n2 two
norms of x, or one and the same.

Products are few and large, see `frozen_linear`: query_key_value and h_to_4h are one where there is one norm,
and so are dense and 4h_to_h, with x as addend.

What is kept for the backward pass: x, the outputs of query_key_value (rotated) and h_to_4h, attention's
output and statistics, and LoRA's t; less, where `Block.keep` says so. Norms and GELU are always computed
again, the last product never: no gradient needs its output. Weights are dequantized again too, each time
into the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from falcon_qlora.kernels import ops
from falcon_qlora.kernels.frozen_linear import (
    Adapter,
    Projection,
    SharedInput,
    SharedOutput,
    Workspace,
    room_behind,
)
from falcon_qlora.kernels.gelu_products import GeluProducts


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


Keep = Literal["all", "attention", "input"]


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
        keep: what the backward pass finds: all it needs; all but h_to_4h's output, the largest; or the
            block's input alone. What it does not find it computes again.
        gelu_products: products with GELU in their epilogues, where they are used.
    """

    norms: tuple[Norm, ...]
    query_key_value: Projection
    dense_h_to_4h: Projection
    dense_4h_to_h: Projection
    dense: Projection
    kv_heads: int
    head_dim: int
    workspace: Workspace
    keep: Keep = "all"
    gelu_products: GeluProducts | None = None

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
            joined, after_gelu, room = _joined(block, out_of, hidden)
            projected, low_in = _enter(block, into, hidden, after_gelu)
            fused, _ = _parts(block, projected)
            attended, statistics = _attend(block, attention, fused, cosine, sine)
            ops.copy_rows(attended.flatten(1), room)
            output, low_out = out_of.forward(joined, hidden)
            if block.keep == "all":
                kept = [*projected, *low_in, low_out, attended, *statistics]
            elif block.keep == "attention":
                kept = [fused.clone(), *low_in, low_out, attended, *statistics]
            else:
                kept = []
        ctx.block, ctx.attention = block, attention
        ctx.save_for_backward(hidden, cosine, sine, *adapters, *kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        block, attention = ctx.block, ctx.attention
        hidden, cosine, sine, *rest = ctx.saved_tensors
        adapters, kept = rest[:8], list(rest[8:])
        del rest
        with torch.autocast(hidden.device.type, enabled=False):
            into, out_of = _groups(block, adapters)
            if block.keep == "input":
                joined, after_gelu, room = _joined(block, out_of, hidden)
                projected, low_in = _enter(block, into, hidden, after_gelu, longer=True)
                fused, before_gelu = _parts(block, projected)
                attended, statistics = _attend(block, attention, fused, cosine, sine)
                ops.copy_rows(attended.flatten(1), room)
                low_out = out_of.low_rank(joined)
                del joined, after_gelu, room
            else:
                projected = _take(kept, len(into) if block.keep == "all" else 1)
                low_in, (low_out, attended), statistics = _take(kept, len(into)), _take(kept, 2), tuple(kept)
                if block.keep == "all":
                    fused, before_gelu = _parts(block, projected)
                else:
                    fused, before_gelu = projected[0], _project_h_to_4h(block, adapters, hidden)
            if block.keep == "input":
                grads = projected  # nobody else's: the gradients take its memory, piece by piece
            else:
                grads = [grad.new_empty(grad.shape[0], group.width + group.columns) for group in into]
            of_fused, of_before_gelu = _parts(block, grads)
            of_attended, out_grads = _leave_backward(
                block, out_of, grad, before_gelu, attended, low_out, of_before_gelu
            )
            if block.keep == "input":
                of_attended = of_attended.contiguous()  # else the gradient for all that was joined stays
            del before_gelu, projected
            of_query, of_key, of_value = attention.backward(
                of_attended.unflatten(1, (-1, block.head_dim)),
                *_query_key_value(block.heads(fused)),
                attended,
                statistics,
            )
            del of_attended, fused, attended
            ops.rotate_join(of_query, of_key, of_value, cosine, sine, block.heads(of_fused))
            del of_query, of_key, of_value
            # The block before finds room for its LoRA behind its output's gradient.
            of_hidden = room_behind(hidden, out_of.columns) if ctx.needs_input_grad[0] else None
            in_grads = _enter_backward(block, into, hidden, grads, low_in, grad, of_hidden)
        return (of_hidden, None, None, None, None, *in_grads, *out_grads)


def _joined(block: Block, out_of: SharedOutput, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the last product's input with t; its slices for GELU's and for attention's output."""
    joined = hidden.new_empty(hidden.shape[0], out_of.features + out_of.columns)
    split = block.dense_4h_to_h.in_features
    return joined, joined[:, :split], joined[:, split : out_of.features]


def _enter(
    block: Block, into: Sequence[SharedInput], hidden: Tensor, after_gelu: Tensor, longer: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Each group's norm and product: its outputs ``[T, width]``, and its t ``[T, R]``; fills `after_gelu`.

    Where rows may be `longer`, the outputs are ``[T, width + R]``, as their gradients will be.
    """
    projected, low_rank = [], []
    for norm, group in zip(block.norms, into, strict=True):
        normal, width = _normal(norm, group, hidden), group.width
        output = hidden.new_empty(hidden.shape[0], width + (group.columns if longer else 0))
        if group is into[-1] and block.gelu_products is not None:
            weight, low = group.operand(normal)
            split = width - block.dense_h_to_4h.out_features
            if split:
                torch.mm(normal, weight[:split].T, out=output[:, :split])
            block.gelu_products.forward(normal, weight[split:].T, output[:, split:width], after_gelu)
        else:
            low = group.forward(normal, output[:, :width])
        projected.append(output)
        low_rank.append(low)
    if block.gelu_products is None:
        ops.gelu(_parts(block, projected)[1], after_gelu)
    return projected, low_rank


def _normal(norm: Norm, group: SharedInput, hidden: Tensor) -> Tensor:
    """``[T, H + R]``, of which the first H are the norm's output."""
    normal = hidden.new_empty(hidden.shape[0], group.features + group.columns)
    norm(hidden, normal[:, : group.features])
    return normal


def _project_h_to_4h(block: Block, adapters: Sequence[Tensor | None], hidden: Tensor) -> Tensor:
    """What of `_enter` is dearest to keep: h_to_4h's output ``[T, F]`` alone."""
    pair = (adapters[2], adapters[3])
    group = SharedInput([block.dense_h_to_4h], [pair], block.workspace)
    output = hidden.new_empty(hidden.shape[0], group.width)
    group.forward(_normal(block.norms[-1], group, hidden), output)
    return output


def _attend(
    block: Block, attention: Attention, fused: Tensor, cosine: Tensor, sine: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Rotates within `fused` ``[T, W]``; attention's output ``[T, Q, D]`` and statistics."""
    heads = block.heads(fused)
    ops.rotate_(heads[:, :, :-1], cosine, sine)
    return attention.forward(*_query_key_value(heads))


def _leave_backward(
    block: Block,
    out_of: SharedOutput,
    grad: Tensor,
    before_gelu: Tensor,
    attended: Tensor,
    low_out: Tensor,
    of_before_gelu: Tensor,
) -> tuple[Tensor, list[Tensor | None]]:
    """Back to attention's output ``[T, Q D]`` and, into `of_before_gelu`, to h_to_4h's output ``[T, F]``."""
    split = block.dense_4h_to_h.in_features
    if block.gelu_products is not None:
        extended, weight, low_grad = out_of.gradient_operands(grad)
        after_gelu = grad.new_empty(grad.shape[0], split)
        block.gelu_products.backward(extended, weight[:, :split], before_gelu, of_before_gelu, after_gelu)
        of_attended = torch.mm(extended, weight[:, split:])
        del extended
    else:
        of_joined, low_grad = out_of.input_gradient(grad)
        _, after_gelu = ops.gelu_backward(of_joined[:, :split], before_gelu, of_before_gelu)
        of_attended = of_joined[:, split:]
    inputs = [after_gelu, attended.flatten(1)]
    return of_attended, out_of.adapter_gradients(grad, low_grad, low_out, inputs)


def _enter_backward(
    block: Block,
    into: Sequence[SharedInput],
    hidden: Tensor,
    grads: Sequence[Tensor],
    low_rank: Sequence[Tensor],
    addend: Tensor,
    out: Tensor | None,
) -> list[Tensor | None]:
    """Back through products and norms: `addend` and what comes through them, into `out` where given."""
    adapter_grads: list[Tensor | None] = []
    for norm, group, grad, low in zip(block.norms, into, grads, low_rank, strict=True):
        normal, mean, rstd = norm(hidden)
        adapter_grads += group.adapter_gradients(grad, low, normal)
        del normal
        if out is not None:
            of_normal = group.input_gradient(grad)
            addend = ops.layer_norm_backward(of_normal, hidden, mean, rstd, norm.weight, addend, out)
            del of_normal
    return adapter_grads


def _take(tensors: list[Tensor], count: int) -> list[Tensor]:
    """Remove and return the first `count`."""
    taken = tensors[:count]
    del tensors[:count]
    return taken


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
