"""What LoRA adds to a matrix."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LowRank(NamedTuple):
    """What LoRA adds to a matrix ``[T, N]``: ``left @ right``, ``[T, R]`` and ``[R, N]`` of any strides."""

    left: Tensor
    right: Tensor
