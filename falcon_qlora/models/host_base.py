"""A base whose blocks' weights lie in CPU memory, for a card that is smaller than the model.

A copy brings each block to the device: `streamed_base` says when. Each process has all blocks for itself. The
memory is page-locked, without which a copy would go through a buffer of the driver's and hold up the host.
PyTorch's own page-locked memory comes in powers of two, half as much again as a block of 40B takes.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.quantities import gib


class HostCopy:
    """The blocks' bytes in CPU memory; a `Storage`.

    Args:
        sizes: of the blocks, in bytes.
        device: of this process; on the CPU nothing is page-locked.

    Raises:
        UserError: if the memory cannot be page-locked.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device):
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._blocks = [
            torch.frombuffer(mmap.mmap(-1, size, flags=private), dtype=torch.uint8) for size in sizes
        ]
        self.is_shared = False
        if device.type == "cuda":
            with torch.cuda.device(device):
                self._lock()

    def room(self, index: int) -> int:
        return len(self._blocks[index])

    def put(self, index: int, start: int, tensor: Tensor) -> None:
        self._blocks[index][start : start + len(tensor)] = tensor

    def fetch(self, index: int, into: Tensor) -> None:
        into.copy_(self._blocks[index], non_blocking=True)

    def _lock(self) -> None:
        runtime, locked = torch.cuda.cudart(), list[int]()
        weakref.finalize(self, _unlock, locked, torch.cuda.current_device()).atexit = False
        for block in self._blocks:
            failed = int(runtime.cudaHostRegister(block.data_ptr(), len(block), 0))
            if failed:
                raise UserError(
                    f"--offload_base: {gib(sum(map(len, self._blocks)), 1)} of CPU memory cannot be "
                    f"page-locked (CUDA error {failed}): free memory on this machine, or raise the limit of "
                    "locked memory (ulimit -l, or the container's)"
                )
            locked.append(block.data_ptr())


def _unlock(addresses: list[int], device: int) -> None:
    torch.cuda.synchronize(device)  # a copy that was fetched ahead may be on its way
    for address in addresses:
        torch.cuda.cudart().cudaHostUnregister(address)
