"""Copies of tensors in host memory, queued behind the GPU's work so that nothing waits for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from falcon_qlora.processes import devices
from falcon_qlora.processes.page_locked import PageLocked
from falcon_qlora.terminal.console import note_here

_PIECE_BYTES = 2**26  # tensors share pieces of so much; a larger one has its own
_ALIGNMENT = 64


def copy_bytes(sizes: Iterable[int]) -> int:
    """Host memory that `HostCopies` takes for tensors of these sizes in bytes, in their order."""
    if not torch.cuda.is_available():
        return sum(sizes)  # unpinned memory takes no room until it is used
    total = left = 0
    for size in sizes:
        if size > left:
            left = _piece_bytes(size)
            total += left
        left = max(left - _aligned(size), 0)
    return total


def _piece_bytes(size: int) -> int:
    return max(_PIECE_BYTES, _aligned(size))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors of nested dictionaries, lists and tuples, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from tensors_in(value)


class HostCopies:
    """Copies of the same tensors, again and again, into memory that is allocated once.

    A copy from a GPU is queued behind its current work. The next step may be queued behind the copy and does
    not change it. `wait` before reading.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._ready: list[Any] = []
        self._stop_reserving = threading.Event()
        self._memory = PageLocked(devices.local_device())
        self._is_refused = False
        self._piece: Any = np.empty(0, dtype=np.uint8)
        self._taken = 0
        self._copied: Any = None

    def more_bytes(self, sizes: Iterable[int]) -> int:
        """Host memory that `take` would add for tensors of these sizes in bytes, in their order."""
        return 0 if self._buffers else copy_bytes(sizes)

    def reserve(self, sizes: Iterable[int]) -> None:
        """Allocate what the first `take` will need for tensors of these sizes; on any thread, before it."""
        for _ in range(self.more_bytes(sizes) // _PIECE_BYTES):
            began = time.monotonic()
            try:
                self._ready.append(self._memory.new(_PIECE_BYTES).numpy())
            except (MemoryError, RuntimeError):  # `take` will say so, or Python is ending
                return
            # While a piece is locked nothing can be queued for the GPU, so only for a share of the time.
            if self._stop_reserving.wait(3 * (time.monotonic() - began)):
                return

    def take(self, tree: Any) -> Any:
        """`tree` with each tensor replaced by its copy, which the next call of `take` overwrites.

        Args:
            tree: nested dictionaries, lists and tuples; other values are kept as they are. An iterator of
                names and tensors becomes a dictionary: they are copied one by one.
        """
        self._stop_reserving.set()
        devices = {tensor.device for tensor in tensors_in(tree) if tensor.is_cuda}
        if devices and any(getattr(tensor, "is_paged", False) for tensor in tensors_in(tree)):
            torch.cuda.synchronize()  # bitsandbytes' paged state: the host reads what the GPU may be writing
        self._taken = 0
        with torch.no_grad():
            copied = self._copy(tree)
        on_gpu = torch.cuda.is_initialized()
        self._copied = torch.cuda.current_stream().record_event() if on_gpu else None
        return copied

    def wait(self) -> None:
        """Return once the copies are complete; on any thread."""
        if self._copied is not None:
            self._copied.synchronize()

    def _copy(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return self._buffer_for(tree).copy_(tree, non_blocking=True)
        if isinstance(tree, dict):
            return {key: self._copy(value) for key, value in tree.items()}
        if isinstance(tree, list | tuple):
            return type(tree)(self._copy(value) for value in tree)
        if isinstance(tree, Iterator):
            return {name: self._copy(tensor) for name, tensor in tree}
        return tree

    def _buffer_for(self, tensor: Tensor) -> Tensor:
        place, self._taken = self._taken, self._taken + 1
        if place < len(self._buffers):
            kept = self._buffers[place]
            if kept.shape == tensor.shape and kept.dtype == tensor.dtype:
                return kept
        made = self._new_buffer(tensor)
        self._buffers[place : place + 1] = [made]
        return made

    def _new_buffer(self, tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        if size > len(self._piece):
            # The rest of the previous piece is lost: a few tensors' worth.
            wanted = _piece_bytes(size)
            self._piece = (
                self._ready.pop() if self._ready and wanted == _PIECE_BYTES else self._new_piece(wanted)
            )
        # Each buffer has its own storage over its part of the piece: `torch.save` writes whole storages.
        buffer = torch.from_numpy(self._piece[:size])
        self._piece = self._piece[_aligned(size) :]
        return buffer.view(tensor.dtype).view(tensor.shape)

    def _new_piece(self, size: int) -> Any:
        try:
            return self._memory.new(size).numpy()
        except MemoryError as error:
            if not self._is_refused:
                note_here(f"memory for copies of what is saved: {error}; the GPU waits for each copy")
            self._is_refused = True
            return np.empty(size, dtype=np.uint8)
