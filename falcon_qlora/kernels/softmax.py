"""Cross entropy of rows of logits, and its gradient in-place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 8192
_WARPS = 8


def cross_entropy_(logits: Tensor, targets: Tensor, with_gradient: bool, scale: float = 1.0) -> Tensor:
    """`ops.cross_entropy_` in two passes over each row, for any row stride."""
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    if logits.shape[0]:
        _cross_entropy[(logits.shape[0],)](
            logits, targets, losses, logits.stride(0), logits.shape[1], float(scale), GRADIENT=with_gradient,
            BLOCK=min(_BLOCK, triton.next_power_of_2(logits.shape[1])), num_warps=_WARPS,
        )  # fmt: skip
    return losses


@triton.jit
def _cross_entropy(
    logits_ptr,  # [N, V]
    targets_ptr,  # [N]
    losses_ptr,  # [N]
    row_stride,
    vocabulary,
    scale,  # of the logits
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    places = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        inside = start + places < vocabulary
        x = tl.load(logits_ptr + start + places, mask=inside, other=float("-inf")).to(tl.float32)
        x = tl.where(inside, scale * x, float("-inf"))
        larger = tl.maximum(largest, x)
        # A lane that has seen no logit yet: avoids -inf - -inf.
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(largest - shift) + tl.exp(x - shift)
        largest = larger
    top = tl.max(largest, 0)
    log_normalizer = top + tl.log(tl.sum(total * tl.exp(largest - top), 0))
    of_target = scale * tl.load(logits_ptr + target).to(tl.float32)
    tl.store(losses_ptr + row, log_normalizer - of_target)
    if GRADIENT:
        tl.debug_barrier()  # all threads read the target's logit before one overwrites it
        for start in range(0, vocabulary, BLOCK):
            inside = start + places < vocabulary
            x = tl.load(logits_ptr + start + places, mask=inside, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(scale * x - log_normalizer) - tl.where(start + places == target, 1.0, 0.0)
            tl.store(
                logits_ptr + start + places, (scale * gradient).to(logits_ptr.dtype.element_ty), mask=inside
            )
