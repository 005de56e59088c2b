"""What LoRA adds to a matrix, and what its dropout leaves out of one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

HASH_BITS = 32  # of what decides on a value
_SEED = 2**31  # seeds below it stay whole numbers of 32 bits to a kernel


class LowRank(NamedTuple):
    """What LoRA adds to a matrix ``[T, C]``: ``left @ right``, ``[T, R]`` and ``[R, C]`` of any strides."""

    left: Tensor
    right: Tensor


class Dropout(NamedTuple):
    """Which values of a matrix are left out.

    Attributes:
        p: the probability, at least 0 and below 1; the others are divided by 1 - p.
        low: half of the seed, from 2 on, as Triton compiles a kernel of its own for 1.
        high: its other half.
    """

    p: float
    low: int
    high: int

    @staticmethod
    def draw(p: float) -> Dropout:
        """With a seed from PyTorch's generator on the CPU, whose state checkpoints keep."""
        low, high = torch.randint(2, _SEED, (2,)).tolist()
        return Dropout(p, low, high)

    @property
    def threshold(self) -> int:
        """Hashes below it are left out."""
        return min(round(self.p * 2**HASH_BITS), 2**HASH_BITS - 1)


NO_DROPOUT = Dropout(0.0, 2, 2)
