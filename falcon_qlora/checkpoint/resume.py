"""Going on from a checkpoint: what the trainer and each process remember."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from falcon_qlora.checkpoint.process_state import STATES, load_states, reading
from falcon_qlora.checkpoint.read import check_process
from falcon_qlora.common.untrusted import is_count, is_number, read_json

_COUNTS = ("global_step", "num_input_tokens_seen", "best_global_step", "max_steps", "num_train_epochs")
_INTERVALS = ("logging_steps", "eval_steps", "save_steps")  # a share of the steps was made a number of them
_SWITCHES = ("is_local_process_zero", "is_world_process_zero", "is_hyper_param_search")


def read_process(checkpoint: Path, *, process: int, processes: int, step: int) -> dict[str, Any]:
    """What this process had remembered: `random` (see `process_state`), and what else the trainer keeps.

    With another number of processes there is no `random`, and of the `loss` since the last log line each has
    the mean over those that there were.

    Raises:
        UserError: if it is not what processes remember at `step`.
    """
    states = load_states(checkpoint)
    with reading(checkpoint / STATES):
        for state in states:
            check_process(state, step=step)
    if len(states) == processes:
        return states[process]
    rest = {name: value for name, value in states[0].items() if name != "random"}
    with reading(checkpoint / STATES):
        return rest | {"loss": sum(state["loss"] for state in states) / len(states)}


def check_trainer_state(checkpoint: Path) -> None:
    """Refuse a trainer's state of another form, or of another step than its folder's.

    Raises:
        UserError: naming the file.
    """
    # Here, as it imports PEFT, which bitsandbytes must come before: see models/quantize.py.
    from transformers.trainer import TRAINER_STATE_NAME
    from transformers.trainer_callback import TrainerState

    file = checkpoint / TRAINER_STATE_NAME
    state = read_json(file, not_finite=True)  # the logged loss and gradient of a step that was skipped
    with reading(file):
        for name in state.keys() - {field.name for field in dataclasses.fields(TrainerState)}:
            raise ValueError(f"{name[:40]!r} is not known")
        for name in _COUNTS:
            value = state.get(name)
            if value is not None and not is_count(value):
                raise ValueError(f"{name} is {str(value)[:40]!r}")
        for name in _INTERVALS:
            value = state.get(name)
            if value is not None and (not is_number(value) or value < 0):
                raise ValueError(f"{name} is {str(value)[:40]!r}")
        for name in ("epoch", "total_flos"):
            if state.get(name) is not None and not is_number(state[name]):
                raise ValueError(f"{name} is {str(state[name])[:40]!r}")
        if not isinstance(state.get("best_metric"), float | int | None):  # not finite, where a model broke
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
