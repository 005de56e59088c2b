"""Copies of tensors on the host, made behind the work that a GPU has queued, so that nothing waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Pinned memory comes in powers of two: tensors share pieces of one, or have their own where they are larger.
_PIECE_BYTES = 2**26
_ALIGNMENT = 64


def free_host_bytes() -> int:
    """What this machine, or the control group that the process runs in, has free for it."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())  # "max" where there is none
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(cached.get("inactive_file", 0))
        free.append(limit - used)
    except (OSError, ValueError):
        pass
    return max(min(free), 0)


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
    """Copies of the same tensors, time after time, in memory that is taken once.

    A copy from a GPU is queued behind the work that is there: the next step may be queued behind it, and
    changes nothing in it. `wait` before reading.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._piece: Any = np.empty(0, dtype=np.uint8)
        self._taken = 0
        self._copied: Any = None

    def more_bytes(self, tree: Any) -> int:
        """Host memory that `take` would add for `tree`."""
        if self._buffers:
            return 0
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(tree))

    def take(self, tree: Any) -> Any:
        """`tree` with each tensor replaced by its copy, which the next call of `take` writes over.

        Args:
            tree: nested dictionaries, lists and tuples; other values are taken as they are.
        """
        devices = {tensor.device for tensor in tensors_in(tree) if tensor.is_cuda}
        if devices and any(getattr(tensor, "is_paged", False) for tensor in tensors_in(tree)):
            torch.cuda.synchronize()  # bitsandbytes' paged state: the host reads what the GPU may be writing
        self._taken = 0
        with torch.no_grad():
            copied = self._copy(tree)
        self._copied = torch.cuda.current_stream().record_event() if devices else None
        return copied

    def wait(self) -> None:
        """Return once the copies are there; on any thread."""
        if self._copied is not None:
            self._copied.synchronize()

    def _copy(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return self._buffer_for(tree).copy_(tree, non_blocking=True)
        if isinstance(tree, dict):
            return {key: self._copy(value) for key, value in tree.items()}
        if isinstance(tree, list | tuple):
            return type(tree)(self._copy(value) for value in tree)
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
            # What is left of the piece before is lost: a few tensors' worth.
            pinned = torch.cuda.is_available()
            piece = torch.empty(max(_PIECE_BYTES, size), dtype=torch.uint8, pin_memory=pinned)
            self._piece = piece.numpy()
        # Each with a storage of its own, over its part of the piece: `torch.save` writes whole storages.
        buffer = torch.from_numpy(self._piece[:size])
        self._piece = self._piece[-(-size // _ALIGNMENT) * _ALIGNMENT :]
        return buffer.view(tensor.dtype).view(tensor.shape)
