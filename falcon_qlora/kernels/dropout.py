"""Dropout of LoRA's input without a mask in memory: a hash of index and seed decides what is kept.

The backward pass computes the hash again. A value's index in its matrix goes through two rounds of
MurmurHash3's 32-bit finalizer, one for each half of the seed. The value is dropped if the hash is below p of
its range.
"""

from __future__ import annotations

import torch
from torch import Tensor

from falcon_qlora.kernels import ops
from falcon_qlora.kernels.low_rank import HASH_BITS, NO_DROPOUT, Dropout


@ops.or_triton("dropout_triton")
def dropped(x: Tensor, dropout: Dropout) -> Tensor:
    """A copy of ``[T, C]``, of any row stride, with dropout."""
    return (x.float() * _factors(x, dropout)).to(x.dtype)


@ops.or_triton("dropout_triton")
def add_dropped(x: Tensor, left: Tensor, right: Tensor, dropout: Dropout | None) -> Tensor:
    """Add ``left @ right`` to `x` in-place where `dropped` keeps a value, with its factor.

    Args:
        x: ``[T, C]``, any row stride.
        left: ``[T, R]``, likewise.
        right: ``[R, C]``, in the dtype of `left`.
        dropout: None drops nothing.

    Returns:
        `x`.
    """
    return x.copy_(x.float() + _factors(x, dropout or NO_DROPOUT) * (left.float() @ right.float()))


def _factors(x: Tensor, dropout: Dropout) -> Tensor:
    """float32 ``[T, C]``: 0 where a value is dropped, else 1 / (1 - p)."""
    places = torch.arange(x.numel(), device=x.device).view(x.shape)
    kept = _mixed(_mixed(places ^ dropout.low) ^ dropout.high) >= dropout.threshold
    return kept.float() / (1.0 - dropout.p)


def _mixed(h: Tensor) -> Tensor:
    """MurmurHash3's finalizer of 32-bit numbers, held in int64."""
    mask = 2**HASH_BITS - 1
    h = h & mask
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & mask
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & mask
    return h ^ (h >> 16)
