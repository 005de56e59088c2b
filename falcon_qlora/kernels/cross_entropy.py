"""Cross entropy of an output head without keeping the logits.

Shapes: N target tokens, H hidden size, V vocabulary.

With a vocabulary of 65,024 the float32 logits of 16,384 tokens take 4 GiB, and their gradient as much again.
Here at most `chunk_tokens` rows of them exist at a time: the gradient for the hidden states is taken in the
forward pass, while a chunk's logits are there, so nothing is multiplied twice. Their gradient takes their
memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from falcon_qlora.kernels import ops

DEFAULT_CHUNK_TOKENS = 1024
_LEAST_CHUNK_TOKENS, _CHUNKS = 128, 8


def default_chunk_tokens(tokens: int) -> int:
    """How many rows of logits exist at a time, of `tokens` in all.

    An eighth, so that a small batch's logits take no more than a block's backward does: at 10 bytes each,
    1,024 rows are 0.67 GB.
    """
    return min(max(_LEAST_CHUNK_TOKENS, -(-tokens // _CHUNKS)), DEFAULT_CHUNK_TOKENS)


def cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What `chunked_cross_entropy` computes, in plain PyTorch.

    Args:
        hidden: ``[N, H]``.
        weight: ``[V, H]``.
        targets: int64 ``[N]``.

    Returns:
        float32 scalar: the sum of the N cross entropies.
    """
    hidden, weight = _in_one_dtype(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_tokens: int | None = None
) -> Tensor:
    """Sum of the cross entropies of `targets` under the logits ``hidden @ weight.T``.

    The product runs in the weight's dtype (under autocast in autocast's), softmax and loss in float32.

    Args:
        hidden: ``[N, H]``; N may be 0.
        weight: ``[V, H]``; gets a gradient where it requires one.
        targets: int64 ``[N]``, each in ``[0, V)``.
        chunk_tokens: how many rows of logits exist at a time; None for `default_chunk_tokens`.

    Returns:
        float32 scalar, connected to `hidden` and `weight`.
    """
    hidden, weight = _in_one_dtype(hidden, weight)
    chunk_tokens = chunk_tokens or default_chunk_tokens(len(hidden))
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, chunk_tokens)


def _in_one_dtype(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    device_type = hidden.device.type
    in_autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if in_autocast else weight.dtype
    return hidden.to(dtype), weight.to(dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None  # [N, H]
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None  # [V, H]
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                logits = hidden[rows] @ weight.T  # [chunk, V]
                with_gradient = grad_hidden is not None or grad_weight is not None
                loss += ops.cross_entropy_(logits, targets[rows], with_gradient).sum()
                if grad_hidden is not None:
                    torch.mm(logits, weight, out=grad_hidden[rows])
                if grad_weight is not None:
                    grad_weight += logits.T @ hidden[rows]
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_output
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_output).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None
