"""The loop: TRL's SFTTrainer, fed with shares of global batches, and without anything a GPU must wait for.

A `Step` computes each step and a `Checkpointer` saves. The trainer owns one of each and tells them where the
loop is. `OVERRIDDEN` lists the private methods of Transformers' Trainer that it replaces.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    DefaultFlowCallback,
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
)
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy
from trl import SFTConfig, SFTTrainer

from falcon_qlora.checkpoint import process_state, resume
from falcon_qlora.checkpoint.checkpointer import Checkpointer
from falcon_qlora.checkpoint.content import Moment
from falcon_qlora.common.errors import UserError
from falcon_qlora.data.batches import Share, StreamingSteps, TrainingSteps, recut
from falcon_qlora.data.origins import RowNames
from falcon_qlora.data.packing import MicroBatch
from falcon_qlora.inference.evaluation import Evaluation
from falcon_qlora.methods.interface import method_of
from falcon_qlora.models import zero3
from falcon_qlora.models.sharded import is_sharded, needs_all_processes
from falcon_qlora.models.sharded_base import alone
from falcon_qlora.models.streamed_base import streamed_base_of
from falcon_qlora.processes import agreement, lookout, stop_signals
from falcon_qlora.processes.stop_signals import Stopped
from falcon_qlora.processes.watchdog import Watchdog
from falcon_qlora.step.agreed import StepReport
from falcon_qlora.step.bad_steps import BadSteps
from falcon_qlora.step.global_batch import Step
from falcon_qlora.step.loss import evaluated
from falcon_qlora.step.neftune import add_noise
from falcon_qlora.terminal.console import note
from falcon_qlora.training import leak_probe
from falcon_qlora.training.answers import Answers
from falcon_qlora.training.batch_tokens import Cutter
from falcon_qlora.training.callbacks import StepKeeper
from falcon_qlora.training.moved import footprint
from falcon_qlora.training.schedule import schedule
from falcon_qlora.training.throughput import Meter, peak_memory_gib

# Private methods of Transformers' Trainer, with the parameters that are relied on: tests/unit/test_trainer.py
# finds a release that changes one of them.
OVERRIDDEN: dict[str, str] = {
    "_wrap_model": "model training dataloader",
    "_get_grad_norm": "model grad_norm",
    "_determine_best_metric": "metrics trial",
    "_save_checkpoint": "model trial",
    "_init_training_state": (
        "max_steps num_update_steps_per_epoch num_train_epochs resume_from_checkpoint trial"
    ),
    "_load_from_checkpoint": "resume_from_checkpoint model",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_load_best_model": "",
}
_Best = tuple[float | None, int | None, str | None]
_NONE_YET: _Best = (None, None, None)


class FalconTrainer(SFTTrainer):
    """SFTTrainer whose step is one global batch, and whose loss weighs every target token the same.

    Args:
        model: with packing enabled and a method attached.
        args: from `trainer_arguments`.
        steps: one `Share` an optimizer step.
        corpus: the tokenized documents, which TRL requires.
        names: of the data's rows.
        evaluation: held-out documents, or None.
        checkpointer: saves the run.
        cutter: how a step is cut into micro-batches, and smaller ones for where memory runs out in the first.
        watchdog: notes where the loop is, and watches during training.
        tokenizer: of the documents.
        callbacks: Transformers' kind.
        began: seconds since the epoch at which the command began.
        max_length: tokens of a sequence.
        max_grad_norm: norm to which gradients are clipped; 0: no clipping.
        max_bad_steps: stop after this many steps in a row with a non-finite loss or gradient; 0: never.
    """

    optimizer: Any  # PyTorch's or ZeRO-3's, in Accelerate's wrapper once the training has begun

    def __init__(
        self,
        model: nn.Module,
        args: SFTConfig,
        *,
        steps: TrainingSteps | StreamingSteps,
        corpus: Any,
        names: RowNames,
        evaluation: Evaluation | None,
        checkpointer: Checkpointer,
        cutter: Cutter,
        watchdog: Watchdog,
        tokenizer: Any,
        callbacks: list[TrainerCallback],
        began: float,
        max_length: int,
        max_grad_norm: float = 1.0,
        max_bad_steps: int = 0,
    ):
        self.steps = steps
        self.names = names
        self.evaluation = evaluation
        self.checkpointer = checkpointer
        self.cutter = cutter
        self._was_cut_anew = False
        self.meter = Meter(began=began)
        self.share: Share
        self.account: dict[str, Any] | None = None  # of the last step's share
        # Of this start's first documents and of its answers, for the summary's checks.
        self.leak_probe: leak_probe.LeakProbe | str = "no step was left"
        self.answers = Answers(tokenizer.eos_token_id, max_length)
        self._max_grad_norm = max_grad_norm
        self._first_learning_step: int | None = None
        self._ending: UserError | None = None
        self._stopping = False
        self._watchdog = watchdog
        self._seconds_before = 0.0
        self._best_before = _NONE_YET
        self._resumed: tuple[Path, dict[str, Any]] | None = None
        self._random: Path | None = None
        super().__init__(
            model=model,
            args=args,
            train_dataset=corpus,
            eval_dataset=corpus if evaluation is not None else None,
            processing_class=tokenizer,
            data_collator=_only,
            callbacks=callbacks,
        )
        if self.accelerator.mixed_precision == "fp16" and self.accelerator.scaler is None:
            # On the CPU, where Accelerate would compute in float32 and scale nothing.
            self.accelerator.native_amp, self.accelerator.scaler = True, torch.amp.GradScaler("cpu")
        self.remove_callback(PrinterCallback)
        self.remove_callback(DefaultFlowCallback)
        # First, so that the others see its counts.
        self.callback_handler.callbacks.insert(0, StepKeeper(self))
        low = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]
        if low and method_of(model).trains_in_float32:
            raise RuntimeError(f"{low[0]} is trainable in low precision, in which small updates are lost")
        self.step = Step(
            model,
            device=self.args.device,
            processes=self.accelerator.num_processes,
            max_grad_norm=max_grad_norm,
            bad_steps=BadSteps(most=max_bad_steps, rows_of=self._rows_of, say=note),
            wants_save=checkpointer.is_due,
            save_failed=checkpointer.has_failed,
            at=watchdog.at,
        )
        self._backward: Callable[..., Any] = self.accelerator.backward
        if self.args.neftune_noise_alpha is not None:
            add_noise(model, self.args.neftune_noise_alpha)
            self.neftune_noise_alpha: float | None = None  # else Transformers adds its own
        self._began_at = 0
        self._at_start = footprint(model)  # a resumed run loads its weights later

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self.lr_scheduler = schedule(self.args, optimizer or self.optimizer, steps=num_training_steps)
        return self.lr_scheduler

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        # Without DistributedDataParallel: the step, or a sharded model itself, sums gradients.
        # A base that is streamed must not move; on a CPU others get copied to one by a number.
        stays = False if streamed_base_of(model) is not None else None
        prepared = self.accelerator.prepare_model(model, device_placement=stays, evaluation_mode=True)
        prepared._is_accelerate_prepared = True
        if not zero3.is_zero3(model):
            return prepared
        engine, self.optimizer = zero3.start(prepared, self.optimizer, max_grad_norm=self._max_grad_norm)
        self._backward = engine.backward
        return engine

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; the last checkpoint may still be being written at the end, see `close`."""
        try:
            trained = super().train(*args, **kwargs)
            if is_sharded(self.model):
                self.checkpointer.join()  # while the others are watched: it waits for their parts
            return trained
        except BaseException:
            self.close(failing=True)
            raise

    def close(self, *, failing: bool = False) -> None:
        """Wait for what this process is writing, see `Checkpointer.join`, and end the watch."""
        self.checkpointer.join(failing=failing)
        self._watchdog.stop()

    def get_train_dataloader(self) -> DataLoader:
        streaming = isinstance(self.steps, IterableDataset)
        return DataLoader(
            self.steps,
            batch_size=1,
            collate_fn=_only,
            shuffle=None if streaming else False,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Share], num_batches: int, device: torch.device
    ) -> tuple[list[Share], None]:
        self._watchdog.at(self.state.global_step + 1, 0, "reading data")
        share = next(epoch_iterator, None)
        if self._random is not None:  # after reading, for which the loop draws random numbers
            resume.take_up_random_states(self._random, seed=self.args.seed, **self._place())
            self._random = None
        return ([] if share is None else [share]), None

    def training_step(self, model: nn.Module, inputs: Share, num_items_in_batch: Any = None) -> torch.Tensor:
        model.train()
        inputs = self.as_cut(inputs)
        self.share, self.account = inputs, inputs.account
        for batch in inputs.micro_batches:
            self.answers.see(batch)
        if inputs.step == self._began_at:
            self._probe(model, inputs.micro_batches[0])
        if self._first_learning_step is None and max(self.lr_scheduler.get_last_lr()) > 0:
            self._first_learning_step = inputs.step + 1
        loss = self.step(model, inputs)
        if (told := self.cutter.told_smaller()) is not None:
            note(told)
        return loss

    def as_cut(self, share: Share) -> Share:
        """The share in the micro-batches of now; those of before may have been read ahead."""
        if not self._was_cut_anew:
            return share
        cut = recut(share, self.cutter.cut.tokens)
        return cut.pin_memory() if share.micro_batches[0].input_ids.is_pinned() else cut

    def shrink(self, without: list[int]) -> bool:
        """Have all processes take the next smaller cut; False: there is none. All call this alike.

        Args:
            without: ranks whose memory has run out.
        """
        before = self.cutter.cut.tokens
        if not self.cutter.smaller(without):
            return False
        self._was_cut_anew |= self.cutter.cut.tokens != before
        self.steps.dealing = replace(self.steps.dealing, tokens=self.cutter.cut.tokens)
        self.checkpointer.record["cut"] = self.cutter.record()
        return True

    def _shrink(self, without: list[int]) -> Share | None:
        if not self.shrink(without):
            return None
        self.share = self.as_cut(self.share)
        return self.share

    def _probe(self, model: nn.Module, batch: MicroBatch) -> None:
        if is_sharded(self.model):  # whose processes may have too few documents for as many forward passes
            self.leak_probe = "the weights are sharded"
            return
        self.meter.pause("start")
        self._watchdog.at(self.state.global_step + 1, 0, "trying the packing")
        probe = functools.partial(leak_probe.probe, model, batch, self.args.device)
        # The others may have too few documents to take part in as many forward passes.
        found = alone(model, probe) if needs_all_processes(model) else probe()
        self.leak_probe = found or "rank 0 tried it alone"
        if isinstance(found, leak_probe.LeakProbe) and not found.passed:
            note(leak_probe.warning(found))
        self.meter.resume()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> torch.Tensor:
        return self.step.gradient_norm  # the step has clipped

    def before_training(self) -> None:
        """Restore what a checkpoint keeps beside the weights; give all processes the same parameters."""
        self._stopping, self._ending = False, None
        self._logged_step = self._began_at = self.state.global_step
        self.step.begin(self.optimizer.optimizer, self.accelerator, self._backward)
        self.step.shrink = self._shrink if self.cutter.may_shrink else None
        self.step.room_bytes = self.cutter.optimizer_bytes if self._resumed is None else 0
        if zero3.is_zero3(self.model):  # its weights have moved; it never resumes from a checkpoint
            self._at_start = footprint(self.model)
        if self._resumed is not None:
            (file, kept), self._resumed = self._resumed, None
            with process_state.reading(file):
                self._tr_loss.fill_(kept["loss"])
                self._globalstep_last_logged = self._logged_step = kept["last_logged"]
                self.meter.load_state(kept["meter"])
                self._seconds_before = self.meter.seconds
                self.step.load_state(kept)
            self.checkpointer.goes_on_from(self.state.global_step)
        stop_signals.training_begins(note, self.checkpointer.join)
        lookout.training_begins(self.checkpointer.join, patience_seconds=self._watchdog.seconds)
        agreement.wait_for_all()
        stop_signals.all_have_begun()
        self._watchdog.start()
        self.checkpointer.start_clock()
        self.meter.resume()

    def after_step(self, control: TrainerControl) -> None:
        """A step has just ended: act on what the processes agreed on in the one before.

        Raises:
            UserError: on every process, if a checkpoint is not what was in memory.
        """
        self._watchdog.at(self.state.global_step, 3, "waiting for the device")
        failed = False
        try:
            for report in self.step.heed():
                failed |= report.failed
                control.should_save |= report.save or report.stop
                control.should_training_stop |= report.stop
                self._stopping |= report.stop
        except UserError as error:  # on every process alike; what was learned before is saved first
            self._ending = error
            control.should_save = control.should_training_stop = True
        if failed:
            self.settle()
        if self.state.global_step == self._began_at + 1:
            lookout.has_stepped()
            self.checkpointer.reserve(self.model, self.optimizer)

    def end_if_asked(self) -> None:
        """End the run here if it was asked to stop and has steps left, or if too many steps were bad.

        Raises:
            Stopped, UserError: on every process.
        """
        if self._ending is None and not self._stopping:
            return
        self.settle()
        if self._ending is not None:
            last = agreement.from_main_process(self.checkpointer.last_complete)
            raise UserError(f"{self._ending}. {last}")
        if self.state.global_step < self.state.max_steps:
            raise Stopped(self.state.global_step, self.checkpointer.failure)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether the model is saved after this evaluation, if only the best are saved.

        It is saved too if a signal or the clock asks for it. If the run keeps the best checkpoint, an
        evaluation without a checkpoint is never the best: there would be nothing to keep.
        """
        self.settle()  # if that save failed, another is the best so far
        asked = self.control.should_save
        if self.args.load_best_model_at_end and not asked and self.args.save_strategy != SaveStrategy.BEST:
            return False
        self._best_before = self._best
        return super()._determine_best_metric(metrics=metrics, trial=trial) or asked

    @property
    def _best(self) -> _Best:
        return self.state.best_metric, self.state.best_global_step, self.state.best_model_checkpoint

    @_best.setter
    def _best(self, best: _Best) -> None:
        self.state.best_metric, self.state.best_global_step, self.state.best_model_checkpoint = best

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        if self.checkpointer.saved_step == step:
            return
        self.meter.pause("saves")
        self.settle()
        for callback in self._stateful():
            self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        moment = Moment(
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.lr_scheduler,
            scaler=self.accelerator.scaler,
            state=self.state,
            process={
                "random": process_state.random_states(),
                "loss": float(self._tr_loss),
                "last_logged": self._globalstep_last_logged,
                "meter": self.meter.state(),
                **self.step.state(),
            },
            cursor=self.share.cursor,
        )
        self.checkpointer.save(moment)
        self.meter.resume()

    def settle(self) -> None:
        """Wait for the checkpoint that is being written; one that failed is not the best."""
        failed = self.checkpointer.settle(self.state.global_step)
        if failed is not None and failed == self.state.best_global_step:
            self._best = self._best_before  # among those that exist

    def _stateful(self) -> list[ExportableState]:
        callbacks = [*self.callback_handler.callbacks, self.control]
        return [each for each in callbacks if isinstance(each, ExportableState)]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with process_state.reading(Path(resume_from_checkpoint)):
            method_of(self.model).restore(self.model, Path(resume_from_checkpoint))

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        known = (max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial)
        if resume_from_checkpoint is None:
            return super()._init_training_state(*known)
        folder = Path(resume_from_checkpoint)
        wanted = self._early_stopping()
        with process_state.reading(folder / process_state.TRAINER_STATE):
            resume.check_stateful(folder, self._stateful())
            place = super()._init_training_state(*known)
        self.state.compute_steps(self.args, max_steps)  # when to save: as set now, not as it was
        stopping = self._early_stopping()
        if stopping is not None and wanted is not None:
            stopping.early_stopping_patience = wanted.early_stopping_patience  # as set now
            if stopping.early_stopping_patience_counter >= stopping.early_stopping_patience:
                place = (num_train_epochs, 0)  # early stopping had ended the run
        self._resumed = folder / process_state.STATES, resume.read_process(folder, **self._place())
        self._random = folder
        cursor = process_state.read_cursor(
            folder, step=self.state.global_step, vocabulary=self.model.config.vocab_size
        )
        if cursor is not None:
            assert isinstance(self.steps, StreamingSteps)
            self.steps.go_on(cursor)
            self.account = cursor.get("account")
        self.state.best_model_checkpoint = None  # its path may have changed
        if self.state.best_global_step:
            best = self.checkpointer.find_best(self.state.best_global_step)
            self._best = (*self._best[:2], str(best)) if best else _NONE_YET
        return place

    def _place(self) -> dict[str, int]:
        """Which process of how many this is, at which step."""
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        return {"process": process, "processes": processes, "step": self.state.global_step}

    def _early_stopping(self) -> EarlyStoppingCallback | None:
        callbacks = self.callback_handler.callbacks
        return next((each for each in callbacks if isinstance(each, EarlyStoppingCallback)), None)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            resume.load_optimizer(
                Path(checkpoint),
                optimizer=self.optimizer,
                scheduler=self.lr_scheduler,
                scaler=self.accelerator.scaler,
                step=self.state.global_step,
                sharded=is_sharded(self.model),
            )

    def _load_best_model(self) -> None:
        self.settle()
        if self.state.best_model_checkpoint is None:
            return
        method_of(self.model).restore(self.model, Path(self.state.best_model_checkpoint))

    def reduction_share(self) -> float:
        """Share of this start's training time in the gradient all-reduce, with waits for other processes."""
        seconds = self.meter.seconds - self._seconds_before
        return self.step.reduction.clock.finish() / seconds if seconds > 0 else 0.0

    @property
    def steps_of_this_start(self) -> int:
        return self.state.global_step - self._began_at

    @property
    def had_a_rate(self) -> bool:
        """Whether a step of this start had a learning rate above 0."""
        return self._first_learning_step is not None

    def is_as_it_was(self) -> bool:
        """Whether this process's trained parameters are as they were before the run's first step."""
        return footprint(self.model) == self._at_start

    @property
    def holds_best(self) -> bool:
        """Whether the model got the weights of the best checkpoint at the end."""
        return bool(self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None)

    @property
    def kept_step(self) -> int | None:
        """The step whose weights the model has: at the end the best checkpoint's, if that is kept."""
        return self.state.best_global_step if self.holds_best else self.state.global_step

    def has_learned(self) -> bool | None:
        """True if the weights that the model has now have taken a step; None if that is not known."""
        step = self.kept_step
        first = self._first_learning_step
        # In fp16 the scaler skips steps too, and how many is known a step late.
        all_count = self.step.bad_steps.total == 0 and self.accelerator.scaler is None
        return True if first is not None and all_count and step is not None and step >= first else None

    def _rows_of(self, report: StepReport) -> str:
        if not isinstance(self.steps, TrainingSteps):
            return self.names.of(report.origins)
        return self.names.of_rows(self.train_dataset[self.steps.plan.documents(report.step)]["row"])

    def floating_point_ops(self, inputs: Share) -> int:
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["loss"] = self._mean_of_counted(logs["loss"])
            logs["tokens"] = self.state.num_input_tokens_seen
            logs.update(self.meter.interval())
            logs["peak_memory_gib"] = peak_memory_gib()
            if self.accelerator.scaler is not None:
                logs["loss_scale"] = self.accelerator.scaler.get_scale()
        super().log(logs, start_time)

    def _mean_of_counted(self, loss: float) -> float:
        """The mean loss since the last log line, over the steps with a finite loss."""
        steps, counted = self.state.global_step - self._logged_step, int(self.step.counted)
        self._logged_step = self.state.global_step
        self.step.counted.zero_()
        if counted == steps:
            return loss
        return loss * steps / counted if counted else float("nan")

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """The mean loss over the held-out target tokens, over all processes. No logits are kept."""
        assert self.evaluation is not None
        evaluation = self.evaluation
        self.meter.pause("evaluation")
        started = time.perf_counter()
        was_training = self.model.training
        self.model.eval()
        total = torch.zeros((), device=self.args.device, dtype=torch.float64)
        sharded, place = needs_all_processes(self.model), self.accelerator.process_index
        for batch in evaluation.share(place, self.accelerator.num_processes, even=sharded):
            self._watchdog.at(self.state.global_step, 4, "evaluating")
            total += evaluated(
                self.model, batch, device=self.args.device, halvings=self.step.halvings, can_retry=not sharded
            )
        self._watchdog.at(self.state.global_step, 5, "adding up the evaluation")
        loss = float(self.accelerator.reduce(total)) / evaluation.target_tokens
        self.model.train(was_training)
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_seconds": time.perf_counter() - started,
        }
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        self.meter.resume()
        return metrics


def _only(items: list[Any]) -> Any:
    return items[0]
