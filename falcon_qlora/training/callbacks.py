"""The loop's callbacks: counts, metrics.jsonl, and whether a run saves or stops after a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import DefaultFlowCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import SaveStrategy

from falcon_qlora.checkpoint.insist import until_written
from falcon_qlora.common.errors import UserError
from falcon_qlora.processes import agreement, lookout, stop_signals
from falcon_qlora.processes.stop_signals import Stopped
from falcon_qlora.run_folder.directory import Backlog
from falcon_qlora.terminal.console import note
from falcon_qlora.training.loop_state import moment_of

if TYPE_CHECKING:
    from falcon_qlora.training.trainer import FalconTrainer


class StepKeeper(DefaultFlowCallback):
    """Counts tokens and the plan's epochs, and saves or ends the run where the processes agree to.

    It replaces the callback that decides when to log, evaluate and save. To the loop the whole run is one
    epoch; what is done once an epoch is done where the plan's epochs end.
    """

    def __init__(self, trainer: FalconTrainer):
        self._trainer = trainer
        self._ending: UserError | None = None
        self._stopping = False

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._stopping, self._ending = False, None
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
        self._heed(state, control)
        if not (control.should_evaluate or control.should_save or control.should_training_stop):
            self._trainer.read_ahead()  # the loop may wait for the device next, to log the loss

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        pass  # the loop's only epoch ends with the run

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End the run here if it was asked to stop and has steps left, or if too many steps were bad.

        Raises:
            Stopped, UserError: on every process.
        """
        if self._ending is None and not self._stopping:
            return
        if self._ending is None and state.global_step >= state.max_steps:
            return  # the adapter is what is kept
        failure = self._settle_for_good(state)
        if self._ending is not None:
            unsaved = "" if failure is None else f" The checkpoint of now could not be saved ({failure})."
            last = agreement.from_main_process(self._trainer.checkpointer.last_complete)
            raise UserError(f"{self._ending}.{unsaved} {last}")
        raise Stopped(state.global_step, failure)

    def _settle_for_good(self, state: TrainerState) -> str | None:
        """Wait for the save after which the run ends, see `until_written`; why it failed, or None."""
        trainer, checkpointer = self._trainer, self._trainer.checkpointer
        best = state.best_metric, state.best_global_step, state.best_model_checkpoint

        def again() -> str | None:
            state.best_metric, state.best_global_step, state.best_model_checkpoint = best
            checkpointer.save(moment_of(trainer))
            trainer.settle()
            return checkpointer.failure

        trainer.meter.pause("saves")
        trainer.settle()
        if checkpointer.failure is None:
            return None
        step = state.global_step
        told = f"step {step:,}: the checkpoint could not be saved"
        return until_written(checkpointer, checkpointer.failure, again, step=step, told=told)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._trainer.meter.pause("end")
        self._trainer.step.finish(state.global_step)

    def _heed(self, state: TrainerState, control: TrainerControl) -> None:
        """A step has just ended: act on what the processes agreed on in the one before.

        Raises:
            UserError: on every process, if a checkpoint is not what was in memory.
        """
        trainer = self._trainer
        trainer.watchdog.at(state.global_step, 3, "waiting for the device")
        failed = False
        try:
            for report in trainer.step.heed():
                failed |= report.failed
                if report.stop and not self._stopping:
                    _tell_of_others_signal()
                control.should_save |= report.save or report.stop
                control.should_training_stop |= report.stop
                self._stopping |= report.stop
        except UserError as error:  # on every process alike; what was learned before is saved first
            self._ending = error
            control.should_save = control.should_training_stop = True
        if failed:
            trainer.settle()
        if state.global_step == trainer.began_at + 1:
            lookout.has_stepped()
            trainer.checkpointer.reserve(trainer.model, trainer.optimizer)


def _tell_of_others_signal() -> None:
    """Say which rank was asked to stop, if the main process was not, which has said so itself."""
    asked = agreement.met_by_main(stop_signals.asked_to_stop())
    rank, signal = next((each for each in enumerate(asked) if each[1] is not None), (0, None))
    if rank > 0 and signal is not None:
        note(f"rank {rank} got {signal.name}: saving at the end of a step, then exiting")


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
