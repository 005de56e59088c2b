"""The optimizer, and Transformers' learning-rate schedules, changed so that the first step trains too."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments, get_scheduler

from falcon_qlora.common.errors import UserError, first_line
from falcon_qlora.processes import devices

_LEAST_OF_COSINE = 0.1  # of the peak, where --lr_scheduler_kwargs says nothing
_SHARE_OF_DECAY = 0.1  # of all steps, likewise
_LARGE_ENOUGH = 64  # rows and columns of a matrix whose state 8-bit optimizers keep in 8 bits


def schedule(args: TrainingArguments, optimizer: Optimizer, *, steps: int) -> Any:
    """The schedule that the settings ask for over a run of `steps`.

    Transformers' warm-up begins at a rate of 0, so its first step changes nothing. A share of warm-up is
    rounded up to at least that step, so a run of one step would train nothing. Here such a first step has the
    rate of the second, 1 / warm-up of the peak. All other rates are bitwise Transformers' own, so an older
    run resumes unchanged.
    """
    warm_up = args.get_warmup_steps(steps)
    made = get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=warm_up,
        # A decay over no steps would divide by zero, or begin at its end.
        num_training_steps=max(steps, warm_up + 1),
        scheduler_specific_kwargs=_more(args, steps),
    )
    if isinstance(made, LambdaLR) and not any(factor(0) for factor in made.lr_lambdas):
        return LambdaLR(optimizer, [functools.partial(_from_second, factor) for factor in made.lr_lambdas])
    return made


def _more(args: TrainingArguments, steps: int) -> dict[str, Any]:
    """The schedule's arguments beside the steps: those that the user gave, and those it requires."""
    given = args.lr_scheduler_kwargs or {}
    if "min_lr" in args.lr_scheduler_type and not given.keys() & {"min_lr", "min_lr_rate"}:
        return {"min_lr_rate": _LEAST_OF_COSINE, **given}
    if args.lr_scheduler_type == "warmup_stable_decay":
        return {"num_decay_steps": math.ceil(_SHARE_OF_DECAY * steps), **given}
    return given


def check(args: TrainingArguments, given: Collection[str]) -> None:
    """Take a step of the optimizer on a small matrix, and make the schedule, before anything large is loaded.

    Args:
        given: names of the settings that a flag gave.

    Raises:
        UserError: if either fails, or a setting that was given for them is not read.
    """
    matrix = torch.nn.Parameter(torch.zeros(_LARGE_ENOUGH, _LARGE_ENOUGH, device=devices.local_device()))
    matrix.grad = torch.zeros_like(matrix)
    optim, more = args.optim.value, args.optim_args
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, None)
        optimizer = kind([{"params": [matrix], "weight_decay": args.weight_decay}], **settings)
        optimizer.step()
    except (ImportError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        told = f" with --optim_args {more}" if more else ""
        reason = "it does not take them" if more and isinstance(error, TypeError) else first_line(error)
        raise UserError(f"--optim {optim}{told}: {reason}") from None

    def is_read(name: str, other: Any) -> bool:
        changed = copy.copy(args)
        setattr(changed, name, other)
        return Trainer.get_optimizer_cls_and_kwargs(changed, None) != (kind, settings)

    for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if name in given and not is_read(name, getattr(args, name) / 2 + 0.1):
            raise UserError(f"--{name} is not read by --optim {optim}: drop it")
    parts = more.split(",") if more else []
    for part in parts:
        if not is_read("optim_args", ",".join(other for other in parts if other is not part)):
            raise UserError(f"--optim_args: {part} changes nothing of --optim {optim}: drop it")
    try:
        schedule(args, optimizer, steps=max(args.max_steps, 1))
    except (ValueError, TypeError, AttributeError) as error:
        kwargs = args.lr_scheduler_kwargs
        told = f" with --lr_scheduler_kwargs {json.dumps(kwargs)}" if kwargs else ""
        raise UserError(
            f"--lr_scheduler_type {args.lr_scheduler_type.value}{told}: {first_line(error)}"
        ) from None


def _from_second(factor: Callable[[int], float], step: int) -> float:
    return factor(max(step, 1))
