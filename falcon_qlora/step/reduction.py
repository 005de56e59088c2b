"""The all-reduce of gradients, once a step, in buffers with the same layout in every run."""

from __future__ import annotations

import time
from collections import deque

import torch
import torch.distributed as dist
from torch import nn

from falcon_qlora.step.agreed import NOTES

# In elements: a float32 gradient begins at a multiple of 256 bytes, as a tensor of its own would.
_ALIGNMENT = 64


class ReductionClock:
    """How long all-reduces take on this process, with the wait for the slowest; the host does not wait.

    Attributes:
        seconds: of the all-reduces whose end the host has seen.
    """

    def __init__(self, device: torch.device):
        self.seconds = 0.0
        self._on_gpu = device.type == "cuda"
        self._running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._began = 0.0

    def start(self) -> None:
        if not self._on_gpu:
            self._began = time.perf_counter()
            return
        while self._running and self._running[0][1].query():
            self._take()
        self._running.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        self._running[-1][0].record()

    def stop(self) -> None:
        if self._on_gpu:
            self._running[-1][1].record()
        else:
            self.seconds += time.perf_counter() - self._began

    def finish(self) -> float:
        """Wait for all of them and return their seconds."""
        while self._running:
            self._running[0][1].synchronize()
            self._take()
        return self.seconds

    def _take(self) -> None:
        began, ended = self._running.popleft()
        self.seconds += began.elapsed_time(ended) / 1e3


class Reduction:
    """Sums gradients and notes over the processes, once a step.

    The gradients of a dtype lie in one buffer with the same layout in every run. DistributedDataParallel
    regroups its buckets after a run's first step, which changes the order of sums over three processes or
    more: a resumed run would differ from an uninterrupted one in the last bits.

    Args:
        parameters: the trainable ones.
        processes: how many train together.
        can_retry: see below.

    Attributes:
        weight: factor on a process's loss before the backward pass.
        can_retry: whether a process can retry its share while the others wait.
        clock: times the all-reduces.
    """

    def __init__(self, parameters: list[nn.Parameter], *, processes: int, can_retry: bool = True):
        self.can_retry = can_retry
        self._parameters = parameters
        self._processes = processes
        self.weight = 1
        self.clock = ReductionClock(parameters[0].device)
        self._flat: dict[torch.dtype, torch.Tensor] = {}
        self._views: list[torch.Tensor] = []
        if processes > 1:
            starts, totals = [], {torch.float32: 0}
            for parameter in parameters:
                start = totals.setdefault(parameter.dtype, 0)
                starts.append(start)
                totals[parameter.dtype] = start + -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
            # The notes follow the float32 gradients: one collective a step if all gradients are float32.
            totals[torch.float32] += NOTES
            device = parameters[0].device
            self._flat = {
                dtype: torch.zeros(total, dtype=dtype, device=device) for dtype, total in totals.items()
            }
            self._views = [
                self._flat[parameter.dtype][start : start + parameter.numel()].view_as(parameter)
                for start, parameter in zip(starts, parameters, strict=True)
            ]

    def share_parameters(self) -> None:
        """Broadcast the main process's parameters, which should be the same already."""
        if self._processes > 1:
            for parameter in self._parameters:
                dist.broadcast(parameter.data, src=0)

    def clear(self) -> None:
        """Reset the gradients of this process."""
        if not self._flat:
            for parameter in self._parameters:
                parameter.grad = None
            return
        for flat in self._flat.values():
            flat.zero_()
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view

    def __call__(self, notes: torch.Tensor) -> torch.Tensor:
        """Sum the gradients over the processes, in-place; return the sum of `notes`."""
        if not self._flat:
            return notes
        carrier = self._flat[torch.float32]
        carrier[-NOTES:] = notes
        self.clock.start()
        for flat in self._flat.values():
            dist.all_reduce(flat)
        self.clock.stop()
        return carrier[-NOTES:].clone()


class ShardedReduction(Reduction):
    """Sums only the notes: a sharded model's backward pass already averages the gradients."""

    def __init__(self, parameters: list[nn.Parameter], *, processes: int, can_retry: bool = False):
        # No buffers, and no process has another's parameters.
        super().__init__(parameters, processes=1, can_retry=can_retry)
        self.weight = processes

    def __call__(self, notes: torch.Tensor) -> torch.Tensor:
        """Return the sum of `notes` over the processes."""
        self.clock.start()
        dist.all_reduce(notes)
        self.clock.stop()
        return notes
