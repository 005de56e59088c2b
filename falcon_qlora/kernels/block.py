"""A whole Falcon block with frozen weights and an adapter, forward and backward, as one autograd function.

The block is parallel: ``y = x + dense(attention(n1)) + 4h_to_h(gelu(h_to_4h(n2)))``, where n1 and n2 are two
norms of x or the same one.

`Block.products` decides how the linears are multiplied: `dequantized` and `fp8_block` with LoRA, or
`scaled_products` with learned scales and biases and trained norms. `Attention` decides what attention sees.

Kept for the backward pass: x, the outputs of query_key_value (rotated) and h_to_4h, attention's output and
statistics, and LoRA's t; less if `Block.keep` says so. Norms and GELU are always recomputed. The last product
is not: no gradient needs its output, except with learned scales, where it takes the place of t. Weights are
dequantized again too, unless they are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from falcon_qlora.kernels import ops
from falcon_qlora.kernels.frozen_linear import Adapter, Projection
from falcon_qlora.kernels.workspace import Workspace


class Attention(Protocol):
    """Attention within documents, forward and backward.

    Attributes:
        tensors: its own tensors that get gradients.
    """

    @property
    def tensors(self) -> tuple[Tensor, ...]: ...

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """``[T, Q, D]``, ``[T, G, D]``, ``[T, G, D]`` → what else `output` and `backward` need."""

    def output(self, query: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        """``[T, Q, D]``, from the queries ``[T, G, Q/G, D]`` and the result of `forward`."""

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, kept: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
        """The gradients of query, key and value, and those of `tensors`."""


class Products(Protocol):
    """One call's products: a block's four linears with their adapters, and the norms and GELU between them.

    Attributes:
        outputs: number of tensors that hold the outputs of query_key_value and h_to_4h.
        inputs: number of tensors that hold their LoRA's t.
    """

    outputs: int
    inputs: int

    def enter(self, hidden: Tensor, again: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """From the block's input ``[T, H]`` to the outputs, and t; both of h_to_4h ``[N, ...]`` with `rows`.

        `again`: a recomputation in the backward pass, where gradients may overwrite the outputs.
        """

    def parts(self, projected: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Views of the outputs: query, key and value ``[T, W]``, and GELU's input ``[T, F]``."""

    def project_h_to_4h(self, hidden: Tensor) -> Tensor:
        """The second of `parts` alone, the largest output of `enter`."""

    def leave(
        self, before_gelu: Tensor, attended: Tensor, low_in: Sequence[Tensor], hidden: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Through GELU, dense and 4h_to_h: the block's output ``[T, H]``, and t ``[T, R]``."""

    def low_rank(
        self, before_gelu: Tensor, attended: Callable[[], Tensor], low_in: Sequence[Tensor]
    ) -> Tensor:
        """The t of `leave` alone; `attended` gives attention's output."""

    def leave_backward(
        self,
        grad: Tensor,
        before_gelu: Tensor,
        attended: Callable[[], Tensor],
        low_in: Sequence[Tensor],
        low_out: Tensor,
    ) -> tuple[Tensor, Tensor, Any, list[Tensor | None]]:
        """Back through `leave`; `attended` gives attention's output, which only some gradients need.

        Returns:
            the gradient of attention's output ``[T, Q D]``; an empty tensor for that of query, key and value
            ``[T, W]``; what else `enter_backward` needs; the gradients of the adapters.

        With ``Block.rows`` arguments and results have N rows but those of query, key and value.
        """

    def enter_backward(
        self,
        hidden: Tensor,
        of_fused: Tensor,
        others: Any,
        low_in: Sequence[Tensor],
        addend: Tensor | None,
        fused: Callable[[], Tensor],
    ) -> tuple[Tensor | None, list[Tensor | None], list[Tensor]]:
        """Back through `enter`.

        Args:
            fused: gives query_key_value's output ``[T, W]`` as before rotation. Call it only if the gradient
                was not written over that output.

        Returns:
            `addend` plus the input's gradient, or None if `addend` is; the gradients of the adapters; those
            of the norms if these are trained.
        """


Keep = Literal["all", "attention", "input"]


@dataclass(frozen=True, eq=False)
class Norm:
    """A layer norm: weight ``[H]`` and bias ``[H]``."""

    weight: Tensor
    bias: Tensor
    eps: float


def normalize(
    x: Tensor, norms: Sequence[Norm], outs: Sequence[Tensor | None] = (None, None)
) -> tuple[list[Tensor], Tensor, Tensor]:
    """`ops.layer_norms` of a block's norms, which have one eps."""
    return ops.layer_norms(x, [(norm.weight, norm.bias) for norm in norms], norms[0].eps, outs)


@dataclass(frozen=True, eq=False)
class Block:
    """The frozen part of a block, for `run_block`.

    Attributes:
        norms: one, or attention's and the feed-forward's.
        query_key_value: G groups, each of query heads, a key head and a value head.
        dense_h_to_4h: before GELU.
        dense_4h_to_h: after GELU.
        dense: after attention.
        kv_heads: G.
        head_dim: D.
        workspace: shared by all blocks of a model.
        products: makes the products of one call from the block and the adapters' matrices.
        keep: what is kept for the backward pass: all it needs; all but h_to_4h's output, the largest; or only
            the block's input. The rest is recomputed.
        rows: int64 ``[N]``, the tokens whose output is wanted, each once: attention is computed of all, dense
            and the feed-forward layer of these. None: all tokens.
    """

    norms: tuple[Norm, ...]
    query_key_value: Projection
    dense_h_to_4h: Projection
    dense_4h_to_h: Projection
    dense: Projection
    kv_heads: int
    head_dim: int
    workspace: Workspace
    products: Callable[[Block, Sequence[Adapter]], Products]
    keep: Keep = "all"
    rows: Tensor | None = None

    @property
    def projections(self) -> tuple[Projection, Projection, Projection, Projection]:
        """In the order of `run_block`'s adapters."""
        return self.query_key_value, self.dense_h_to_4h, self.dense_4h_to_h, self.dense

    def heads(self, fused: Tensor) -> Tensor:
        """``[T, W]`` → ``[T, G, Q/G + 2, D]``, a view."""
        return fused.unflatten(1, (self.kv_heads, -1, self.head_dim))

    def wanted(self, x: Tensor) -> Tensor:
        """``[T, ...]`` → ``[N, ...]``, those of `rows`."""
        return x if self.rows is None else x.index_select(0, self.rows)

    def counts(self, hidden: Tensor) -> tuple[int, int]:
        """T and N: the tokens that query_key_value reads, and those that h_to_4h does."""
        return len(hidden), len(hidden) if self.rows is None else len(self.rows)

    def normalize(
        self, hidden: Tensor, outs: Sequence[Tensor | None] = (None, None)
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """The inputs of query_key_value and h_to_4h, one if they share it; and all tokens' statistics."""
        if self.rows is None:
            return normalize(hidden, self.norms, outs)
        of_all, mean, rstd = normalize(hidden, self.norms[:1], outs)
        of_wanted, _, _ = normalize(self.wanted(hidden), self.norms[-1:], outs[1:])
        return of_all + of_wanted, mean, rstd

    def normalize_backward(
        self,
        hidden: Tensor,
        of_normals: Sequence[Tensor],
        statistics: Sequence[Tensor],
        addend: Tensor,
        out: Tensor | None = None,
    ) -> Tensor:
        """`addend` plus the gradient of `hidden`, from those of what `normalize` gave."""
        grads = [*of_normals[:-1], self.spread(of_normals[-1], len(hidden))]
        mean, rstd = statistics
        weights = [self.norms[0].weight, self.norms[-1].weight][: len(grads)]
        return ops.layer_norms_backward(hidden, grads, mean, rstd, weights, addend, out)

    def spread(self, x: Tensor, tokens: int) -> Tensor:
        """``[N, C]`` → ``[T, C]``, with zeros elsewhere."""
        return x if self.rows is None else x.new_zeros(tokens, x.shape[1]).index_copy_(0, self.rows, x)


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
        cosine: ``[T, D]``, of the rotary embedding.
        sine: ``[T, D]``, likewise.
        block: the frozen part.
        attention: within documents.
        adapters: LoRA's A and B for each of ``block.projections``, (None, None) without LoRA; or the pairs
            that ``block.products`` takes instead: for the projections, then any for the norms.

    Returns:
        ``[T, H]``, or ``[N, H]`` of ``block.rows``, connected to `hidden`, the adapters and attention's own
        tensors.
    """
    flat = [matrix for adapter in adapters for matrix in adapter]
    return _BlockFunction.apply(hidden, cosine, sine, block, attention, *flat, *attention.tensors)


class _BlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        cosine: Tensor,
        sine: Tensor,
        block: Block,
        attention: Attention,
        *trained: Tensor | None,
    ) -> Tensor:
        adapters = trained[: len(trained) - len(attention.tensors)]
        with torch.autocast(hidden.device.type, enabled=False):
            products = block.products(block, _pairs(adapters))
            projected, low_in = products.enter(hidden)
            fused, before_gelu = products.parts(projected)
            of_attention = _attend(block, attention, fused, cosine, sine)
            attended = _attended(block, attention, fused, of_attention)
            output, low_out = products.leave(before_gelu, attended, low_in, block.wanted(hidden))
            if block.keep == "all":
                kept = [*projected, *low_in, low_out, *of_attention]
            elif block.keep == "attention":
                kept = [fused.clone(), *low_in, low_out, *of_attention]
            else:
                kept = []
        ctx.block, ctx.attention, ctx.adapters = block, attention, len(adapters)
        ctx.save_for_backward(hidden, cosine, sine, *adapters, *kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        block, attention = ctx.block, ctx.attention
        hidden, cosine, sine, *rest = ctx.saved_tensors
        adapters, kept = rest[: ctx.adapters], list(rest[ctx.adapters :])
        del rest
        with torch.autocast(hidden.device.type, enabled=False):
            products = block.products(block, _pairs(adapters))
            if block.keep == "input":
                projected, low_in = products.enter(hidden, again=True)
                fused, before_gelu = products.parts(projected)
                of_attention = _attend(block, attention, fused, cosine, sine)
            else:
                projected = _take(kept, products.outputs if block.keep == "all" else 1)
                low_in, (low_out,) = _take(kept, products.inputs), _take(kept, 1)
                of_attention = tuple(kept)
                if block.keep == "all":
                    fused, before_gelu = products.parts(projected)
                else:
                    fused, before_gelu = projected[0], products.project_h_to_4h(hidden)
            attended = partial(_attended, block, attention, fused, of_attention)
            if block.keep == "input":
                low_out = products.low_rank(before_gelu, attended, low_in)
            of_attended, of_fused, others, out_grads = products.leave_backward(
                grad, before_gelu, attended, low_in, low_out
            )
            del before_gelu, projected, attended
            (of_query, of_key, of_value), own_grads = attention.backward(
                block.spread(of_attended, len(hidden)).unflatten(1, (-1, block.head_dim)),
                *_query_key_value(block.heads(fused)),
                of_attention,
            )
            del of_attended, of_attention, kept
            ops.rotate_join(of_query, of_key, of_value, cosine, sine, block.heads(of_fused))
            del of_query, of_key, of_value
            addend = block.spread(grad, len(hidden)) if ctx.needs_input_grad[0] else None
            of_hidden, in_grads, norm_grads = products.enter_backward(
                hidden, of_fused, others, low_in, addend, partial(_rotated_back, block, fused, cosine, sine)
            )
        return (of_hidden, None, None, None, None, *in_grads, *out_grads, *norm_grads, *own_grads)


def _attend(
    block: Block, attention: Attention, fused: Tensor, cosine: Tensor, sine: Tensor
) -> tuple[Tensor, ...]:
    """Rotate `fused` ``[T, W]`` in-place; returns the result of attention's forward pass."""
    heads = block.heads(fused)
    ops.rotate_(heads[:, :, :-1], cosine, sine)
    return attention.forward(*_query_key_value(heads))


def _attended(block: Block, attention: Attention, fused: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
    """Attention's output, from `_attend`'s result."""
    return block.wanted(attention.output(block.heads(fused)[:, :, :-2], kept))


def _rotated_back(block: Block, fused: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """A copy of `fused` ``[T, W]`` with `_attend`'s rotation undone."""
    found = fused.new_empty(fused.shape)
    ops.rotate_join(*_query_key_value(block.heads(fused)), cosine, sine, block.heads(found))
    return found


def _take(tensors: list[Tensor], count: int) -> list[Tensor]:
    """Remove and return the first `count`."""
    taken = tensors[:count]
    del tensors[:count]
    return taken


def _query_key_value(heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views, except that with several groups the query is a copy."""
    return heads[:, :, :-2].flatten(1, 2), heads[:, :, -2], heads[:, :, -1]


def _pairs(flat: Sequence[Tensor | None]) -> list[Adapter]:
    return list(zip(flat[::2], flat[1::2], strict=True))
