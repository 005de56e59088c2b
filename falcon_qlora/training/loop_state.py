"""What a checkpoint keeps of the loop beside its weights, and how a loop takes it up again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import EarlyStoppingCallback
from transformers.trainer_callback import ExportableState

from falcon_qlora.checkpoint import process_state, resume
from falcon_qlora.checkpoint.content import Moment
from falcon_qlora.data.batches import StreamingSteps
from falcon_qlora.models.sharded import is_sharded

if TYPE_CHECKING:
    from falcon_qlora.training.trainer import FalconTrainer


def moment_of(trainer: FalconTrainer) -> Moment:
    """What a checkpoint of now is made from."""
    for callback in _stateful(trainer):
        trainer.state.stateful_callbacks[type(callback).__name__] = callback.state()
    return Moment(
        model=trainer.model,
        optimizer=trainer.optimizer,
        scheduler=trainer.lr_scheduler,
        scaler=trainer.accelerator.scaler,
        state=trainer.state,
        process={
            "random": process_state.random_states(),
            "loss": float(trainer._tr_loss),
            "last_logged": trainer._globalstep_last_logged,
            "meter": trainer.meter.state(),
            **trainer.step.state(),
        },
        cursor=trainer.share.cursor,
        goes_on=not trainer.control.should_training_stop,
    )


def load_optimizer(trainer: FalconTrainer, checkpoint: Path) -> None:
    """Take up the states of the optimizer and the schedule; see `resume.load_optimizer`."""
    resume.load_optimizer(
        checkpoint,
        optimizer=trainer.optimizer,
        scheduler=trainer.lr_scheduler,
        scaler=trainer.accelerator.scaler,
        step=trainer.state.global_step,
        sharded=is_sharded(trainer.model),
    )


class Resumption:
    """Takes up a checkpoint, part by part, where the loop comes to it: in the order of the methods.

    Args:
        trainer: whose weights are the checkpoint's.
        checkpoint: verified.
    """

    def __init__(self, trainer: FalconTrainer, checkpoint: Path):
        self._trainer, self._checkpoint = trainer, checkpoint

    def take_up_loop(
        self, begin: Callable[[], tuple[int, int]], *, max_steps: int, epochs: int
    ) -> tuple[int, int]:
        """Take up the record of the run, its callbacks, the stream's place and the best checkpoint.

        Args:
            begin: Transformers' part of it.
            max_steps: of the run as it is set now.
            epochs: as the loop counts them.

        Returns:
            As `begin`: the epoch in which the loop goes on, and its step there.
        """
        trainer, checkpoint = self._trainer, self._checkpoint
        wanted = _early_stopping(trainer)
        with process_state.reading(checkpoint / process_state.TRAINER_STATE):
            resume.check_stateful(checkpoint, _stateful(trainer))
            place = begin()
        state = trainer.state
        state.compute_steps(trainer.args, max_steps)  # when to save: as set now, not as it was
        stopping = _early_stopping(trainer)
        if stopping is not None and wanted is not None:
            stopping.early_stopping_patience = wanted.early_stopping_patience  # as set now
            if stopping.early_stopping_patience_counter >= stopping.early_stopping_patience:
                place = (epochs, 0)  # early stopping had ended the run
        self._where = {
            "process": trainer.accelerator.process_index,
            "processes": trainer.accelerator.num_processes,
            "step": state.global_step,
        }
        self._process = resume.read_process(checkpoint, **self._where)
        cursor = process_state.read_cursor(
            checkpoint, step=state.global_step, vocabulary=trainer.model.config.vocab_size
        )
        if cursor is not None:
            assert isinstance(trainer.steps, StreamingSteps)
            trainer.steps.go_on(cursor)
            trainer.account = cursor.get("account")
        state.best_model_checkpoint = None  # its path may have changed
        if state.best_global_step:
            best = trainer.checkpointer.find_best(state.best_global_step)
            if best is None:
                state.best_metric = state.best_global_step = None
            else:
                state.best_model_checkpoint = str(best)
        return place

    def take_up_process(self) -> None:
        """Take up this process's own state but for its random generators."""
        trainer, kept = self._trainer, self._process
        with process_state.reading(self._checkpoint / process_state.STATES):
            trainer._tr_loss.fill_(kept["loss"])
            trainer._globalstep_last_logged = trainer.logged_step = kept["last_logged"]
            trainer.meter.load_state(kept["meter"])
            trainer.step.load_state(kept)
        trainer.checkpointer.goes_on_from(trainer.state.global_step)

    def take_up_random_states(self) -> None:
        resume.take_up_random_states(self._checkpoint, seed=self._trainer.args.seed, **self._where)


def _stateful(trainer: FalconTrainer) -> list[ExportableState]:
    callbacks = [*trainer.callback_handler.callbacks, trainer.control]
    return [each for each in callbacks if isinstance(each, ExportableState)]


def _early_stopping(trainer: FalconTrainer) -> EarlyStoppingCallback | None:
    callbacks = trainer.callback_handler.callbacks
    return next((each for each in callbacks if isinstance(each, EarlyStoppingCallback)), None)
