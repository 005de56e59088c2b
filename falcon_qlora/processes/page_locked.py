"""CPU memory that a GPU reads and writes by itself, of any size and without holding up the GPU's queue.

PyTorch's own comes in powers of two, and while the driver allocates it nothing can be queued for the GPU.
Here pages are large, and exist before they are locked, which leaves the driver a twentieth of that time.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref

import torch
from torch import Tensor

_PAGE_BYTES = 4096


class PageLocked:
    """Memory of one process, locked for its GPU until this object is gone; on the CPU it is plain memory."""

    def __init__(self, device: torch.device):
        self._device = device
        self._addresses: list[int] = []
        if device.type == "cuda":
            weakref.finalize(self, _unlock, self._addresses, device).atexit = False

    def new(self, size: int) -> Tensor:
        """Bytes of any value, uint8 ``[size]``; on any thread.

        Raises:
            MemoryError: if the system has no such memory, or will not lock it.
        """
        try:
            held = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"the system has no more ({error.strerror})") from None
        with contextlib.suppress(OSError, AttributeError):  # where a kernel has no large pages
            held.madvise(mmap.MADV_HUGEPAGE)
        made = torch.frombuffer(held, dtype=torch.uint8)
        if self._device.type == "cuda":
            made[::_PAGE_BYTES] = 0
            with torch.cuda.device(self._device):
                failed = int(torch.cuda.cudart().cudaHostRegister(made.data_ptr(), size, 0))
            if failed:
                raise MemoryError(f"it cannot be page-locked (CUDA error {failed})")
            self._addresses.append(made.data_ptr())
        return made


def _unlock(addresses: list[int], device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a copy may be on its way
    for address in addresses:
        torch.cuda.cudart().cudaHostUnregister(address)
