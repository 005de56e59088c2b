"""One optimizer step of one process: micro batches, a loss weighed by tokens, one reduction at the end.

Forward and backward passes exchange nothing. So a process that runs out of memory can do its share again in
smaller pieces while the others wait for it in the reduction, which also carries what all must agree on. Of a
sharded model they exchange weights and gradients: there memory that runs out ends the run.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn

from falcon_qlora.common.errors import UserError
from falcon_qlora.data.batches import Share
from falcon_qlora.data.packing import MicroBatch
from falcon_qlora.models.packed_attention import Sequences
from falcon_qlora.processes.devices import free_memory

# Every gradient begins at a multiple of 256 bytes, as if it had a tensor of its own.
_ALIGNMENT = 64
MOST_HALVINGS = 8
NOTES = 3 + MOST_HALVINGS


@dataclass(frozen=True, kw_only=True)
class Notes:
    """What a process tells the others with its gradients.

    Attributes:
        loss: its part of the global batch's mean loss.
        stop: it was asked to stop.
        save: it wants a checkpoint.
        halvings: how often it had to halve its micro batches for want of memory.
    """

    loss: torch.Tensor
    stop: bool = False
    save: bool = False
    halvings: int = 0

    def tensor(self) -> torch.Tensor:
        """float32 ``[NOTES]``, to be added up over the processes; made without waiting."""
        reached = [float(count < self.halvings) for count in range(MOST_HALVINGS)]
        rest = torch.tensor([float(self.stop), float(self.save), *reached])
        if self.loss.is_cuda:
            rest = rest.pin_memory().to(self.loss.device, non_blocking=True)
        return torch.cat([self.loss.detach().float().reshape(1), rest])


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """The notes of all processes together: the loss is the sum, the rest is what any of them says."""

    loss: float
    stop: bool
    save: bool
    halvings: int

    # Where the notes hold what was wished for.
    WISHES: ClassVar[slice] = slice(1, 3)

    @staticmethod
    def of(values: Sequence[float]) -> Agreed:
        """Read a summed `Notes.tensor`, on the host."""
        loss, stop, save, *reached = values
        return Agreed(
            loss=loss, stop=stop > 0, save=save > 0, halvings=sum(processes > 0 for processes in reached)
        )


class ReductionClock:
    """How long reductions take on this process, waiting for the slowest included; nobody waits for it.

    Attributes:
        seconds: of those whose end the host has seen.
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
        """The seconds of all, waited for."""
        while self._running:
            self._running[0][1].synchronize()
            self._take()
        return self.seconds

    def _take(self) -> None:
        began, ended = self._running.popleft()
        self.seconds += began.elapsed_time(ended) / 1e3


class Reduction:
    """Adds up gradients and notes over the processes, once a step.

    The gradients of a dtype lie in one buffer that is laid out alike in every run. DistributedDataParallel
    regroups its buckets after a run's first step, which changes the order of sums over three processes or
    more: a resumed run would differ from an uninterrupted one in the last bits.

    Args:
        parameters: the trainable ones.
        processes: how many train together.

    Attributes:
        weight: of a process's loss in the gradients that come out.
        can_retry: whether a process can do its share again while the others wait.
        clock: times it.
    """

    can_retry: ClassVar[bool] = True

    def __init__(self, parameters: list[nn.Parameter], *, processes: int):
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
            # The notes travel behind float32's gradients: one collective a step, where those are all.
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
        """Give every process the main process's parameters, which are the same already if all is well."""
        if self._processes > 1:
            for parameter in self._parameters:
                dist.broadcast(parameter.data, src=0)

    def clear(self) -> None:
        """Forget the gradients of this process."""
        if not self._flat:
            for parameter in self._parameters:
                parameter.grad = None
            return
        for flat in self._flat.values():
            flat.zero_()
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view

    def __call__(self, notes: torch.Tensor) -> torch.Tensor:
        """Leave the sum over the processes in the gradients; return that of `notes`."""
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
    """Adds up the notes alone: a sharded model's backward pass leaves the mean of the gradients."""

    can_retry: ClassVar[bool] = False

    def __init__(self, parameters: list[nn.Parameter], *, processes: int):
        super().__init__(parameters, processes=1)  # no buffers, and no process has another's parameters
        self.weight = processes

    def __call__(self, notes: torch.Tensor) -> torch.Tensor:
        """Return the sum of `notes` over the processes."""
        self.clock.start()
        dist.all_reduce(notes)
        self.clock.stop()
        return notes


def sum_of_losses(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """The sum of the cross entropies of `batch`'s targets: a float32 scalar with a gradient.

    Args:
        model: with packing enabled, possibly wrapped by PEFT.
        batch: on the model's device.
    """
    sequences = Sequences(
        cu_seqlens=batch.cu_seqlens,
        position_ids=batch.position_ids,
        lengths=batch.lengths,
        max_length=max(batch.lengths),
    )
    output = model(
        input_ids=batch.input_ids,
        sequences=sequences,
        target_positions=batch.target_positions,
        targets=batch.targets,
    )
    return output.loss


def accumulate_gradients(
    model: nn.Module,
    share: Share,
    *,
    device: torch.device,
    reduction: Reduction,
    backward: Callable[[torch.Tensor], None],
    halvings: int = 0,
) -> tuple[torch.Tensor, int]:
    """Leave in the trainable parameters this process's part of the gradient of the global batch's mean loss.

    The loss of every micro batch is divided by the target tokens of the whole global batch, so a token
    weighs the same on whatever process and in whatever micro batch it is. Where memory runs out, the micro
    batches are halved and all of them are done again, unless the model is sharded.

    Args:
        model: as Accelerate prepared it.
        share: this process's part of the step.
        device: of the model.
        reduction: holds the gradients.
        backward: Accelerate's, which scales the loss in fp16.
        halvings: how often to halve the micro batches from the start.

    Returns:
        A float32 scalar, detached: the sum over the processes is the global batch's mean loss. And the
        halvings it took.

    Raises:
        UserError: if memory runs out with a single document.
        torch.OutOfMemoryError: if it runs out and the model is sharded: each forward takes all processes.
    """

    def backward_of(loss: torch.Tensor) -> None:
        backward(loss * reduction.weight if reduction.weight != 1 else loss)

    while True:
        batches = [part for batch in share.micro_batches for part in halved(batch, halvings)]
        reduction.clear()
        loss = _backward_each(
            model, batches, 1 / share.global_targets, device, backward_of, can_fail=reduction.can_retry
        )
        if loss is not None:
            return loss, halvings
        # The failed pass is gone from the stack by now, and with it what it held.
        reduction.clear()
        free_memory()
        if halvings == MOST_HALVINGS or all(len(batch.lengths) == 1 for batch in batches):
            longest = max(length for batch in batches for length in batch.lengths)
            raise UserError(
                f"out of memory at step {share.step + 1} with a single document of {longest:,} tokens, which "
                "cannot be split: lower --max_length, or give --checkpointing full"
            )
        halvings += 1


@torch.no_grad()
def evaluated(
    model: nn.Module, batch: MicroBatch, *, device: torch.device, halvings: int = 0, can_retry: bool = True
) -> torch.Tensor:
    """The sum of the cross entropies of `batch`'s targets: a float64 scalar.

    Args:
        model: in evaluation mode.
        batch: on the host. Where memory runs out, it is done again in halves.
        device: of the model.
        halvings: how often to halve it from the start.
        can_retry: false of a sharded model: each forward takes all processes.

    Raises:
        torch.OutOfMemoryError: if memory runs out with a single document, or none can be tried again.
    """
    while True:
        pieces = halved(batch, halvings)
        total = torch.zeros((), device=device, dtype=torch.float64)
        try:
            for piece in pieces:
                total += sum_of_losses(model, piece.to(device)).double()
            return total
        except torch.OutOfMemoryError:
            if not can_retry or halvings == MOST_HALVINGS or len(pieces) == len(batch.lengths):
                raise
        free_memory()
        halvings += 1


def _backward_each(
    model: nn.Module,
    batches: list[MicroBatch],
    weight: float,
    device: torch.device,
    backward: Callable[[torch.Tensor], None],
    *,
    can_fail: bool,
) -> torch.Tensor | None:
    """The sum of the weighted losses; None where memory runs out and that `can_fail`."""
    total = torch.zeros((), device=device)
    try:
        for batch in batches:
            loss = sum_of_losses(model, batch.to(device)) * weight
            backward(loss)
            total += loss.detach()
    except torch.OutOfMemoryError:
        if not can_fail:
            raise
        return None
    return total


def halved(batch: MicroBatch, times: int) -> list[MicroBatch]:
    """`batch` in up to 2^times parts of whole documents with about the same number of positions each."""
    documents = len(batch.lengths)
    if times == 0 or documents == 1:
        return [batch]
    starts = batch.cu_seqlens.tolist()
    middle = min(range(1, documents), key=lambda place: abs(2 * starts[place] - starts[-1]))
    parts = (_documents(batch, starts, 0, middle), _documents(batch, starts, middle, documents))
    return [smaller for part in parts for smaller in halved(part, times - 1)]


def _documents(batch: MicroBatch, starts: list[int], first: int, last: int) -> MicroBatch:
    begin, end = starts[first], starts[last]
    within = (batch.target_positions >= begin) & (batch.target_positions < end)
    changes: dict[str, Any] = {
        "input_ids": batch.input_ids[:, begin:end],
        "position_ids": batch.position_ids[:, begin:end],
        "cu_seqlens": batch.cu_seqlens[first : last + 1] - begin,
        "target_positions": batch.target_positions[within] - begin,
        "targets": batch.targets[within],
        "lengths": batch.lengths[first:last],
        # Which of the positions are padding is not known here, and nothing in a step asks.
        "tokens": min(batch.tokens, end - begin),
    }
    return replace(batch, **changes)
