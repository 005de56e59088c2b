"""The loop's callbacks: counts, metrics.jsonl, and whether a run saves or stops after a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import DefaultFlowCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import SaveStrategy

from falcon_qlora.run_folder.directory import Backlog

if TYPE_CHECKING:
    from falcon_qlora.training.trainer import FalconTrainer


class StepKeeper(DefaultFlowCallback):
    """Counts tokens and the plan's epochs, and tells the trainer where the loop is.

    It replaces the callback that decides when to log, evaluate and save. To the loop the whole run is one
    epoch; what is done once an epoch is done where the plan's epochs end.
    """

    def __init__(self, trainer: FalconTrainer):
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer.before_training()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        share = self._trainer.share
        state.epoch = share.epoch
        state.num_input_tokens_seen += share.global_tokens
        self._trainer.meter.add(
            tokens=share.global_tokens, positions=share.global_positions, capacity=share.global_capacity
        )
        super().on_step_end(args, state, control)
        if share.epoch.is_integer() or state.global_step == state.max_steps:
            super().on_epoch_end(args, state, control)
        # Every save strategy but NO saves the last step.
        control.should_save |= state.global_step == state.max_steps and args.save_strategy != SaveStrategy.NO
        self._trainer.after_step(control)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        pass  # the loop's only epoch ends with the run

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer.end_if_asked()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._trainer.meter.pause("end")
        self._trainer.step.finish(state.global_step)


class MetricsWriter(TrainerCallback):
    """Writes one line for each log step; an evaluation's loss goes into the line of its step.

    Args:
        append: called on the main process with the step and what was logged.
    """

    def __init__(self, append: Callable[[int, dict[str, Any]], None]):
        self._append = Backlog(append, "metrics.jsonl")
        self._held: tuple[int, dict[str, Any]] | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or not {"loss", "eval_loss"} & logs.keys():
            return
        if self._held is not None and self._held[0] == state.global_step:
            logs = {**self._held[1], **logs}
            self._held = None
        self._flush()
        self._held = (state.global_step, dict(logs))
        if "eval_loss" in logs or not control.should_evaluate:
            self._flush()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._flush()

    def _flush(self) -> None:
        if self._held is not None:
            self._append(*self._held)
            self._held = None
