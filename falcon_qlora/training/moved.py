"""Whether a run has trained anything, and if not, why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.quantities import counted
from falcon_qlora.methods.interface import method_of
from falcon_qlora.models import zero3
from falcon_qlora.models.sharded import local_tensor
from falcon_qlora.processes import agreement

if TYPE_CHECKING:
    from falcon_qlora.training.trainer import FalconTrainer


def footprint(model: nn.Module) -> str:
    """A hash of all trained parameters on this process; it is the same after the same steps."""
    return agreement.checksum(
        parameter.ds_tensor if zero3.is_part(parameter) else local_tensor(parameter)
        for parameter in _trained(model)
    )


def require_moved(trainer: FalconTrainer, *, is_trial: bool) -> None:
    """Refuse a run whose weights are as they were at the start; every process calls this.

    Every number is compared, by a checksum. An adapter is refused too if all tensors that start at zero are
    still zero: it computes what the base does, even if weight decay has changed its other tensors.

    Args:
        trainer: done.
        is_trial: whether it took a dry run's one step, which in float16 may overflow, as a run's first ones.

    Raises:
        UserError: saying why.
    """
    model = trainer.model
    same = agreement.gather_objects(footprint(model) == trainer.footprint_at_start)
    if not all(same) and not _is_still_zero(model):
        return
    if is_trial and trainer.step.bad_steps.overflowed:  # a run goes on with half the scale; a trial ends
        return
    raise UserError(
        f"nothing was trained: after {counted(trainer.state.global_step, 'step')} the weights "
        f"that {method_of(model).title} trains have not changed. {_why(trainer)}. No adapter is written"
    )


def has_learned(trainer: FalconTrainer) -> bool | None:
    """True if the weights that the model has now have taken a step; None if that is not known."""
    step, first = trainer.kept_step, trainer.first_learning_step
    # In fp16 the scaler skips steps too, and how many is known a step late.
    all_count = trainer.step.bad_steps.total == 0 and trainer.accelerator.scaler is None
    return True if first is not None and all_count and step is not None and step >= first else None


def _trained(model: nn.Module) -> list[Any]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _is_still_zero(model: nn.Module) -> bool:
    method = method_of(model)
    if method.is_whole or not method.starts_at_zero:
        return False
    tensors = method.saved_tensors(model).items()
    return not any(bool(tensor.any()) for name, tensor in tensors if name.endswith(method.starts_at_zero))


def _why(trainer: FalconTrainer) -> str:
    args, bad = trainer.args, trainer.step.bad_steps.total
    if trainer.state.global_step == trainer.began_at:
        return "Nor had they at the checkpoint, and no step was left"
    if trainer.first_learning_step is None:
        return (
            "The learning rate was 0 in every step: look at --learning_rate "
            f"({args.learning_rate:g}), --lr_scheduler_type and --warmup_steps"
        )
    if not bool(trainer.step.reached):
        if trainer.step.bad_steps.overflowed:
            return (
                f"No step had a finite gradient: {counted(trainer.step.bad_steps.overflowed, 'step')} "
                "overflowed in float16, each of which halves the loss scale. Train for more steps, or give "
                "--compute_dtype bf16 or fp32"
            )
        skipped = f"; {bad:,} steps were skipped as non-finite" if bad else ""
        return (
            f"No step had a finite gradient other than zero{skipped}: the loss reaches nothing that is "
            "trained"
        )
    dtype = str(_trained(trainer.model)[0].dtype).removeprefix("torch.")
    return (
        f"Every update was lost in rounding, as the weights are {dtype}: raise --learning_rate "
        f"({args.learning_rate:g}) or look at the gradients"
    )
