"""Offloads tensors saved for the backward pass to CPU memory between the two passes.

The copies run on one stream beside the computation and never make the host wait. A tensor leaves the device
when the next one is saved, so at most two are there on their way out. On the way back, the previous one is
fetched while the current one is used. One stream is enough, as forward only writes to the CPU and backward
only reads; its order makes it safe to reuse a buffer.

CPU buffers are page-locked and kept: after the largest micro-batch a step allocates none. Their sizes are
powers of two, as PyTorch's pinned allocator rounds up to one anyway. On a CPU model the same happens without
streams.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Offload:
    """CPU memory for the saved tensors of one model."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._buffers: list[Tensor] = []
        self._latest: weakref.ref[_Moved] | None = None

    def moving(self, tensor: Tensor) -> saved_tensors_hooks:
        """A context in which `tensor` is offloaded if a function saves it; others are saved as usual."""
        address, count = tensor.data_ptr(), tensor.numel()

        def pack(saved: Tensor) -> Any:
            if saved.data_ptr() != address or saved.numel() != count:
                return saved
            return _Moved(self, saved.detach())

        return saved_tensors_hooks(pack, lambda packed: packed.back() if type(packed) is _Moved else packed)

    def stream(self, device: torch.device) -> torch.cuda.Stream | None:
        if self._stream is None and device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
        return self._stream

    def follow(self, moved: _Moved) -> weakref.ref[_Moved] | None:
        """Make `moved` the latest; the one before leaves the device and is returned."""
        before, self._latest = self._latest, weakref.ref(moved)
        previous = before() if before is not None else None
        if previous is not None:
            previous.leave()
        return before

    def take(self, size: int, pinned: bool) -> Tensor:
        """A buffer of at least `size` bytes."""
        size = 1 << max(size - 1, 0).bit_length()
        for index, buffer in enumerate(self._buffers):
            if buffer.numel() >= size and buffer.is_pinned() == pinned:
                return self._buffers.pop(index)
        self._buffers.clear()  # all are too small
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)

    def give(self, buffer: Tensor) -> None:
        self._buffers.append(buffer)

    def __deepcopy__(self, memo: dict[int, Any]) -> Offload:
        return Offload()


class _Moved:
    """One saved tensor; its buffer can be reused once nothing refers to it any more."""

    def __init__(self, home: Offload, tensor: Tensor) -> None:
        self._home = home
        self._previous = home.follow(self)
        self._dtype, self._shape, self._device = tensor.dtype, tensor.shape, tensor.device
        self._buffer = home.take(tensor.nbytes, tensor.is_cuda)
        weakref.finalize(self, home.give, self._buffer).atexit = False
        self._here: Tensor | None = tensor
        self._copied = self._copy(tensor, self._stored())

    def leave(self) -> None:
        """Release the device's memory, which can be reused once the copy is done."""
        if self._here is not None:
            self._wait()
            self._here = None

    def fetch(self) -> None:
        """Start the copy back, if the tensor is not on the device."""
        if self._here is None:
            here = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            self._copied = self._copy(self._stored(), here)
            self._here = here

    def back(self) -> Tensor:
        """The tensor on its device; also starts fetching the one saved before it."""
        self.fetch()
        self._wait()
        previous = self._previous() if self._previous is not None else None
        if previous is not None:
            previous.fetch()
        here = self._here
        assert here is not None
        # Only the caller holds it now, so its memory is free when the caller is done.
        self._here = None
        return here

    def _stored(self) -> Tensor:
        size = self._shape.numel() * self._dtype.itemsize
        return self._buffer[:size].view(self._dtype).view(self._shape)

    def _copy(self, source: Tensor, target: Tensor) -> torch.cuda.Event | None:
        stream = self._home.stream(self._device)
        if stream is None:
            target.copy_(source)
            return None
        # In both directions: the source must be computed, and the target's memory free.
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            return stream.record_event()

    def _wait(self) -> None:
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)
