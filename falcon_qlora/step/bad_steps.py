"""Steps whose loss or gradient is not finite, and losses that jump."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from falcon_qlora.common.errors import UserError
from falcon_qlora.step.agreed import StepReport

# A spike is a loss this far above the recent ones, in their standard deviations and as a share of them.
_SPIKE_DEVIATIONS = 6.0
_SPIKE_SHARE = 0.5
_SPIKE_AFTER_STEPS = 20
_RECENT = 0.05


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
        loss = report.loss
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
