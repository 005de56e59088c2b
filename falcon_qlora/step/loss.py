"""The loss of micro-batches and its gradients, weighed by the target tokens of the whole global batch.

Forward and backward passes exchange nothing. So a process that runs out of memory can do its share again in
smaller pieces while the others wait for it in the reduction. Of a sharded model they exchange weights and
gradients: there memory that runs out ends the run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from falcon_qlora.common.errors import UserError
from falcon_qlora.data.batches import Share
from falcon_qlora.data.packing import MicroBatch
from falcon_qlora.models.packed_attention import Sequences
from falcon_qlora.processes.devices import free_memory
from falcon_qlora.step.micro_batches import MOST_HALVINGS, halved
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
