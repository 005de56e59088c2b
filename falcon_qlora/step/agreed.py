"""What the processes agree on in a step, read a step late, so that the host need not wait for the device.

For each step the device keeps a few numbers: the global loss, whether it or the gradient is non-finite, and
what any process asked for. They travel with the gradients, are copied to the host after the step, and are
read while the next step runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from falcon_qlora.data.origins import Origin

MOST_HALVINGS = 8  # of micro-batches, after OOM
NOTES = 4 + MOST_HALVINGS
# Places in the notes: the requests (stop, save), and whether a checkpoint failed.
_WISHES, _FAILED = slice(1, 3), 3 + MOST_HALVINGS


def notes(
    loss: torch.Tensor, *, stop: bool = False, save: bool = False, failed: bool = False, halvings: int = 0
) -> torch.Tensor:
    """What a process sends with its gradients, to be summed; made without waiting for the device.

    Args:
        loss: its part of the global batch's mean loss.
        stop: it was asked to stop.
        save: it wants a checkpoint.
        failed: a checkpoint that it wrote is not what was in memory.
        halvings: how often it had to halve its micro-batches.

    Returns:
        float32 ``[NOTES]``.
    """
    reached = [float(count < halvings) for count in range(MOST_HALVINGS)]
    rest = torch.tensor([float(stop), float(save), *reached, float(failed)])
    if loss.is_cuda:
        rest = rest.pin_memory().to(loss.device, non_blocking=True)
    return torch.cat([loss.detach().float().reshape(1), rest])


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One step as all processes see it.

    Attributes:
        step: from 0.
        loss: of the global batch.
        stop: one of them was asked to stop.
        save: one of them wants a checkpoint.
        failed: a checkpoint is not what was in memory: the run ends.
        halvings: the most that one of them needed.
        bad: whether the loss or the gradient was non-finite, so that the step changed nothing.
        overflowed: whether a gradient was too large for float16 at its scale: the scaler skipped the step.
        origins: for a stream, the rows that made the step.
    """

    step: int
    loss: float
    stop: bool = False
    save: bool = False
    failed: bool = False
    halvings: int = 0
    bad: bool = False
    overflowed: bool = False
    origins: tuple[Origin, ...] = ()


class Reports:
    """Holds the newest step's report while it travels to the host, and hands out earlier ones."""

    def __init__(self) -> None:
        self._pending: list[tuple[int, torch.Tensor, Any, tuple[Origin, ...]]] = []

    def put(
        self,
        step: int,
        notes: torch.Tensor,
        bad: torch.Tensor,
        origins: tuple[Origin, ...] = (),
        *,
        overflowed: torch.Tensor | None = None,
    ) -> None:
        """Add a step's summed notes and its flags, all on the device; for a stream, also its rows."""
        flags = torch.stack([bad, torch.zeros_like(bad) if overflowed is None else overflowed]).float()
        values, copied = torch.cat([flags[:1], notes, flags[1:]]), None
        if values.is_cuda:
            on_device, values = values, torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values.copy_(on_device, non_blocking=True)
            copied = torch.cuda.current_stream().record_event()
        self._pending.append((step, values, copied, origins))

    def take(self, *, newest: bool = False) -> list[StepReport]:
        """The reports of all steps but the newest; with `newest`, of that too, which waits for the device."""
        kept = 0 if newest else 1
        ready = self._pending[: len(self._pending) - kept]
        self._pending = self._pending[len(ready) :]
        reports = []
        for step, values, copied, origins in ready:
            if copied is not None:
                copied.synchronize()
            bad, loss, stop, save, *reached, failed, overflowed = values.tolist()
            report = StepReport(
                step=step,
                loss=loss,
                stop=stop > 0,
                save=save > 0,
                failed=failed > 0,
                halvings=sum(processes > 0 for processes in reached),
                bad=bad > 0,
                overflowed=overflowed > 0,
                origins=origins,
            )
            reports.append(report)
        return reports

    def state(self) -> list[tuple[int, list[float], list[Origin]]]:
        """The reports not yet handed out, for a checkpoint."""
        for _, _, copied, _ in self._pending:
            if copied is not None:
                copied.synchronize()
        return [(step, values.tolist(), list(origins)) for step, values, _, origins in self._pending]

    def load_state(self, state: list[tuple[int, list[float], list[Origin]]]) -> None:
        """Restore what `state` returned, without its requests: they have been met."""
        for step, values, origins in state:
            kept = torch.zeros(1 + NOTES + 1)
            kept[: len(values)] = torch.tensor(values)  # older checkpoints lack the last values
            kept[1:][_WISHES] = kept[1:][_FAILED] = 0
            known = tuple((int(part), int(number)) for part, number in origins)
            self._pending.append((step, kept, None, known))
