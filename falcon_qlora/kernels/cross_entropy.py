"""Cross entropy of an output head without keeping the logits.

With a vocabulary of 65,024 the float32 logits of 16,384 tokens take 4 GiB, and their gradient as much again.
Here at most `LOGIT_TOKENS` rows of them exist at a time. The gradient for the hidden states is computed in
the forward pass, from a chunk's logits while they exist, so no product runs twice. The logits' gradient
overwrites them.

With trained rows, the logits of those tokens are computed once more, from the trained values.

With learned vectors, the logits are ``s (hidden @ weight.T + b)``: a chunk's products are kept beside them
until the vectors' gradients are summed up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from falcon_qlora.kernels import ops
from falcon_qlora.kernels.chunks import LOGIT_TOKENS
from falcon_qlora.kernels.scale_shift import scale_backward, scale_shift


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vectors: tuple[Tensor, Tensor] | None = None,
    rows: tuple[Tensor, Tensor] | None = None,
    vocabulary: int | None = None,
    scale: float = 1.0,
    chunk_tokens: int = LOGIT_TOKENS,
) -> Tensor:
    """Sum of the cross entropies of `targets` under the logits ``scale * hidden @ weight.T``.

    The product runs in the weight's dtype, or autocast's if active; softmax and loss in float32.

    Args:
        hidden: ``[N, H]``; N may be 0.
        weight: ``[V, H]``; gets a gradient if it requires one. More rows may follow, see `vocabulary`.
        targets: int64 ``[N]``, each in ``[0, V)``.
        vectors: scale and bias of the logits, float32 ``[V]`` each, or None.
        rows: indices of rows to replace, int64 ``[n]``, and their values, float32 ``[n, H]``; or None. The
            values multiply in the weight's dtype.
        vocabulary: V where `weight` is padded with rows of zeros to a width that is fast on GPUs; None if all
            rows are tokens'.
        scale: of the logits, in float32; not together with `vectors`.
        chunk_tokens: rows of logits that exist at a time.

    Returns:
        float32 scalar, connected to `hidden`, `weight`, `vectors` and `rows`.
    """
    device_type = hidden.device.type
    in_autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if in_autocast else weight.dtype
    assert vectors is None or (scale == 1 and vocabulary in (None, len(weight)))
    learned, bias = vectors or (None, None)
    places, values = rows or (None, None)
    return _ChunkedCrossEntropy.apply(
        hidden.to(dtype),
        weight.to(dtype),
        targets,
        learned,
        bias,
        places,
        values,
        vocabulary,
        scale,
        chunk_tokens,
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        places: Tensor | None,
        values: Tensor | None,
        vocabulary: int | None,
        multiplier: float,
        chunk_tokens: int,
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        with_gradient = any(ctx.needs_input_grad)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None  # [N, H]
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None  # [V, H]
        sums = None if scale is None else torch.zeros(2, *scale.shape, device=hidden.device)  # [2, V]
        own = None if values is None else values.to(weight.dtype)  # [n, H]
        grad_values = torch.zeros_like(values) if values is not None and with_gradient else None  # [n, H]
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                logits = product = hidden[rows] @ weight.T  # [chunk, V]
                if own is not None and places is not None:
                    product.index_copy_(1, places, hidden[rows] @ own.T)
                if scale is not None and bias is not None:
                    logits = scale_shift(product, scale, bias, torch.empty_like(product))
                # What comes of the rows of zeros behind stays 0.
                tokens = logits[:, :vocabulary]
                loss += ops.cross_entropy_(tokens, targets[rows], with_gradient, multiplier).sum()
                if sums is not None and scale is not None and with_gradient:
                    sums += scale_backward(logits, product, scale, logits, through_gelu=False)
                del product
                grad_own = None
                if grad_values is not None and places is not None:
                    grad_own = logits.index_select(1, places)  # [chunk, n]
                    logits.index_fill_(1, places, 0.0)  # the rest is the frozen rows'
                    grad_values += grad_own.float().T @ hidden[rows].float()
                if grad_hidden is not None:
                    torch.mm(logits, weight, out=grad_hidden[rows])
                    if grad_own is not None and own is not None:
                        grad_hidden[rows].addmm_(grad_own, own)
                if grad_weight is not None:
                    grad_weight += logits.T @ hidden[rows]
        ctx.weight_dtype = weight.dtype
        grad_scale = grad_bias = None
        if sums is not None and scale is not None and bias is not None:
            grad_scale, grad_bias = torch.addcmul(sums[0], bias, sums[1]), scale * sums[1]
        ctx.save_for_backward(grad_hidden, grad_weight, grad_scale, grad_bias, grad_values)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight, *others = ctx.saved_tensors
        grad_hidden, grad_scale, grad_bias, grad_values = (
            None if grad is None else grad * grad_output for grad in (of_hidden, *others)
        )
        grad_weight = None
        if of_weight is not None:  # rounded at once: a second float32 tensor would be as large as the sum
            grad_weight = torch.empty_like(of_weight, dtype=ctx.weight_dtype)
            torch.mul(of_weight, grad_output, out=grad_weight)
        return grad_hidden, grad_weight, None, grad_scale, grad_bias, None, grad_values, None, None, None
