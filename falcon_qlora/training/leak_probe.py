"""Whether packed documents reach each other, tried on the first of a run's own documents.

Every second document changes, token by token, and the losses of the others must stay as they were: to the
bit, as lengths and places are the same. Then the others change. So each boundary is tried from both sides,
on the kernels, the sizes and the data of this run; that of later steps, and gradients, are not. Each document
is also computed by itself, which may differ by rounding.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from falcon_qlora.data.packing import MicroBatch
from falcon_qlora.models.activations import has_fast_blocks
from falcon_qlora.models.layouts import causal_lm_in, layout_of
from falcon_qlora.models.load import quantization_of
from falcon_qlora.models.sharded import is_sharded, needs_all_processes
from falcon_qlora.models.sharded_base import alone
from falcon_qlora.processes import devices
from falcon_qlora.step.loss import documents_of, sum_of_losses
from falcon_qlora.terminal.console import note

# Attention has one rule for all boundaries; what else mixes tokens has had others at the ends of its chunks.
_DOCUMENTS, _WITH_OTHER_MIXERS = 3, 8
# Of the loss: what products of other sizes may round differently. LLM.int8(), with --kernels off, chooses its
# outlier columns over the whole micro-batch.
_ROUNDING = 0.01


@dataclass(frozen=True)
class LeakProbe:
    """What became of the losses of documents when those beside them changed.

    Attributes:
        documents: how many were tried.
        targets: of all of them.
        loss: their mean loss, packed.
        moved: by how much it moved.
        apart: their mean loss, each document by itself.
        exact: whether it must not move at all.
    """

    documents: int
    targets: int
    loss: float
    moved: float
    apart: float
    exact: bool

    @property
    def passed(self) -> bool:
        rounding = _ROUNDING * self.loss
        return self.moved <= (0 if self.exact else rounding) and abs(self.apart - self.loss) <= rounding


def tried(model: torch.nn.Module, batch: MicroBatch, device: torch.device) -> LeakProbe | str:
    """As `probe`, on whatever processes the model needs; a probe that has not passed is told."""
    if is_sharded(model):  # whose processes may have too few documents for as many forward passes
        return "the weights are sharded"
    work = functools.partial(probe, model, batch, device)
    # The others may have too few documents to take part in as many forward passes.
    found = alone(model, work) if needs_all_processes(model) else work()
    if isinstance(found, LeakProbe) and not found.passed:
        note(warning(found))
    return found or "rank 0 tried it alone"


@torch.no_grad()
def probe(model: torch.nn.Module, batch: MicroBatch, device: torch.device) -> LeakProbe | str:
    """Try the first documents of `batch`; gradients and random states stay as they are.

    Args:
        model: with packing enabled.
        batch: on the host.
        device: of the model.

    Returns:
        What was found; or why nothing could be tried.
    """
    others = layout_of(causal_lm_in(model).config).other_mixers()
    some = documents_of(batch, 0, min(_WITH_OTHER_MIXERS if others else _DOCUMENTS, len(batch.lengths)))
    targets = len(some.targets)
    if len(some.lengths) < 2:
        return "the first micro-batch has one document"
    if not targets:
        return "the first documents have no trained token"
    was_training = model.training
    model.eval()
    try:
        with devices.draws_undone(device):
            before, after = torch.stack([_losses(model, some, odd, device) for odd in (0, 1)]).cpu().T
            alone = (documents_of(some, each, each + 1).to(device) for each in range(len(some.lengths)))
            apart = sum(float(sum_of_losses(model, each)) for each in alone if len(each.targets))
    except torch.OutOfMemoryError:
        return "out of memory"  # the step splits what is too large for it
    finally:
        model.train(was_training)
    if not before.isfinite().all():
        return "the first documents have a non-finite loss"
    moved = float((after - before).abs().sum()) / targets
    exact = quantization_of(causal_lm_in(model)) != "8bit" or has_fast_blocks(model)
    return LeakProbe(
        len(some.lengths), targets, float(before.sum()) / targets, moved, apart / targets, exact=exact
    )


def warning(found: LeakProbe) -> str:
    """What to say of a probe that has not passed."""
    return (
        f"packed documents reach each other: the mean loss of {found.documents}, {found.loss:.5f}, moved by "
        f"{found.moved:.2g} when their neighbours changed, and is {found.apart:.5f} without them. Give "
        "--kernels off, or --packing false with --per_device_train_batch_size 1; and report it"
    )


def _losses(model: torch.nn.Module, batch: MicroBatch, odd: int, device: torch.device) -> Tensor:
    """Sums of the losses of every second document, before and after the others change: float64 ``[2]``."""
    document = torch.repeat_interleave(torch.arange(len(batch.lengths)), torch.tensor(batch.lengths))
    stays = document % 2 == odd
    counted = stays[batch.target_positions]
    before = replace(batch, target_positions=batch.target_positions[counted], targets=batch.targets[counted])
    other = (batch.input_ids + 1) % causal_lm_in(model).config.vocab_size
    after = replace(before, input_ids=torch.where(stays, batch.input_ids, other))
    return torch.stack([sum_of_losses(model, each.to(device)).double() for each in (before, after)])
