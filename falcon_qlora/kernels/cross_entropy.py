"""Cross entropy of an output head without keeping the logits.

With a vocabulary of 65,024 the float32 logits of 16,384 tokens take 4 GiB, and their gradient as much again.
Here at most `CHUNK_TOKENS` rows of them exist at a time: the gradient for the hidden states is taken in the
forward pass, while a chunk's logits are there, so nothing is multiplied twice. Their gradient takes their
memory.

With learned vectors, the logits are ``s (hidden @ weight.T + b)``: the products of a chunk are kept beside
them until the vectors' gradients are summed up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from falcon_qlora.kernels import ops
from falcon_qlora.kernels.scale_shift import scale_backward, scale_shift

CHUNK_TOKENS = 1024


def logit_rows(tokens: int) -> int:
    """How many rows of logits exist at a time, of `tokens` in all: at 10 bytes a logit, 1,024 are 0.67 GB."""
    return min(tokens, CHUNK_TOKENS)


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vectors: tuple[Tensor, Tensor] | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Sum of the cross entropies of `targets` under the logits ``hidden @ weight.T``.

    The product runs in the weight's dtype (under autocast in autocast's), softmax and loss in float32.

    Args:
        hidden: ``[N, H]``; N may be 0.
        weight: ``[V, H]``; gets a gradient where it requires one.
        targets: int64 ``[N]``, each in ``[0, V)``.
        vectors: scale and bias of the logits, float32 ``[V]`` each, or None.
        chunk_tokens: how many rows of logits exist at a time.

    Returns:
        float32 scalar, connected to `hidden`, `weight` and `vectors`.
    """
    device_type = hidden.device.type
    in_autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if in_autocast else weight.dtype
    scale, bias = vectors or (None, None)
    return _ChunkedCrossEntropy.apply(hidden.to(dtype), weight.to(dtype), targets, scale, bias, chunk_tokens)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        chunk_tokens: int,
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        with_gradient = any(ctx.needs_input_grad)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None  # [N, H]
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None  # [V, H]
        sums = None if scale is None else torch.zeros(2, *scale.shape, device=hidden.device)  # [2, V]
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                logits = product = hidden[rows] @ weight.T  # [chunk, V]
                if scale is not None and bias is not None:
                    logits = scale_shift(product, scale, bias, torch.empty_like(product))
                loss += ops.cross_entropy_(logits, targets[rows], with_gradient).sum()
                if sums is not None and scale is not None and with_gradient:
                    sums += scale_backward(logits, product, scale, logits, through_gelu=False)
                del product
                if grad_hidden is not None:
                    torch.mm(logits, weight, out=grad_hidden[rows])
                if grad_weight is not None:
                    grad_weight += logits.T @ hidden[rows]
        ctx.weight_dtype = weight.dtype
        grad_scale = grad_bias = None
        if sums is not None and scale is not None and bias is not None:
            grad_scale, grad_bias = torch.addcmul(sums[0], bias, sums[1]), scale * sums[1]
        ctx.save_for_backward(grad_hidden, grad_weight, grad_scale, grad_bias)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight, *of_both = ctx.saved_tensors
        grad_hidden, *of_vectors = (
            None if grad is None else grad * grad_output for grad in (of_hidden, *of_both)
        )
        grad_weight = None
        if of_weight is not None:  # rounded on the way: another one in float32 would be as large as the sum
            grad_weight = torch.empty_like(of_weight, dtype=ctx.weight_dtype)
            torch.mul(of_weight, grad_output, out=grad_weight)
        return grad_hidden, grad_weight, None, *of_vectors, None
