"""The part of the trainer that saves checkpoints and goes on from them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import falcon_qlora.models.quantize  # noqa: F401  # isort: skip  # before trl imports bitsandbytes: see there
import torch
from torch import nn
from transformers import EarlyStoppingCallback
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy
from trl import SFTTrainer

from falcon_qlora.checkpoint import process_state, read
from falcon_qlora.checkpoint.manifest import fault
from falcon_qlora.checkpoint.optimizer_parts import has_parts, read_own_rows
from falcon_qlora.checkpoint.resume import read_process
from falcon_qlora.checkpoint.write import save_checkpoint
from falcon_qlora.common.untrusted import read_json
from falcon_qlora.data.cursor import check_cursor
from falcon_qlora.methods.interface import method_of
from falcon_qlora.models.sharded import is_sharded
from falcon_qlora.terminal.console import note
from falcon_qlora.training.throughput import Meter

_Best = tuple[float | None, int | None, str | None]
_NONE_YET: _Best = (None, None, None)


class ResumableTrainer(SFTTrainer):
    """SFTTrainer whose checkpoints are written whole or not at all, and hold what each process remembers.

    Args:
        run_folder: where ``checkpoints/`` goes.
        describe_adapter: called with an adapter's folder after it is written, to complete it.
        checkpoint_record: what every checkpoint's manifest says of the run.
        on_saved: called with a checkpoint's folder once it is whole.
        save_every_minutes: save whenever so long has passed since the last time; 0: never.
        meter: stands still while a checkpoint is written.
        sft: SFTTrainer's own.
    """

    def __init__(
        self,
        *,
        run_folder: Path,
        describe_adapter: Callable[[Path], None],
        checkpoint_record: dict[str, Any],
        on_saved: Callable[[Path], None],
        save_every_minutes: float,
        meter: Meter,
        **sft: Any,
    ):
        self.run_folder = run_folder
        self.describe_adapter = describe_adapter
        self.checkpoint_record = checkpoint_record
        self.on_saved = on_saved
        self.meter = meter
        self._save_every_seconds = save_every_minutes * 60
        self._saved_at = time.monotonic()
        self._saved_step = self._step_seen_to = -1
        self._save_failure: str | None = None
        self._best_before = _NONE_YET
        self._resumed: dict[str, Any] | None = None
        self._states_file = Path(process_state.STATES)  # that it is from
        super().__init__(**sft)

    def _process_state(self) -> dict[str, Any]:
        """What this process must remember to go on; in `_resumed` when it does."""
        raise NotImplementedError

    def _at(self, step: int, phase: int, what: str) -> None:
        """The loop has come to a place; see `Watchdog.at`."""
        raise NotImplementedError

    def _go_on_reading(self, cursor: dict[str, Any]) -> None:
        """Let the stream's next step begin at `cursor`, which a checkpoint of a stream holds."""
        raise NotImplementedError

    def _time_to_save(self) -> bool:
        if not self._save_every_seconds or not self.accelerator.is_main_process:
            return False
        if time.monotonic() - self._saved_at < self._save_every_seconds:
            return False
        self._saved_at = time.monotonic()
        return True

    def _maybe_log_save_evaluate(self, *args: Any, **named: Any) -> None:
        # The loop comes here again when its only epoch, the whole run, has ended.
        if self._step_seen_to != self.state.global_step:
            self._step_seen_to = self.state.global_step
            super()._maybe_log_save_evaluate(*args, **named)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether the model is saved after this evaluation, where the best alone are.

        That is so too where a signal or the clock asks for it. Of an evaluation without a checkpoint there is
        nothing to keep: it is not the best where the best is what the run leaves.
        """
        asked = self.control.should_save
        if self.args.load_best_model_at_end and not asked and self.args.save_strategy != SaveStrategy.BEST:
            return False
        self._best_before = self._best()
        return super()._determine_best_metric(metrics=metrics, trial=trial) or asked

    def _best(self) -> _Best:
        return self.state.best_metric, self.state.best_global_step, self.state.best_model_checkpoint

    def _take_for_best(self, best: _Best) -> None:
        self.state.best_metric, self.state.best_global_step, self.state.best_model_checkpoint = best

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._saved_step == self.state.global_step:
            return
        self.meter.pause()
        self.saving(self.accelerator.is_main_process)
        failure = save_checkpoint(
            self,
            self.run_folder / "checkpoints",
            state=self._process_state(),
            record=self.checkpoint_record,
        )
        self._save_failure = failure
        self._saved_step = self.state.global_step
        self._saved_at = time.monotonic()
        if failure is None:
            self.on_saved(self.run_folder / "checkpoints" / f"step-{self._saved_step}")
        else:
            if self.state.best_global_step == self.state.global_step:
                self._take_for_best(self._best_before)  # the best of those that there are
            note(
                f"step {self.state.global_step}: the checkpoint could not be saved ({failure}). The training "
                "goes on and the next save is tried; earlier checkpoints are untouched"
            )
        self.meter.resume()

    def saving(self, writes: bool) -> None:
        """This process writes to a checkpoint, or waits for another that does."""
        self._at(
            self.state.global_step,
            6 if writes else 7,
            "saving a checkpoint" if writes else "awaiting the save",
        )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if is_sharded(self.model):  # of the optimizer each process has written its part
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        scheduled = process_state.check_plain(folder / SCHEDULER_NAME, dict)
        if is_sharded(self.model) or has_parts(folder):
            with process_state.reading(folder / "optimizer-*.pt"):
                read_own_rows(self.optimizer, folder)
            self._check_schedule(folder, scheduled, None)
            with process_state.reading(folder / SCHEDULER_NAME):
                self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))
        else:
            kept = process_state.check_plain(folder / OPTIMIZER_NAME, dict)
            with process_state.reading(folder / OPTIMIZER_NAME):
                read.check_optimizer(kept, self.optimizer)
            self._check_schedule(folder, scheduled, [group["lr"] for group in kept["param_groups"]])
            with process_state.reading(folder / OPTIMIZER_NAME):
                super()._load_optimizer_and_scheduler(checkpoint)

    def _check_schedule(self, folder: Path, kept: dict[str, Any], rates: list[float] | None) -> None:
        # The scaler of fp16 leaves steps out, and then so does the schedule.
        step = self.state.global_step if self.accelerator.scaler is None else None
        with process_state.reading(folder / SCHEDULER_NAME):
            read.check_scheduler(kept, self.lr_scheduler, step=step, rates=rates)

    def _load_scaler(self, checkpoint: str | None) -> None:
        file = Path(checkpoint or "", SCALER_NAME)
        if self.accelerator.scaler is not None and file.is_file():
            kept = process_state.check_plain(file, dict)
            with process_state.reading(file):
                read.check_scaler(kept, self.accelerator.scaler)
        with process_state.reading(file):
            super()._load_scaler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with process_state.reading(Path(resume_from_checkpoint)):
            method_of(self.model).restore(self.model, Path(resume_from_checkpoint))

    def _init_training_state(
        self, max_steps: int, steps_an_epoch: int, epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        if checkpoint is None:
            return super()._init_training_state(max_steps, steps_an_epoch, epochs, checkpoint, trial)
        folder = Path(checkpoint)
        wanted = self._early_stopping()
        stateful = [*self.callback_handler.callbacks, self.control]
        with process_state.reading(folder / TRAINER_STATE_NAME):
            told = read_json(folder / TRAINER_STATE_NAME, not_finite=True)["stateful_callbacks"]
            read.check_callbacks(told, [each for each in stateful if isinstance(each, ExportableState)])
            place = super()._init_training_state(max_steps, steps_an_epoch, epochs, checkpoint, trial)
        stopping = self._early_stopping()
        if stopping is not None and wanted is not None:
            stopping.early_stopping_patience = wanted.early_stopping_patience  # not what it was
            if stopping.early_stopping_patience_counter >= stopping.early_stopping_patience:
                place = (epochs, 0)  # it had come to its end
        self._resumed, self._states_file = self._read_process(checkpoint), folder / process_state.STATES
        cursor = process_state.load_cursor(folder)
        if cursor is not None:
            with process_state.reading(folder / process_state.CURSOR):
                check_cursor(cursor, step=self.state.global_step, vocabulary=self.model.config.vocab_size)
            self._go_on_reading(cursor)
        self._saved_step = self.state.global_step
        self._find_best_again()
        return place

    def _early_stopping(self) -> EarlyStoppingCallback | None:
        callbacks = self.callback_handler.callbacks
        return next((each for each in callbacks if isinstance(each, EarlyStoppingCallback)), None)

    def _read_process(self, checkpoint: str) -> dict[str, Any]:
        accelerator = self.accelerator
        return read_process(
            Path(checkpoint),
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            step=self.state.global_step,
        )

    def _find_best_again(self) -> None:
        """The best checkpoint by its step: the folder may have been moved, or something happened to it."""
        self.state.best_model_checkpoint = None  # as it is called there
        if self.state.best_global_step:
            best = self.run_folder / "checkpoints" / f"step-{self.state.best_global_step}"
            wrong = fault(best)
            self.state.best_model_checkpoint = None if wrong else str(best)
            if wrong:
                note(f"{best}, the best so far, cannot be kept ({wrong}): the best from here on is")
                self._take_for_best(_NONE_YET)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        kept = self._read_process(checkpoint)
        if "random" in kept:
            with process_state.reading(Path(checkpoint, process_state.STATES)):
                process_state.restore_random_states(kept["random"])
        else:
            process_state.seed_anew(
                self.args.seed, step=self.state.global_step, process=self.accelerator.process_index
            )

    def _load_best_model(self) -> None:
        method_of(self.model).restore(self.model, Path(self.state.best_model_checkpoint))
