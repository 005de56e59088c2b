"""Steps with a non-finite loss or gradient, those that the scaler of fp16 left out, and losses that jump."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from falcon_qlora.common.errors import UserError
from falcon_qlora.step.agreed import StepReport

# A spike is above the recent mean by this many standard deviations, and by this share of the mean.
_SPIKE_DEVIATIONS = 6.0
_SPIKE_SHARE = 0.5
_SPIKE_AFTER_STEPS = 20
_RECENT = 0.05
_KEPT = ("total", "in_a_row", "steps", "mean", "variance")  # in checkpoints


@dataclass(kw_only=True, eq=False)
class BadSteps:
    """Counts the skipped steps and reports a loss that jumps.

    Args:
        most: stop after this many in a row; 0: never.
        rows_of: names the rows of the data that made a step.
        say: prints a line to the user.
    """

    most: int
    rows_of: Callable[[StepReport], str]
    say: Callable[[str], None]
    total: int = field(default=0, init=False)
    in_a_row: int = field(default=0, init=False)
    steps: int = field(default=0, init=False)
    mean: float = field(default=0.0, init=False)
    variance: float = field(default=0.0, init=False)
    overflowed: int = field(default=0, init=False)

    def see(self, report: StepReport) -> None:
        """Count a step.

        Raises:
            UserError: if too many steps in a row were bad; on every process alike.
        """
        if report.overflowed:
            self.overflowed += 1
            if self.overflowed == 1:
                self.say(
                    f"step {report.step + 1}: a gradient overflowed in float16; the step was skipped and the "
                    "loss scale halved. A few such steps are usual; the summary counts them"
                )
        if not report.bad:
            self.in_a_row = 0
            self._see_loss(report)
            return
        self.total += 1
        self.in_a_row += 1
        where = f"step {report.step + 1} ({self.rows_of(report)})"
        self.say(f"{where}: non-finite loss or gradient (NaN/inf); the step was skipped")
        if self.most and self.in_a_row >= self.most:
            raise UserError(
                f"{self.in_a_row} steps in a row had a non-finite loss or gradient (NaN/inf), the last one "
                f"{where}. They updated no weights. Look at these rows; lower --learning_rate, compute in "
                "bf16 or fp32; --max_bad_steps allows more"
            )

    def _see_loss(self, report: StepReport) -> None:
        loss = report.loss
        above = max(_SPIKE_DEVIATIONS * self.variance**0.5, _SPIKE_SHARE * abs(self.mean))
        if self.steps >= _SPIKE_AFTER_STEPS and loss > self.mean + above:
            self.say(
                f"step {report.step + 1} ({self.rows_of(report)}): the loss jumped to {loss:.4g}; "
                f"lately it was {self.mean:.4g}"
            )
        weight = max(_RECENT, 1 / (self.steps + 1))
        change = loss - self.mean
        self.mean += weight * change
        self.variance = (1 - weight) * (self.variance + weight * change * change)
        self.steps += 1

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {name: getattr(self, name) for name in (*_KEPT, "overflowed")}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        for name in _KEPT:
            setattr(self, name, state[name])
        self.overflowed = state.get("overflowed", 0)  # older checkpoints lack it
