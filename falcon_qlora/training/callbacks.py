"""What listens to the loop: counts, metrics.jsonl, and the steps' ends at which a run saves or stops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from falcon_qlora.data.batches import Share
from falcon_qlora.run_folder.backlog import Backlog
from falcon_qlora.training.throughput import Meter


class Loop(Protocol):
    """What the trainer does where its loop comes to these places."""

    share: Share
    meter: Meter

    def before_training(self) -> None: ...
    def after_step(self, control: TrainerControl) -> None: ...
    def end_if_asked(self) -> None: ...
    def finish_reports(self) -> None: ...


class StepKeeper(TrainerCallback):
    """Keeps count of tokens and of the epoch of the plan, and tells the trainer where the loop is."""

    def __init__(self, trainer: Loop):
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.before_training()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        share = self._trainer.share
        state.epoch = share.epoch
        state.num_input_tokens_seen += share.global_tokens
        self._trainer.meter.add(
            tokens=share.global_tokens, positions=share.global_positions, capacity=share.global_capacity
        )
        if share.epoch.is_integer() or state.global_step == state.max_steps:
            _end_epoch(args, state, control)
        self._trainer.after_step(control)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.end_if_asked()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._trainer.meter.pause()
        self._trainer.finish_reports()


def _end_epoch(args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
    """Do what is to be done once an epoch: to the loop, which sees steps, the whole run is one."""
    control.should_log |= args.logging_strategy == "epoch"
    control.should_evaluate |= args.eval_strategy == "epoch" and args.eval_delay <= (state.epoch or 0)
    control.should_save |= args.save_strategy == "epoch"


class MetricsWriter(TrainerCallback):
    """Writes one line a log step, the evaluation's loss in the line of its step.

    Args:
        append: called on the main process with the step and what was logged.
    """

    def __init__(self, append: Callable[[int, dict[str, Any]], None]):
        self._append = Backlog(append, "metrics.jsonl")
        self._held: tuple[int, dict[str, Any]] | None = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or not {"loss", "eval_loss"} & logs.keys():
            return
        if self._held is not None and self._held[0] == state.global_step:
            logs = {**self._held[1], **logs}
            self._held = None
        self._flush()
        self._held = (state.global_step, dict(logs))
        if "eval_loss" in logs or not control.should_evaluate:
            self._flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._flush()

    def _flush(self) -> None:
        if self._held is not None:
            self._append(*self._held)
            self._held = None
