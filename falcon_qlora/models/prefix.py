"""A learned prefix that a block's attention also looks at, gated per head (LLaMA-Adapter).

Shapes: T tokens (of all rows or documents), P prefix rows, Q query heads, G key/value heads, D head size.

The prefix goes through the block's own projections without a norm, and its keys are not rotated. Every token
attends to all P rows in a separate softmax, whatever its place in its document. So packed documents, padded
batches and a single token with a cache need no different treatment. The result, times a gate per head, is
added to the attention's output before the output projection.

The prefix hooks into the modules that every path through the reference block calls: the projection that gives
the queries, and the output projection. So neither the packed forward nor Transformers' own needs to know of
it. Fast blocks do not call these modules, and compute the same in `kernels.prefix`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from falcon_qlora.models.layouts import layout_of
from falcon_qlora.models.layouts.base import PREFIX
from falcon_qlora.models.packed_attention import one_for_each_query_head, rotate


class PrefixAttention(nn.Module):
    """One block's trainable prefix and gates, and what they add to attention.

    Args:
        rows: float32 ``[P, hidden]``, the initial prefix.
        heads: Q.

    Attributes:
        prefix: float32 ``[P, hidden]``.
        gate: float32 ``[Q]``, zero at the start, when nothing is added.
        enabled: whether anything is added.
    """

    def __init__(self, rows: Tensor, heads: int):
        super().__init__()
        self.prefix = nn.Parameter(rows)
        self.gate = nn.Parameter(torch.zeros(heads, device=rows.device))
        self.enabled = True
        # State of the current call.
        self._rotation: tuple[Tensor, Tensor] | None = None
        self._query: Tensor | None = None
        self._projecting = False

    def forward(self, attention_output: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Add what the queries read from the prefix.

        Args:
            attention_output: ``[T, Q, D]``.
            query: ``[T, Q, D]``, rotated where the layout rotates.
            key: ``[P, G, D]``, of the prefix.
            value: ``[P, G, D]``, of the prefix.

        Returns:
            ``[T, Q, D]``, in the dtype of `attention_output`.
        """
        heads = query.shape[1]
        key, value = one_for_each_query_head(key, heads), one_for_each_query_head(value, heads)
        query, key, value = (each.transpose(0, 1)[None] for each in (query, key, value))
        read = F.scaled_dot_product_attention(query, key, value)[0].transpose(0, 1)
        # In float32 and rounded once: a gate rounded to bfloat16 would move in steps.
        with torch.autocast(read.device.type, enabled=False):
            added = torch.addcmul(attention_output, read, self.gate[:, None])
        return added.to(attention_output.dtype)

    def _begin(self, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._rotation = None if kwargs.get("alibi") is not None else kwargs["position_embeddings"]

    def _keep_query(self, linear: nn.Module, args: tuple[Any, ...], projected: Tensor) -> None:
        if self.enabled and not self._projecting:
            self._query = projected

    def _add(self, linear: nn.Module, args: tuple[Tensor, ...], attention: Any) -> tuple[Tensor, ...] | None:
        if self._query is None:
            return None
        projected, self._query = self._query, None
        query = layout_of(attention.config).split(attention, projected.flatten(0, 1))[0]
        if self._rotation is not None:
            shape = (*projected.shape[:2], attention.head_dim)
            cosine, sine = (each.expand(shape).reshape(-1, 1, shape[-1]) for each in self._rotation)
            query = rotate(query, cosine, sine)
            self._rotation = None
        key, value = self._keys_and_values(attention, projected.dtype)
        output = args[0]
        query, key, value = (each.to(output.dtype) for each in (query, key, value))
        together = self(output.reshape(query.shape), query, key, value)
        return (together.reshape(output.shape),)

    def _keys_and_values(self, attention: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # Computed in every call: cached from one without gradients, they would give the prefix none.
        self._projecting = True
        try:
            _, key, value = layout_of(attention.config).heads(attention, self.prefix.to(dtype)[None])
        finally:
            self._projecting = False
        return key, value


def add_prefix(attention: Any, rows: Tensor) -> PrefixAttention:
    """Let a block's attention look at a prefix.

    Args:
        attention: of a block whose linears will not be replaced any more.
        rows: float32 ``[P, hidden]``, the initial prefix, on the attention's device.
    """
    layout = layout_of(attention.config)
    prefix = PrefixAttention(rows, attention.config.num_attention_heads)
    setattr(attention, PREFIX, prefix)
    attention.register_forward_pre_hook(prefix._begin, with_kwargs=True)
    getattr(attention, layout.query_projection).register_forward_hook(prefix._keep_query)
    output = getattr(attention, layout.output_projection)
    output.register_forward_pre_hook(partial(prefix._add, attention=attention))
    return prefix


def prefix_of(attention: nn.Module) -> PrefixAttention | None:
    """The prefix that an attention looks at, or None."""
    return getattr(attention, PREFIX, None)


def prefixes(model: nn.Module) -> list[PrefixAttention]:
    """The prefixes of a model's blocks, in order."""
    return [module for module in model.modules() if isinstance(module, PrefixAttention)]
