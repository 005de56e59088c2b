"""Matrices in FP8 (e4m3) with scales, which FP8's operations take and return."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0


class Rows(NamedTuple):
    """A matrix in FP8 with a scale for every row: ``[T, C]`` and float32 ``[T]``."""

    values: Tensor
    scales: Tensor

    def float(self) -> Tensor:
        """The values it represents, in float32."""
        return self.values.float() * self.scales[:, None]


def largest_row(matrix: Tensor) -> Tensor:
    """The Euclidean length of the longest row of ``[O, I]``, float32 ``[]``."""
    return torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float32).amax()
