"""Whether packed documents reach each other, tried on the first of a run's own documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from falcon_qlora.data.packing import MicroBatch
from falcon_qlora.models.layouts import causal_lm_in, layout_of
from falcon_qlora.processes import devices
from falcon_qlora.step.loss import documents_of, halved, sum_of_losses

_DOCUMENTS = 8
_ROUNDING = 0.01  # of the loss; bfloat16's share is smaller, and a leak's was larger in every model tried


@dataclass(frozen=True)
class LeakProbe:
    """The mean loss of packed documents, and that of the same one by one.

    Attributes:
        documents: how many.
        targets: of all of them.
        together: their mean loss in one micro-batch.
        apart: that of micro-batches of one document each.
    """

    documents: int
    targets: int
    together: float
    apart: float

    def warning(self) -> str | None:
        """What to say if they differ by more than rounding."""
        if abs(self.together - self.apart) <= _ROUNDING * max(abs(self.apart), 1.0):
            return None
        return (
            f"the loss of {self.documents} packed documents is {self.together:.5f} together and "
            f"{self.apart:.5f} one by one: they reach each other. Give --packing false, and report it"
        )


def needs_probe(model: Any) -> bool:
    """Whether anything but attention mixes tokens in the model."""
    return bool(layout_of(causal_lm_in(model).config).other_mixers())


@torch.no_grad()
def probe(model: torch.nn.Module, batch: MicroBatch, device: torch.device) -> LeakProbe | None:
    """Evaluate the first documents of `batch` together and one by one; None if there are not two.

    No random state changes.
    """
    some = documents_of(batch, 0, min(_DOCUMENTS, len(batch.lengths)))
    targets = len(some.targets)
    if len(some.lengths) < 2 or not targets:
        return None
    was_training = model.training
    model.eval()
    try:
        with devices.draws_undone(device):
            together, apart = (
                float(sum(sum_of_losses(model, part.to(device)) for part in parts)) / targets
                for parts in ([some], halved(some, len(some.lengths)))
            )
    finally:
        model.train(was_training)
    return LeakProbe(len(some.lengths), targets, together, apart)
