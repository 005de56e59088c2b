"""What the processes agreed on in a step, read a step late, so that the host need not wait for the device.

Of every step the device keeps a few numbers: the global loss, whether it or the gradient is not finite, what
any process asked for. They are copied to the host behind the step and read when the next one is on its way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from falcon_qlora.common.errors import UserError
from falcon_qlora.data.origins import Origin
from falcon_qlora.step.global_batch import Agreed

# A spike is a loss this far above the recent ones, in their standard deviations and as a share of them.
_SPIKE_DEVIATIONS = 6.0
_SPIKE_SHARE = 0.5
_SPIKE_AFTER_STEPS = 20
_RECENT = 0.05


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One step as all processes see it.

    Attributes:
        step: from 0.
        agreed: loss and wishes.
        bad: whether the loss or the gradient was not finite, so that the step changed nothing.
        origins: of a stream, the rows that made the step.
    """

    step: int
    agreed: Agreed
    bad: bool
    origins: tuple[Origin, ...] = ()


class Reports:
    """Keeps the newest step's report on its way to the host and hands out the one before."""

    def __init__(self) -> None:
        self._pending: list[tuple[int, torch.Tensor, Any, tuple[Origin, ...]]] = []

    def put(
        self, step: int, notes: torch.Tensor, bad: torch.Tensor, origins: tuple[Origin, ...] = ()
    ) -> None:
        """Take up a step's summed notes and its bad flag, both on the device; of a stream, also its rows."""
        values = torch.cat([bad.float().reshape(1), notes])
        if not values.is_cuda:
            self._pending.append((step, values, None, origins))
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._pending.append((step, host, copied, origins))

    def take(self, *, newest: bool = False) -> list[StepReport]:
        """The reports of the steps before the newest; with `newest`, its too, which waits for the device."""
        kept = 0 if newest else 1
        ready = self._pending[: len(self._pending) - kept]
        self._pending = self._pending[len(ready) :]
        reports = []
        for step, values, copied, origins in ready:
            if copied is not None:
                copied.synchronize()
            bad, *notes = values.tolist()
            reports.append(StepReport(step=step, agreed=Agreed.of(notes), bad=bad > 0, origins=origins))
        return reports

    def state(self) -> list[tuple[int, list[float], list[Origin]]]:
        """The reports not yet handed out, for a checkpoint."""
        for _, _, copied, _ in self._pending:
            if copied is not None:
                copied.synchronize()
        return [(step, values.tolist(), list(origins)) for step, values, _, origins in self._pending]

    def load_state(self, state: list[tuple[int, list[float], list[Origin]]]) -> None:
        """Go on from what `state` returned, without what was wished for then: it has been heeded."""
        for step, values, origins in state:
            kept = torch.tensor(values)
            kept[1 + Agreed.WISHES.start : 1 + Agreed.WISHES.stop] = 0
            known = tuple((int(part), int(number)) for part, number in origins)
            self._pending.append((step, kept, None, known))


class BadSteps:
    """Counts the steps that came to nothing, and sees a loss that jumps.

    Args:
        most: stop at so many in a row; 0: never.
        rows_of: which rows of the data made a step, in words.
        say: prints a line to the user.
    """

    def __init__(self, *, most: int, rows_of: Callable[[StepReport], str], say: Callable[[str], None]):
        self.total = 0
        self._most = most
        self._rows_of = rows_of
        self._say = say
        self._in_a_row = 0
        self._steps = 0
        self._mean = 0.0
        self._variance = 0.0

    def see(self, report: StepReport) -> None:
        """Take in a step.

        Raises:
            UserError: if there were too many bad ones in a row; on every process alike.
        """
        if not report.bad:
            self._in_a_row = 0
            self._see_loss(report)
            return
        self.total += 1
        self._in_a_row += 1
        where = f"step {report.step + 1} ({self._rows_of(report)})"
        self._say(f"{where}: the loss or its gradient is not finite; the step was skipped")
        if self._most and self._in_a_row >= self._most:
            raise UserError(
                f"{self._in_a_row} steps in a row had a loss or gradient that is not finite, the last one "
                f"{where}. Nothing was changed by them. Look at these rows; lower --learning_rate, compute "
                "in bf16 or fp32; --max_bad_steps allows more"
            )

    def _see_loss(self, report: StepReport) -> None:
        loss = report.agreed.loss
        above = max(_SPIKE_DEVIATIONS * self._variance**0.5, _SPIKE_SHARE * abs(self._mean))
        if self._steps >= _SPIKE_AFTER_STEPS and loss > self._mean + above:
            self._say(
                f"step {report.step + 1} ({self._rows_of(report)}): the loss jumped to {loss:.4g}; "
                f"lately it was {self._mean:.4g}"
            )
        weight = max(_RECENT, 1 / (self._steps + 1))
        change = loss - self._mean
        self._mean += weight * change
        self._variance = (1 - weight) * (self._variance + weight * change * change)
        self._steps += 1

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {
            "total": self.total,
            "in_a_row": self._in_a_row,
            "steps": self._steps,
            "mean": self._mean,
            "variance": self._variance,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.total, self._in_a_row, self._steps = state["total"], state["in_a_row"], state["steps"]
        self._mean, self._variance = state["mean"], state["variance"]
