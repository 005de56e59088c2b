"""The rate of every step: Transformers' own but for a first step at 0, also where a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments, get_scheduler

from falcon_qlora.checkpoint import process_state
from falcon_qlora.checkpoint.resume import load_optimizer
from falcon_qlora.common.errors import UserError
from falcon_qlora.common.settings import settings_of
from falcon_qlora.config.trainer_arguments import TrainerArguments
from falcon_qlora.training.schedule import check, schedule

PEAK = 3e-4
MORE: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 1},
}
SCHEDULES = [
    *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"),
    *("inverse_sqrt", *MORE),
]


def arguments(name: str, warmup: float) -> TrainingArguments:
    return TrainingArguments(
        lr_scheduler_type=name, warmup_steps=warmup, lr_scheduler_kwargs=MORE.get(name), use_cpu=True
    )


def optimizer(kind: type[torch.optim.Optimizer] = torch.optim.AdamW) -> Any:
    return kind([torch.nn.Parameter(torch.ones(3)) for _ in range(2)], lr=PEAK)  # type: ignore[call-arg]


def rates(made: Any, steps: int) -> list[float]:
    """Of each step, and they are those that the optimizer has."""
    found = []
    for _ in range(steps):
        assert [group["lr"] for group in made.optimizer.param_groups] == made.get_last_lr()
        found.append(made.get_last_lr()[0])
        made.optimizer.step()
        made.step()
    return found


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    ("steps", "warmup"), [(1, 0), (1, 0.03), (1, 1), (2, 0.03), (3, 5), (5, 5), (40, 0.1), (40, 0), (40, 7)]
)
def test_a_first_step_trains_and_all_others_have_the_rates_of_transformers(
    name: str, steps: int, warmup: float
) -> None:
    args = arguments(name, warmup)
    found = rates(schedule(args, optimizer(), steps=steps), steps)
    warm_up = args.get_warmup_steps(steps)
    theirs = get_scheduler(
        name,
        optimizer=optimizer(),
        num_warmup_steps=warm_up,
        num_training_steps=max(steps, 2) if name == "polynomial" else steps,
        scheduler_specific_kwargs=MORE.get(name),
    )
    expected = [theirs.get_last_lr()[0]]
    for _ in range(steps - 1):
        theirs.optimizer.step()
        theirs.step()
        expected.append(theirs.get_last_lr()[0])
    if expected[0] == 0:
        # By the ramp's own formula, step / warm-up.
        expected[0] = PEAK * (1 / warm_up)
    assert found == expected
    assert found[0] > 0


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("step", [1, 6])
def test_a_run_that_goes_on_longer_has_the_rates_of_the_longer_run(
    tmp_path: Path, name: str, step: int
) -> None:
    for steps in (6, 9):
        before = schedule(arguments(name, 0.3), optimizer(), steps=6)
        rates(before, step)
        torch.save(before.optimizer.state_dict(), tmp_path / process_state.OPTIMIZER)
        torch.save(before.state_dict(), tmp_path / process_state.SCHEDULER)
        whole = schedule(arguments(name, 0.3), optimizer(), steps=steps)
        expected = rates(whole, steps)[step:]
        goes_on = schedule(arguments(name, 0.3), optimizer(), steps=steps)
        load_optimizer(
            tmp_path, optimizer=goes_on.optimizer, scheduler=goes_on, scaler=None, step=step, sharded=False
        )
        assert rates(goes_on, steps - step) == expected
        assert goes_on.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1}),
        ("warmup_stable_decay", {"num_decay_steps": 4}),
    ],
)
def test_schedules_that_need_more_have_it(name: str, theirs: dict[str, Any]) -> None:
    args = TrainingArguments(lr_scheduler_type=name, use_cpu=True)
    expected = get_scheduler(
        name,
        optimizer=optimizer(),
        num_warmup_steps=0,
        num_training_steps=40,
        scheduler_specific_kwargs=theirs,
    )
    assert rates(schedule(args, optimizer(), steps=40), 40) == rates(expected, 40)


def checked(*given: str, **settings: Any) -> str:
    try:
        check(TrainingArguments(use_cpu=True, **settings), given)
    except UserError as error:
        return str(error)
    return ""


def test_every_optimizer_and_schedule_that_is_offered_takes_a_step() -> None:
    offered = {each.name: each.choices or () for each in settings_of(TrainerArguments)}
    for optim in offered["optim"]:
        assert checked(optim=optim) == ""
    for name in offered["lr_scheduler_type"]:
        assert checked(lr_scheduler_type=name, eval_strategy="epoch") == ""


@pytest.mark.parametrize(
    ("settings", "given", "told"),
    [
        ({"optim": "lomo"}, (), "--optim lomo: You need to install `lomo_optim`"),
        ({"optim": "sgd", "optim_args": "momentum"}, (), "with --optim_args momentum: not enough"),
        ({"optim": "sgd", "optim_args": "momentum=0.9,beta=1"}, (), "--optim_args: beta=1 changes nothing"),
        ({"optim": "adamw_torch", "optim_args": "eps=1"}, (), "eps=1 changes nothing of --optim adamw_torch"),
        ({"optim": "rmsprop_bnb", "optim_args": "alpha=0.9"}, (), "it does not take them"),
        ({"optim": "sgd", "adam_beta1": 0.5}, ("adam_beta1",), "--adam_beta1 is not read by --optim sgd"),
        ({"optim": "sgd", "adam_beta1": 0.5}, (), ""),
        ({"optim": "lion_32bit", "adam_beta1": 0.5}, ("adam_beta1",), ""),
        (
            {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"power": 2}},
            (),
            '--lr_scheduler_type linear with --lr_scheduler_kwargs {"power": 2}: ',
        ),
        ({"lr_scheduler_type": "polynomial", "learning_rate": 1e-9}, (), "lr_end (1e-07) must be smaller"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_loaded(
    settings: dict[str, Any], given: tuple[str, ...], told: str
) -> None:
    found = checked(*given, **settings)
    assert told in found
    assert bool(told) == bool(found)
