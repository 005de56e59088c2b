"""The loss of micro-batches and its gradients, weighted by the target tokens of the whole global batch.

Forward and backward passes exchange nothing. So a process that runs out of memory can retry its share with
smaller micro-batches while the others wait in the all-reduce. With a sharded model the passes exchange
weights and gradients: there OOM ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from falcon_qlora.common.errors import UserError
from falcon_qlora.data.batches import Share
from falcon_qlora.data.packing import MicroBatch
from falcon_qlora.models.packed_attention import Sequences
from falcon_qlora.processes.devices import free_memory
from falcon_qlora.step.agreed import MOST_HALVINGS
from falcon_qlora.step.reduction import Reduction


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
    can_split: bool = True,
) -> tuple[torch.Tensor, int]:
    """Leave in the trainable parameters this process's part of the gradient of the global batch's mean loss.

    The loss of every micro-batch is divided by the target tokens of the whole global batch, so a token
    weighs the same on every process and in every micro-batch. If memory runs out, the micro-batches are
    halved and all of them are retried, unless the model is sharded.

    Args:
        model: as Accelerate prepared it.
        share: this process's part of the step.
        device: of the model.
        reduction: holds the gradients.
        backward: Accelerate's, which scales the loss in fp16.
        halvings: how often to halve the micro-batches from the start.
        can_split: whether they may be halved if memory runs out.

    Returns:
        A float32 scalar, detached, whose sum over the processes is the global batch's mean loss; and the
        halvings it took.

    Raises:
        UserError: if memory runs out with a single document.
        torch.OutOfMemoryError: if it runs out and nothing may be split; each forward of a sharded model needs
            all processes.
    """
    can_retry = reduction.can_retry and can_split

    def backward_each(batches: list[MicroBatch]) -> torch.Tensor:
        reduction.clear()
        total = torch.zeros((), device=device)
        for batch in batches:
            loss = sum_of_losses(model, batch.to(device)) * (1 / share.global_targets)
            backward(loss * reduction.weight if reduction.weight != 1 else loss)
            total += loss.detach()
        return total

    try:
        return _retried(
            backward_each, share.micro_batches, halvings, can_retry=can_retry, undo=reduction.clear
        )
    except torch.OutOfMemoryError:
        if not can_retry:
            raise
    longest = max(length for batch in share.micro_batches for length in batch.lengths)
    raise UserError(
        f"out of memory at step {share.step + 1} with a single document of {longest:,} tokens, which "
        "cannot be split: give --checkpointing offload, or begin anew with a smaller --max_length"
    )


@torch.no_grad()
def evaluated(
    model: nn.Module, batch: MicroBatch, *, device: torch.device, halvings: int = 0, can_retry: bool = True
) -> torch.Tensor:
    """The sum of the cross entropies of `batch`'s targets: a float64 scalar.

    Args:
        model: in evaluation mode.
        batch: on the host. If memory runs out, it is retried in halves.
        device: of the model.
        halvings: how often to halve it from the start.
        can_retry: false for a sharded model: each forward needs all processes.

    Raises:
        torch.OutOfMemoryError: if memory runs out with a single document, or `can_retry` is false.
    """

    def add_up(batches: list[MicroBatch]) -> torch.Tensor:
        total = torch.zeros((), device=device, dtype=torch.float64)
        for each in batches:
            total += sum_of_losses(model, each.to(device)).double()
        return total

    return _retried(add_up, [batch], halvings, can_retry=can_retry)[0]


def _retried(
    work: Callable[[list[MicroBatch]], torch.Tensor],
    batches: Sequence[MicroBatch],
    halvings: int,
    *,
    can_retry: bool,
    undo: Callable[[], None] = lambda: None,
) -> tuple[torch.Tensor, int]:
    """Run `work` on the batches, and halve them again each time memory runs out.

    Returns:
        What `work` returned, and how often they were halved.

    Raises:
        torch.OutOfMemoryError: where they cannot be halved again.
    """
    while True:
        parts = [part for batch in batches for part in halved(batch, halvings)]
        try:
            return work(parts), halvings
        except torch.OutOfMemoryError:
            if not can_retry or halvings == MOST_HALVINGS or all(len(part.lengths) == 1 for part in parts):
                raise
        # Outside of `except`, the failed pass no longer holds its tensors.
        undo()
        free_memory()
        halvings += 1


def halved(batch: MicroBatch, times: int) -> list[MicroBatch]:
    """`batch` in up to 2^times parts of whole documents with about the same number of positions each."""
    documents = len(batch.lengths)
    if times == 0 or documents == 1:
        return [batch]
    starts = batch.cu_seqlens.tolist()
    middle = min(range(1, documents), key=lambda place: abs(2 * starts[place] - starts[-1]))
    parts = (documents_of(batch, 0, middle), documents_of(batch, middle, documents))
    return [smaller for part in parts for smaller in halved(part, times - 1)]


def documents_of(batch: MicroBatch, first: int, last: int) -> MicroBatch:
    """The documents `first` to `last` - 1 of `batch`."""
    starts = batch.cu_seqlens.tolist()
    begin, end = starts[first], starts[last]
    within = (batch.target_positions >= begin) & (batch.target_positions < end)
    changes: dict[str, Any] = {
        "input_ids": batch.input_ids[:, begin:end],
        "position_ids": batch.position_ids[:, begin:end],
        "cu_seqlens": batch.cu_seqlens[first : last + 1] - begin,
        "target_positions": batch.target_positions[within] - begin,
        "targets": batch.targets[within],
        "lengths": batch.lengths[first:last],
        "places": batch.places[first:last],
        # Which of the positions are padding is not known here, and no step needs it.
        "tokens": min(batch.tokens, end - begin),
    }
    return replace(batch, **changes)
