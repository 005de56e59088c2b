"""Linears scaled and shifted by learned vectors (LLaMA-Adapter v2): ``scale * (Wx + b + bias)``.

The vectors are attached to their linear, which stays as it is: quantized, tied, and under the same name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from falcon_qlora.kernels.cross_entropy import chunked_cross_entropy
from falcon_qlora.models.token_rows import frozen_weight, padded, rows_of

SCALE_AND_BIAS = "scale_and_bias"


class ScaleAndBias(nn.Module):
    """The trainable vectors of one linear.

    Args:
        features: outputs of the linear.
        device: of the linear.

    Attributes:
        scale: float32 ``[features]``, one at the start.
        bias: float32 ``[features]``, zero at the start.
        enabled: whether they act.
    """

    def __init__(self, features: int, device: torch.device):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(features, device=device))
        self.bias = nn.Parameter(torch.zeros(features, device=device))
        self.enabled = True

    def forward(self, output: Tensor) -> Tensor:
        """Scale and shift a linear's output ``[..., features]``, in its dtype."""
        if not self.enabled:
            return output
        # In float32 and rounded once; the output itself is kept for the backward pass as it is.
        with torch.autocast(output.device.type, enabled=False):
            return torch.addcmul(self.scale * self.bias, output, self.scale).to(output.dtype)

    def _on_output(self, linear: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self(output)


def add_scale_and_bias(linear: nn.Linear) -> ScaleAndBias:
    """Let learned vectors scale and shift what `linear` computes."""
    vectors = ScaleAndBias(linear.out_features, linear.weight.device)
    setattr(linear, SCALE_AND_BIAS, vectors)
    linear.register_forward_hook(vectors._on_output)
    return vectors


def scale_and_bias_of(linear: nn.Module) -> ScaleAndBias | None:
    """The vectors that act on a linear's output, or None."""
    return getattr(linear, SCALE_AND_BIAS, None)


def head_loss(hidden: Tensor, head: Any, targets: Tensor, *, scale: float = 1.0) -> Tensor:
    """Sum of the cross entropies of `targets` under the head's logits, few of which exist at a time.

    Args:
        hidden: ``[N, H]``; N may be 0.
        head: the model's output head, with or without learned vectors or rows.
        targets: int64 ``[N]``.
        scale: by which the model multiplies its logits.

    Returns:
        float32 scalar.
    """
    learned = scale_and_bias_of(head)
    vectors = None if learned is None or not learned.enabled else (learned.scale, learned.bias)
    rows, weight = rows_of(head), frozen_weight(head)
    return chunked_cross_entropy(
        hidden,
        padded(weight),
        targets,
        vocabulary=len(weight),
        vectors=vectors,
        rows=None if rows is None else (rows.index, rows.values),
        scale=scale,
    )
