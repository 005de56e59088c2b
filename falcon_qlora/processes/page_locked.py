"""CPU memory that a GPU reads and writes by itself, of any size and without holding up the GPU's queue.

PyTorch's own comes in powers of two, and while the driver allocates it nothing can be queued for the GPU.
Here pages are large, and exist before they are locked, which leaves the driver a twentieth of that time.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_PAGE_BYTES = 4096


class PageLocked:
    """Memory of one process, locked for its GPU until this object is gone; on the CPU it is plain memory."""

    def __init__(self, device: torch.device):
        self._device = device
        self._locked: list[Tensor] = []  # held here: what is locked must not go
        if device.type == "cuda":
            weakref.finalize(self, _unlock, self._locked, device).atexit = False

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
            # After a refusal, this thread's next kernel would fail: CUDA reports a thread's last error there.
            with ThreadPoolExecutor(1) as other:
                failed = other.submit(_lock, made, self._device).result()
            if failed:
                raise MemoryError(f"it cannot be page-locked (CUDA error {failed})")
            self._locked.append(made)
        return made


def _lock(memory: Tensor, device: torch.device) -> int:
    with torch.cuda.device(device):
        return int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), len(memory), 0))


def _unlock(locked: list[Tensor], device: torch.device) -> None:
    with torch.cuda.device(device):  # on whichever thread this runs
        torch.cuda.synchronize()  # a copy may be on its way
        for memory in locked:
            torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
