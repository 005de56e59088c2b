"""A base whose blocks' weights lie in CPU memory, for a card that is smaller than the model.

A copy brings each block to the device: `streamed_base` says when. Each process has all blocks for itself. The
memory is page-locked, without which a copy would go through a buffer of the driver's and hold up the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.quantities import sized
from falcon_qlora.processes import ranks
from falcon_qlora.processes.page_locked import PageLocked


class HostCopy:
    """The blocks' bytes in CPU memory; a `Storage`.

    Args:
        sizes: of the blocks, in bytes.
        device: of this process; on the CPU nothing is page-locked.

    Raises:
        UserError: if the memory cannot be page-locked.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device):
        locked = PageLocked(device)
        self.is_shared = False
        try:
            self._blocks = [locked.new(size) for size in sizes]
        except MemoryError as error:
            of_rank = f"{ranks.named()}: " if ranks.world_size() > 1 else ""
            raise UserError(
                f"--offload_base: {of_rank}{sized(sum(sizes), 1)} of CPU memory are needed, and {error}: "
                "free memory on this machine, or raise the limit of locked memory (ulimit -l, or the "
                "container's)"
            ) from None
        self._locked = locked

    def room(self, index: int) -> int:
        return len(self._blocks[index])

    def put(self, index: int, start: int, tensor: Tensor) -> None:
        self._blocks[index][start : start + len(tensor)] = tensor

    def fetch(self, index: int, into: Tensor) -> None:
        into.copy_(self._blocks[index], non_blocking=True)
