"""Resuming from a checkpoint: the state of the trainer and of each process."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from falcon_qlora.checkpoint import process_state, read
from falcon_qlora.checkpoint.optimizer_parts import has_parts, read_own_rows
from falcon_qlora.common.untrusted import is_count, is_number, read_json

_COUNTS = ("global_step", "num_input_tokens_seen", "best_global_step", "max_steps", "num_train_epochs")
_INTERVALS = ("logging_steps", "eval_steps", "save_steps")  # numbers of steps, also where a share was set
_SWITCHES = ("is_local_process_zero", "is_world_process_zero", "is_hyper_param_search")


def read_process(checkpoint: Path, *, process: int, processes: int, step: int) -> dict[str, Any]:
    """This process's saved state: `random` (see `process_state`), and what else the trainer keeps.

    With another number of processes there is no `random`, and `loss` (since the last log line) is the mean
    over the saved processes.

    Raises:
        UserError: if it is not what processes save at `step`.
    """
    states = process_state.load_states(checkpoint)
    with process_state.reading(checkpoint / process_state.STATES):
        for state in states:
            read.check_process(state, step=step)
    if len(states) == processes:
        return states[process]
    rest = {name: value for name, value in states[0].items() if name != "random"}
    with process_state.reading(checkpoint / process_state.STATES):
        return rest | {"loss": sum(state["loss"] for state in states) / len(states)}


def take_up_random_states(checkpoint: Path, *, seed: int, process: int, processes: int, step: int) -> None:
    """Restore this process's random generators; seed them anew if the number of processes differs."""
    kept = read_process(checkpoint, process=process, processes=processes, step=step)
    if "random" in kept:
        with process_state.reading(checkpoint / process_state.STATES):
            process_state.restore_random_states(kept["random"])
    else:
        process_state.seed_anew(seed, step=step, process=process)


def load_optimizer(
    checkpoint: Path, *, optimizer: Any, scheduler: Any, scaler: Any, step: int, sharded: bool
) -> None:
    """Load the states of the optimizer and the schedule, and check that the scaler's can be loaded.

    Args:
        checkpoint: verified.
        optimizer: over the same parameters, with the resumed run's settings.
        scheduler: of its learning rate.
        scaler: of gradients in fp16, or None; Transformers loads it.
        step: of the checkpoint.
        sharded: whether each process has a part of the model.

    Raises:
        UserError: if a file holds anything else, or is of another run.
    """
    # In fp16 the scaler skips steps, and the schedule skips them too.
    place = step if scaler is None else None
    schedule = process_state.check_plain(checkpoint / process_state.SCHEDULER, dict)
    if sharded or has_parts(checkpoint):
        rates = None
        with process_state.reading(checkpoint / "optimizer-*.pt"):
            read_own_rows(optimizer, checkpoint)
    else:
        kept = process_state.check_plain(checkpoint / process_state.OPTIMIZER, dict, mapped=False)
        with process_state.reading(checkpoint / process_state.OPTIMIZER):
            read.check_optimizer(kept, optimizer)
            rates = [group["lr"] for group in kept["param_groups"]]
            optimizer.load_state_dict(kept)
    with process_state.reading(checkpoint / process_state.SCHEDULER):
        read.check_scheduler(schedule, scheduler, step=place, rates=rates)
        scheduler.load_state_dict(schedule)
        _take_up_rates(scheduler)
    file = checkpoint / process_state.SCALER
    if file.is_file():
        of_scaler = process_state.check_plain(file, dict)
        with process_state.reading(file):
            if scaler is None:
                raise ValueError("it is of a run in fp16, and this one is not")
            read.check_scaler(of_scaler, scaler)


def _take_up_rates(scheduler: Any) -> None:
    """Set the next step's rates by the current schedule: the run may have been made longer."""
    if not isinstance(scheduler, LambdaLR):
        return  # its rates depend on more than the step
    factors = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    rates = [base * factor(scheduler.last_epoch) for base, factor in factors]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    scheduler._last_lr = rates


def check_stateful(checkpoint: Path, callbacks: list[Any]) -> None:
    """Refuse a trainer state that would set anything in a callback beyond what its `state()` lists.

    Args:
        checkpoint: that holds the state.
        callbacks: those of the trainer that have a state.
    """
    kept = read_json(checkpoint / process_state.TRAINER_STATE, not_finite=True)["stateful_callbacks"]
    for callback in callbacks:
        name, told = type(callback).__name__, kept.get(type(callback).__name__)
        for state in told if isinstance(told, list) else [told] if told is not None else []:
            for part, expected in callback.state().items():
                read.require(state[part].keys() == expected.keys(), name)
                for key, value in expected.items():
                    number = is_number(value) and is_number(state[part][key])
                    read.require(number or type(state[part][key]) is type(value), f"{name} {key}")


def check_trainer_state(checkpoint: Path) -> None:
    """Refuse a trainer state of another form, or of another step than its folder's.

    Raises:
        UserError: naming the file.
    """
    from transformers.trainer_callback import TrainerState

    file = checkpoint / process_state.TRAINER_STATE
    state = read_json(file, not_finite=True)  # a skipped step logs a non-finite loss or gradient
    with process_state.reading(file):
        for name in state.keys() - {field.name for field in dataclasses.fields(TrainerState)}:
            raise ValueError(f"{name[:40]!r} is not known")
        for name in (*_COUNTS, *_INTERVALS, "epoch", "total_flos"):
            value = state.get(name)
            fits = is_count(value) if name in _COUNTS else is_number(value)
            if value is not None and (not fits or (name in _INTERVALS and value < 0)):
                raise ValueError(f"{name} is {str(value)[:40]!r}")
        if not isinstance(state.get("best_metric"), float | int | None):  # may be non-finite
            raise ValueError("best_metric is no number")
        if not isinstance(state.get("best_model_checkpoint"), str | None):
            raise ValueError("best_model_checkpoint is no path")
        for name in _SWITCHES:
            if not isinstance(state.get(name, False), bool):
                raise ValueError(f"{name} is {str(state[name])[:40]!r}")
        if f"step-{state.get('global_step')}" != checkpoint.name:
            raise ValueError(f"global_step is {state.get('global_step')} in {checkpoint.name}")
        for name, kind in (("log_history", list), ("stateful_callbacks", dict)):
            if not isinstance(state.get(name), kind):
                raise ValueError(f"{name} is no {kind.__name__}")
        if not all(
            isinstance(line, dict) and isinstance(line.get("step"), int) for line in state["log_history"]
        ):
            raise ValueError("log_history holds a line without a step")
