"""The loop: TRL's SFTTrainer, fed with shares of global batches, and without anything a GPU must wait for.

A `Step` computes each step and a `Checkpointer` saves. The trainer owns one of each and tells them where the
loop is. `OVERRIDDEN` lists the private methods of Transformers' Trainer that it replaces.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import DefaultFlowCallback, PrinterCallback, TrainerCallback, TrainerControl
from transformers.trainer_utils import SaveStrategy
from trl import SFTConfig, SFTTrainer

from falcon_qlora.checkpoint import process_state
from falcon_qlora.checkpoint.checkpointer import Checkpointer
from falcon_qlora.checkpoint.write import after_bad_rows
from falcon_qlora.common.errors import UserError
from falcon_qlora.data.batches import Share, StreamingSteps, TrainingSteps, recut
from falcon_qlora.data.origins import RowNames
from falcon_qlora.inference.evaluation import Evaluation
from falcon_qlora.methods.interface import method_of
from falcon_qlora.models import zero3
from falcon_qlora.models.sharded import is_sharded
from falcon_qlora.models.streamed_base import streamed_base_of
from falcon_qlora.processes import agreement, lookout, stop_signals
from falcon_qlora.processes.watchdog import Watchdog
from falcon_qlora.step.agreed import StepReport
from falcon_qlora.step.bad_steps import BadSteps
from falcon_qlora.step.global_batch import Step
from falcon_qlora.step.neftune import add_noise
from falcon_qlora.terminal.console import note
from falcon_qlora.training import leak_probe
from falcon_qlora.training.answers import Answers
from falcon_qlora.training.batch_tokens import Cutter
from falcon_qlora.training.callbacks import StepKeeper
from falcon_qlora.training.kernel_check import Distance
from falcon_qlora.training.loop_state import Resumption, load_optimizer, moment_of
from falcon_qlora.training.moved import footprint
from falcon_qlora.training.schedule import schedule
from falcon_qlora.training.throughput import Meter, peak_memory_gib

# Private methods of Transformers' Trainer that are replaced, each with the parameters that are relied on:
# tests/unit/test_trainer.py finds a release that changes one of them.
OVERRIDDEN = (
    *("_wrap_model", "_get_grad_norm", "_determine_best_metric", "_save_checkpoint", "_load_best_model"),
    *("_init_training_state", "_load_from_checkpoint", "_load_optimizer_and_scheduler"),
)


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
        self._shares: Iterator[Share]
        self._ahead: Future[Share | None] | None = None
        self.account: dict[str, Any] | None = None  # of the last step's share
        # Of this start: its kernels, its first documents and its answers, for the summary's checks.
        self.kernel_check: Distance | str = "no step was left"
        self.leak_probe: leak_probe.LeakProbe | str = "no step was left"
        self.answers = Answers(tokenizer.eos_token_id, max_length)
        self._max_grad_norm = max_grad_norm
        self.began_at = 0  # the step from which this start goes on
        self.first_learning_step: int | None = None  # of this start, with a learning rate above 0
        self.watchdog = watchdog
        self._best_before: tuple[float | None, int | None, str | None] = (None, None, None)
        self._resumption: Resumption | None = None
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
        self.footprint_at_start = footprint(model)  # a resumed run loads its weights later

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
        self.watchdog.stop()

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
        begin = functools.partial(super()._init_training_state, *known)
        if resume_from_checkpoint is None:
            return begin()
        self._resumption = Resumption(self, Path(resume_from_checkpoint))
        return self._resumption.take_up_loop(begin, max_steps=max_steps, epochs=num_train_epochs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_optimizer(self, Path(checkpoint))

    def before_training(self) -> None:
        """Restore what a checkpoint keeps beside the weights; give all processes the same parameters."""
        self.logged_step = self.began_at = self.state.global_step
        self.step.begin(self.optimizer.optimizer, self.accelerator, self._backward)
        self.step.shrink = self._shrink if self.cutter.may_shrink else None
        self.step.room_bytes = self.cutter.optimizer_bytes if self._resumption is None else 0
        if zero3.is_zero3(self.model):  # its weights have moved; it never resumes from a checkpoint
            self.footprint_at_start = footprint(self.model)
        if self._resumption is not None:
            self._resumption.take_up_process()
        stop_signals.training_begins(note, self.checkpointer.join)
        lookout.training_begins(self.checkpointer.join, patience_seconds=self.watchdog.seconds)
        agreement.wait_for_all()
        stop_signals.all_have_begun()
        self.watchdog.start()
        self.checkpointer.start_clock()
        self.meter.resume()

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(
            self.steps,
            batch_size=1,
            collate_fn=_only,
            shuffle=None if isinstance(self.steps, IterableDataset) else False,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Share], num_batches: int, device: torch.device
    ) -> tuple[list[Share], None]:
        self._shares = epoch_iterator
        if self._ahead is None:
            self.read_ahead()
        assert self._ahead is not None
        try:
            share, self._ahead = self._ahead.result(), None
        except UserError as error:  # late in a stream
            saves, weights = self.checkpointer, "-m" if method_of(self.model).is_whole else "--adapter"
            saves.join(failing=True)
            how = after_bad_rows(saves.folder, saves.address, weights=weights)
            raise UserError(*error.lines, *how) from None
        if self._resumption is not None:  # after reading, for which the loop draws random numbers
            self._resumption.take_up_random_states()
            self._resumption = None
        return ([] if share is None else [share]), None

    def read_ahead(self) -> None:
        """Read the next step's share, while the device is at work; an error is raised where it is needed."""
        self.watchdog.at(self.state.global_step + 1, 0, "reading data")
        self._ahead = Future()
        try:
            self._ahead.set_result(next(self._shares, None))
        except Exception as error:
            self._ahead.set_exception(error)

    def training_step(self, model: nn.Module, inputs: Share, num_items_in_batch: Any = None) -> torch.Tensor:
        model.train()
        inputs = self.as_cut(inputs)
        self.share, self.account = inputs, inputs.account
        for batch in inputs.micro_batches:
            self.answers.see(batch)
        if inputs.step == self.began_at:
            self.meter.pause("start")
            self.watchdog.at(inputs.step + 1, 0, "trying the packing")
            self.leak_probe = leak_probe.tried(model, inputs.micro_batches[0], self.args.device)
            self.meter.resume()
        if self.first_learning_step is None and max(self.lr_scheduler.get_last_lr()) > 0:
            self.first_learning_step = inputs.step + 1
        loss = self.step(model, inputs)
        if (told := self.cutter.told_smaller()) is not None:
            note(told)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> torch.Tensor:
        return self.step.gradient_norm  # the step has clipped

    def floating_point_ops(self, inputs: Share) -> int:
        return 0

    def _rows_of(self, report: StepReport) -> str:
        if not isinstance(self.steps, TrainingSteps):
            return self.names.of(report.origins)
        return self.names.of_rows(self.train_dataset[self.steps.plan.documents(report.step)]["row"])

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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            steps, self.logged_step = self.state.global_step - self.logged_step, self.state.global_step
            logs["loss"] = self.step.mean_of_counted(logs["loss"], steps)
            logs["tokens"] = self.state.num_input_tokens_seen
            logs.update(self.meter.interval())
            logs["peak_memory_gib"] = peak_memory_gib()
            if self.accelerator.scaler is not None:
                logs["loss_scale"] = self.accelerator.scaler.get_scale()
        super().log(logs, start_time)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """The mean loss over the held-out target tokens, over all processes. No logits are kept."""
        assert self.evaluation is not None
        self.meter.pause("evaluation")
        started = time.perf_counter()
        loss = self.evaluation.loss(
            self.model,
            self.accelerator,
            halvings=self.step.halvings,
            at=functools.partial(self.watchdog.at, self.state.global_step),
        )
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

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether the model is saved after this evaluation, if only the best are saved.

        It is saved too if a signal or the clock asks for it. If the run keeps the best checkpoint, an
        evaluation without a checkpoint is never the best: there would be nothing to keep.
        """
        self.settle()  # if that save failed, another is the best so far
        asked = self.control.should_save
        if self.args.load_best_model_at_end and not asked and self.args.save_strategy != SaveStrategy.BEST:
            return False
        state = self.state
        self._best_before = state.best_metric, state.best_global_step, state.best_model_checkpoint
        return super()._determine_best_metric(metrics=metrics, trial=trial) or asked

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.checkpointer.saved_step == self.state.global_step:
            return
        self.meter.pause("saves")
        self.settle()
        self.checkpointer.save(moment_of(self))
        self.meter.resume()

    def settle(self) -> None:
        """Wait for the checkpoint that is being written; one that failed is not the best."""
        state, failed = self.state, self.checkpointer.settle(self.state.global_step)
        if failed is not None and failed == state.best_global_step:  # another is, among those that exist
            state.best_metric, state.best_global_step, state.best_model_checkpoint = self._best_before

    def _load_best_model(self) -> None:
        self.settle()
        if self.state.best_model_checkpoint is None:
            return
        method_of(self.model).restore(self.model, Path(self.state.best_model_checkpoint))

    @property
    def holds_best(self) -> bool:
        """Whether the model got the weights of the best checkpoint at the end."""
        return bool(self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None)

    @property
    def kept_step(self) -> int | None:
        """The step whose weights the model has: at the end the best checkpoint's, if that is kept."""
        return self.state.best_global_step if self.holds_best else self.state.global_step


def _only(items: list[Any]) -> Any:
    return items[0]
