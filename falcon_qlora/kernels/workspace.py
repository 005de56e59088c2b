"""Where dequantized weights are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Workspace:
    """Memory for dequantized weights: one group's, reused by every product of every block, and those kept.

    Attributes:
        room: bytes that `keep` may still take; none are given back.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.room = 0
        self._kept: dict[tuple[int, ...], tuple[Sequence[Tensor], Tensor]] = {}

    def take(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """``[rows, columns]``, uninitialized; it shares memory with what was taken before."""
        key = (like.device, like.dtype)
        memory = self._memory.get(key)
        if memory is None or memory.numel() < rows * columns:
            self._memory.pop(key, None)
            memory = None
            memory = _new(rows * columns, like)
            self._memory[key] = memory
        return memory[: rows * columns].view(rows, columns)

    def keep(
        self,
        weights: Sequence[Tensor],
        rows: int,
        columns: int,
        like: Tensor,
        fill: Callable[[Tensor], None],
    ) -> Tensor | None:
        """Memory of these weights' own, filled once.

        Args:
            weights: as they are stored; their order counts.
            rows, columns: of the memory.
            like: has its dtype and device.
            fill: dequantizes the weights into it.

        Returns:
            ``[rows, columns]`` or more; None if there is none so large, and no room.
        """
        key = tuple(map(id, weights))
        _, memory = self._kept.get(key, (None, None))
        if memory is not None and memory.shape[0] >= rows and memory.shape[1] >= columns:
            return memory if (memory.dtype, memory.device) == (like.dtype, like.device) else None
        if memory is not None:  # made without the columns of LoRA
            self.room += memory.nbytes
            del memory, self._kept[key]
        needed = rows * columns * like.element_size()
        if needed > self.room:
            return None
        memory = _new(rows * columns, like).view(rows, columns)
        fill(memory)
        self.room -= needed
        self._kept[key] = weights, memory  # the weights too: while they are, no others have their ids
        return memory

    def __deepcopy__(self, memo: dict[int, Any]) -> Workspace:
        return Workspace()


def _new(count: int, like: Tensor) -> Tensor:
    with torch.inference_mode(False):  # else an evaluation's memory could not be written in training
        return torch.empty(count, dtype=like.dtype, device=like.device)
