"""One optimizer step of one process: micro-batches, a loss weighted by tokens, one reduction, clipping.

What every process must agree on travels with the gradients. Whether the step counts is known on the device
only. The host waits to know it only if the optimizer cannot skip a step by itself.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from falcon_qlora.common.errors import UserError
from falcon_qlora.data.batches import Share
from falcon_qlora.models import zero3
from falcon_qlora.models.sharded import is_sharded, needs_all_processes
from falcon_qlora.processes import agreement, devices, stop_signals
from falcon_qlora.step.agreed import Reports, StepReport, notes
from falcon_qlora.step.bad_steps import BadSteps
from falcon_qlora.step.loss import accumulate_gradients
from falcon_qlora.step.reduction import Reduction, ShardedReduction
from falcon_qlora.terminal.console import note


class Step:
    """Turns a process's share of a global batch into gradients, and has the optimizer skip bad ones.

    Args:
        model: with packing enabled and a method attached.
        device: of this process.
        processes: how many train together.
        max_grad_norm: norm to which gradients are clipped; 0: no clipping.
        bad_steps: counts the skipped steps.
        wants_save: whether this process wants a checkpoint now.
        save_failed: whether a checkpoint that it wrote is not what was in memory.
        at: gets the step's progress; see `Watchdog.at`.

    Attributes:
        halvings: how often every micro-batch is halved, after OOM.
        gradient_norm: of the last step, before clipping: a scalar on the device.
        reached: whether a step that counts had a gradient other than zero: a scalar on the device.
        reports: what the processes agreed on.
        reduction: holds the gradients.
        shrink: in a first step that may be cut anew: given the ranks that ran out of memory, returns this
            process's share in smaller micro-batches, or None if there are none. None for other steps.
        room_bytes: of the optimizer's state, which is there from the first step's end on. A first step that
            may be cut anew is computed beside so much taken memory, so that it fits as the next one will.
        room: that memory, while it is taken.
    """

    gradient_norm: Tensor
    room: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device,
        processes: int,
        max_grad_norm: float,
        bad_steps: BadSteps,
        wants_save: Callable[[], bool],
        save_failed: Callable[[], bool],
        at: Callable[[int, int, str], None],
    ):
        self.halvings = 0
        self._counted = torch.zeros((), device=device)  # steps with a finite loss, until `mean_of_counted`
        self.reached = torch.zeros((), device=device, dtype=torch.bool)
        self.reports = Reports()
        self.shrink: Callable[[list[int]], Share | None] | None = None
        self.room_bytes, self.room = 0, None
        self.bad_steps = bad_steps
        self._sharded = is_sharded(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        kind = ShardedReduction if self._sharded else Reduction
        self.reduction = kind(trained, processes=processes, can_retry=not needs_all_processes(model))
        self._device = device
        self._processes = processes
        self._max_grad_norm = max_grad_norm
        self._wants_save, self._save_failed = wants_save, save_failed
        self._at = at

    def begin(self, optimizer: Any, accelerator: Any, backward: Callable[[Tensor], None]) -> None:
        """Take over what the loop has prepared, and give all processes the same parameters.

        Args:
            optimizer: PyTorch's or ZeRO-3's.
            accelerator: Accelerate's, which clips, and which has a scaler in fp16.
            backward: Accelerate's, which scales the loss in fp16, or ZeRO-3's.
        """
        self._optimizer, self._accelerator, self._backward = optimizer, accelerator, backward
        self._scaler: Any = accelerator.scaler
        self._in_zero3 = isinstance(optimizer, zero3.Zero3Optimizer)
        self._counted.zero_()
        self.reduction.share_parameters()

    def __call__(self, model: nn.Module, share: Share) -> Tensor:
        """Leave the clipped gradients of the global batch's mean loss in the parameters.

        Args:
            model: as the loop prepared it, in training mode.
            share: this process's part of the global batch.

        Returns:
            A float32 scalar, detached, whose mean over the processes is the global batch's mean loss; zero
            if that is non-finite.

        Raises:
            UserError, torch.OutOfMemoryError: see `accumulate_gradients`.
        """
        self._at(share.step + 1, 1, "computing")
        loss, halvings = self._accumulate(model, share)
        stop = stop_signals.asked_to_stop() is not None
        told = notes(loss, stop=stop, save=self._wants_save(), failed=self._save_failed(), halvings=halvings)
        self._at(share.step + 1, 2, "adding up the gradients")
        agreed = self.reduction(told)
        whole = agreed[0].isfinite()
        self.gradient_norm = self._clip(model)
        bad, overflowed = ~whole, ~self.gradient_norm.isfinite()
        if self._scaler is None or self._scaler.get_scale() < 1:
            # In fp16 the scaler handles gradients that overflow: it skips the step and halves its scale.
            # Below a scale of 1 no finite gradient overflows, so a non-finite one is bad.
            bad |= overflowed
        self.reached |= (self.gradient_norm > 0) & self.gradient_norm.isfinite() & ~bad
        self.reports.put(share.step, agreed, bad, share.origins, overflowed=overflowed & ~bad)
        self._leave_out(model, bad)
        self._counted += whole
        return torch.where(whole, loss * self._processes, 0.0)

    def _accumulate(self, model: nn.Module, share: Share) -> tuple[torch.Tensor, int]:
        """The gradients of this process's share; in a first step all processes agree on how it is cut."""
        accumulate = functools.partial(
            accumulate_gradients,
            model,
            device=self._device,
            reduction=self.reduction,
            backward=self._backward,
            halvings=self.halvings,
        )
        shrink, self.shrink = self.shrink, None
        while shrink is not None:
            found, undo_draws = None, devices.undo_draws_since(self._device)
            with contextlib.suppress(torch.OutOfMemoryError):
                self.room = torch.empty(self.room_bytes, dtype=torch.uint8, device=self._device)
                found = accumulate(share, can_split=False)
            self.room = None
            self._at(share.step + 1, 2, "waiting for the others")
            without = [rank for rank, fits in enumerate(agreement.met_by_all(found is not None)) if not fits]
            if found is not None and not without:
                return found
            self.reduction.clear()
            undo_draws()
            devices.free_memory()
            smaller = shrink(without)
            self._at(share.step + 1, 1, "computing")
            if smaller is None:  # the smallest may still be split
                break
            share = smaller
        return accumulate(share)

    def _clip(self, model: nn.Module) -> Tensor:
        """Clip the gradients; return their norm before that."""
        if self._in_zero3:  # whose engine clips
            return self._optimizer.gradient_norm()
        norm = self._accelerator.clip_grad_norm_(model.parameters(), self._max_grad_norm or float("inf"))
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of a sharded model

    def _leave_out(self, model: nn.Module, bad: Tensor) -> None:
        """Have the optimizer skip the step where `bad` is true."""
        told = getattr(self._optimizer, "_step_supports_amp_scaling", False)
        told &= self._in_zero3 or not self._sharded
        if self._scaler is None and told:
            # Fused optimizers change nothing where this is 1: the host need not wait.
            self._optimizer.found_inf = bad.float()
        elif bool(bad):
            # The others have no such switch, and with zero gradients weights and moments would still decay.
            # So the host waits to know. bitsandbytes' step waits anyway, after every parameter.
            model.zero_grad(set_to_none=True)

    def heed(self) -> list[StepReport]:
        """Act on the reports of all steps but the newest.

        Raises:
            UserError: if too many steps in a row were bad; on every process alike.
        """
        reports = self.reports.take()
        for report in reports:
            if report.halvings > self.halvings and self.reduction.can_retry:
                self.halvings = report.halvings
                note(
                    f"out of memory at step {report.step + 1}: retried with smaller micro-batches. From here "
                    f"on each is split into {2**self.halvings} on all processes; the global batch stays the "
                    "same"
                )
            self.bad_steps.see(report)
        return reports

    def finish(self, steps: int) -> None:
        """Act on the last step's report, which no step follows.

        Args:
            steps: of the run so far.

        Raises:
            UserError: if too many steps in a row were bad, or all were.
        """
        for report in self.reports.take(newest=True):
            self.bad_steps.see(report)
        if 0 < steps <= self.bad_steps.total:
            raise UserError(
                f"all {steps:,} steps had a non-finite loss or gradient (NaN/inf) and were skipped: nothing "
                "was learned, and no adapter is written. Look at the rows above and the base model; lower "
                "--learning_rate, or compute in bf16 or fp32"
            )

    def mean_of_counted(self, mean: float, steps: int) -> float:
        """The mean loss of those steps that had a finite one since the last call, given the mean of all.

        Args:
            mean: with zero for a step whose loss was not.
            steps: how many there were.
        """
        counted = int(self._counted)
        self._counted.zero_()
        if counted == steps:
            return mean
        return mean * steps / counted if counted else float("nan")

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "counted": float(self._counted),
            "halvings": self.halvings,
            "bad_steps": self.bad_steps.state(),
            "reports": self.reports.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self._counted.fill_(state["counted"])
        self.halvings = state["halvings"]
        if self.halvings and not self.reduction.can_retry:
            # Shares that are split differ in their number of micro-batches, and each needs all processes.
            self.halvings = 0
            note("micro-batches were split after OOM, and are whole again: shared out, none can be split")
        self.bad_steps.load_state(state["bad_steps"])
        self.reports.load_state(state["reports"])
