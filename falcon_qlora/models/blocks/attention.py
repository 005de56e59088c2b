"""Attention within documents for the fast blocks: separate forward and backward, and what is kept between.

Shapes: the letters of `kernels`, and P rows of a learned prefix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from falcon_qlora.kernels import flash_attention, prefix
from falcon_qlora.models.packed_attention import Sequences, packed_attention

AttentionKernel = Literal["FlashAttention-4", "variable-length kernel", "padded batches"]


@dataclass(frozen=True, eq=False)
class PackedAttention:
    """Causal attention within documents, forward and backward.

    PyTorch's variable-length kernel is called as `varlen_attn` does. With padded batches the backward pass
    recomputes attention.

    Attributes:
        sequences: where the documents lie.
        kernel: what computes it.
        multiplier: of the scores beside 1/sqrt(D), above 0.
    """

    sequences: Sequences
    kernel: AttentionKernel
    multiplier: float = field(default=1.0, kw_only=True)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return ()

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        starts, longest = self.sequences.cu_seqlens, self.sequences.max_length
        if self.kernel == "FlashAttention-4":
            return flash_attention.forward(query, key, value, starts, longest, self._scale(query))
        if self.kernel == "variable-length kernel":
            output, log_sum_exp, state, unused, _ = torch.ops.aten._flash_attention_forward(
                query, key, value, starts, starts, longest, longest, 0.0, True, False, **self._window(query)
            )
            return output, log_sum_exp, state, unused
        return (packed_attention(query, key, value, self.sequences, multiplier=self.multiplier),)

    def output(self, query: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        return kept[0]

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, kept: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
        starts, longest = self.sequences.cu_seqlens, self.sequences.max_length
        if self.kernel == "FlashAttention-4":
            output, log_sum_exp = kept
            inputs = (grad, query, key, value, output, log_sum_exp)
            return flash_attention.backward(*inputs, starts, longest, self._scale(query)), ()
        if self.kernel == "variable-length kernel":
            output, log_sum_exp, *state = kept
            inputs = (grad, query, key, value, output, log_sum_exp)
            return torch.ops.aten._flash_attention_backward(
                *inputs, starts, starts, longest, longest, 0.0, True, *state, **self._window(query)
            ), ()
        query, key, value = (tensor.detach().requires_grad_() for tensor in (query, key, value))
        with torch.enable_grad():
            again = packed_attention(query, key, value, self.sequences, multiplier=self.multiplier)
        of_query, of_key, of_value = torch.autograd.grad(again, (query, key, value), grad)
        return (of_query, of_key, of_value), ()

    def _scale(self, query: Tensor) -> float:
        return self.multiplier / math.sqrt(query.shape[-1])

    def _window(self, query: Tensor) -> dict[str, Any]:
        return {"scale": self._scale(query), "window_size_left": -1, "window_size_right": 0}


@dataclass(frozen=True, eq=False)
class PrefixedAttention(PackedAttention):
    """Attention within documents that also looks at a learned prefix, see `kernels.prefix`.

    The sum is not kept: attention's backward needs only its own output, and the prefix's the queries.

    Attributes:
        key: ``[P, G, D]``, of the prefix, in the dtype of the activations.
        value: ``[P, G, D]``.
        gate: float32 ``[Q]``.
    """

    key: Tensor
    value: Tensor
    gate: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.key, self.value, self.gate

    def output(self, query: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        return prefix.add(query, kept[0], *self.tensors)

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, kept: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
        (of_query, of_key, of_value), _ = super().backward(grad, query, key, value, kept)
        groups = query.unflatten(1, (key.shape[1], -1))
        of_query, *own = prefix.add_backward(grad, groups, self.key, self.value, self.gate, of_query)
        return (of_query, of_key, of_value), tuple(own)
