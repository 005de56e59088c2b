"""One optimizer step of one process: micro batches, a loss weighed by tokens, one reduction at the end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from falcon_qlora.data.batches import MicroBatch, Share
from falcon_qlora.models.attention import Sequences


def sum_of_losses(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """The sum of the cross entropies of `batch`'s targets: a float32 scalar with a gradient.

    Args:
        model: with packing enabled, possibly wrapped by PEFT and DistributedDataParallel.
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
    processes: int,
    backward: Callable[[torch.Tensor], None],
) -> torch.Tensor:
    """Leave in the trainable parameters the gradient of the global batch's mean loss.

    The loss of every micro batch is divided by the target tokens of the whole global batch, so a token
    weighs the same on whatever process and in whatever micro batch it is. Gradients stay local until the
    last micro batch, whose backward reduces them once. The mean that DistributedDataParallel takes over
    processes is undone by the factor `processes`.

    Args:
        model: as Accelerate prepared it.
        share: this process's part of the step.
        device: of the model.
        processes: how many train together.
        backward: Accelerate's, which scales the loss in fp16.

    Returns:
        A float32 scalar, detached: its mean over the processes is the global batch's mean loss.
    """
    weight = processes / share.global_targets
    total = torch.zeros((), device=device)
    last = len(share.micro_batches) - 1
    for index, micro_batch in enumerate(share.micro_batches):
        with _without_reduction(model) if index < last else nullcontext():
            loss = sum_of_losses(model, micro_batch.to(device)) * weight
            backward(loss)
        total += loss.detach()
    return total


def _without_reduction(model: nn.Module) -> AbstractContextManager[None]:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    return nullcontext()
