"""The learning rate of each step: Transformers' schedules, whose first step trains too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler


def schedule(args: TrainingArguments, optimizer: Optimizer, *, steps: int) -> Any:
    """The schedule that the settings ask for over a run of `steps`.

    Transformers' warm-up begins at a rate of 0: its first step changes nothing, and a share of warm-up is
    rounded up to at least that step, so that a run of one step would train nothing. Here such a first step
    has the rate of the second, 1 / warm-up of the peak. All other rates are Transformers' own to the last
    bit, so that a run of before goes on as it would have.
    """
    warm_up = args.get_warmup_steps(steps)
    made = get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=warm_up,
        # A decay over no steps would divide by zero, or begin at its end.
        num_training_steps=max(steps, warm_up + 1),
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    if isinstance(made, LambdaLR) and not any(factor(0) for factor in made.lr_lambdas):
        return LambdaLR(optimizer, [functools.partial(_from_second, factor) for factor in made.lr_lambdas])
    return made


def _from_second(factor: Callable[[int], float], step: int) -> float:
    return factor(max(step, 1))
