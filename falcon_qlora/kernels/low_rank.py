"""What LoRA adds to a matrix, and which values its dropout drops."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

HASH_BITS = 32  # of the hash that decides on a value
_SEED = 2**31  # kernels take seeds below it as 32-bit integers


class LowRank(NamedTuple):
    """What LoRA adds to a matrix ``[T, C]``: ``left @ right``, ``[T, R]`` and ``[R, C]`` of any strides."""

    left: Tensor
    right: Tensor


class Dropout(NamedTuple):
    """Which values of a matrix are dropped.

    Attributes:
        p: their probability, at least 0 and below 1; the other values are divided by 1 - p.
        low: half of the seed, at least 2, as Triton compiles a separate kernel for 1.
        high: the other half, likewise.
    """

    p: float
    low: int
    high: int

    @staticmethod
    def draw(p: float) -> Dropout:
        """A dropout with a seed from PyTorch's CPU generator, whose state is in checkpoints."""
        low, high = torch.randint(2, _SEED, (2,)).tolist()
        return Dropout(p, low, high)

    @property
    def threshold(self) -> int:
        """Values whose hash is below it are dropped."""
        return min(round(self.p * 2**HASH_BITS), 2**HASH_BITS - 1)


NO_DROPOUT = Dropout(0.0, 2, 2)
