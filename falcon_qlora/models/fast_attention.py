"""Attention within documents as the fast blocks call it: forward and backward apart, with what lies between.

Shapes: T tokens of all documents, Q query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from falcon_qlora.kernels import flash_attention
from falcon_qlora.models.attention import Sequences, _takes_varlen, packed_attention

AttentionKernel = Literal["FlashAttention-4", "variable-length kernel", "padded batches"]


def choose_attention(
    device: torch.device, dtype: torch.dtype, head_dim: int, *, libraries: bool
) -> AttentionKernel:
    """The fastest kernel there is.

    Args:
        device: of the model.
        dtype: of the activations.
        head_dim: D.
        libraries: whether optional libraries are used.
    """
    if not _takes_varlen(device, dtype, head_dim, 0.0):
        return "padded batches"
    # On an H200 its gradients were wrong for heads of 8 and 16; Falcon's have 64 or 128.
    if libraries and head_dim in (64, 128) and flash_attention.flash_attention_4() is not None:
        return "FlashAttention-4"
    return "variable-length kernel"


@dataclass(frozen=True, eq=False)
class PackedAttention:
    """Causal attention within documents, forward and backward.

    PyTorch's variable-length kernel is called as `varlen_attn` does; with padded batches attention is
    computed again in the backward pass.
    """

    sequences: Sequences
    kernel: AttentionKernel

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        starts, longest = self.sequences.cu_seqlens, self.sequences.max_length
        if self.kernel == "FlashAttention-4":
            output, log_sum_exp = flash_attention.forward(query, key, value, starts, longest)
            return output, (log_sum_exp,)
        if self.kernel == "variable-length kernel":
            output, log_sum_exp, state, unused, _ = torch.ops.aten._flash_attention_forward(
                query, key, value, starts, starts, longest, longest, 0.0, True, False, **_window(query)
            )
            return output, (log_sum_exp, state, unused)
        return packed_attention(query, key, value, self.sequences), ()

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        statistics: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        starts, longest = self.sequences.cu_seqlens, self.sequences.max_length
        if self.kernel == "FlashAttention-4":
            return flash_attention.backward(grad, query, key, value, output, statistics[0], starts, longest)
        if self.kernel == "variable-length kernel":
            log_sum_exp, *state = statistics
            inputs = (grad, query, key, value, output, log_sum_exp)
            return torch.ops.aten._flash_attention_backward(
                *inputs, starts, starts, longest, longest, 0.0, True, *state, **_window(query)
            )
        query, key, value = (tensor.detach().requires_grad_() for tensor in (query, key, value))
        with torch.enable_grad():
            again = packed_attention(query, key, value, self.sequences)
        of_query, of_key, of_value = torch.autograd.grad(again, (query, key, value), grad)
        return of_query, of_key, of_value


def _window(query: Tensor) -> dict[str, Any]:
    return {
        "scale": 1.0 / math.sqrt(query.shape[-1]),
        "window_size_left": -1,
        "window_size_right": 0,
    }
