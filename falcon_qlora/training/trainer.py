"""The loop: TRL's SFTTrainer, fed with shares of global batches and asked for nothing a GPU must wait for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import falcon_qlora.models.quantize  # noqa: F401  # isort: skip  # before trl imports bitsandbytes: see there
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PrinterCallback, TrainerCallback, TrainerControl
from trl import SFTConfig

from falcon_qlora.checkpoint import process_state
from falcon_qlora.checkpoint.write import last_complete
from falcon_qlora.common.errors import UserError
from falcon_qlora.data.batches import Share, StreamingSteps, TrainingSteps
from falcon_qlora.data.origins import RowNames
from falcon_qlora.inference.evaluation import Evaluation
from falcon_qlora.methods.interface import method_of
from falcon_qlora.models import zero3
from falcon_qlora.models.sharded import is_sharded
from falcon_qlora.processes import agreement, endings, stop_signals
from falcon_qlora.processes.stop_signals import Stopped
from falcon_qlora.processes.watchdog import Watchdog
from falcon_qlora.step.global_batch import Notes, Reduction, ShardedReduction, accumulate_gradients, evaluated
from falcon_qlora.terminal.console import note
from falcon_qlora.training.agreed_flags import BadSteps, Reports, StepReport
from falcon_qlora.training.callbacks import StepKeeper
from falcon_qlora.training.resumable_trainer import ResumableTrainer
from falcon_qlora.training.throughput import Meter, peak_memory_gib


def trainer_arguments(training: SFTConfig, *, total_steps: int) -> SFTConfig:
    """Set what this trainer needs whatever the user's settings; returns the same object.

    Micro batches are ours, so the loop sees no accumulation, no packing and no preparing of data; and so is
    what blocks compute again, see `models.activations`.

    Args:
        training: the user's settings.
        total_steps: optimizer steps of the run.
    """
    if training.n_gpu > 1:
        # Else Transformers' DataParallel, for one process without a launcher.
        note(f"one of {training.n_gpu} GPUs is used: this is one process. falcon-qlora train uses all")
        training._n_gpu = 1
    training.max_steps = total_steps
    training.gradient_accumulation_steps = 1
    training.packing = training.padding_free = False
    training.dataset_kwargs = {"skip_prepare_dataset": True}
    training.remove_unused_columns = False
    training.include_num_input_tokens_seen = "no"
    training.average_tokens_across_devices = False
    training.disable_tqdm = True
    training.log_level = training.log_level_replica = "error"  # the trainer sets it for all of Transformers
    training.report_to = []  # trackers come as callbacks
    training.restore_callback_states_from_checkpoint = True  # how long early stopping has waited
    # Transformers renames the first to the second.
    training.gradient_checkpointing = training.activation_checkpointing = False
    training.gradient_checkpointing_kwargs = training.activation_checkpointing_kwargs = None
    training.load_best_model_at_end = training.eval_strategy != "no" and training.load_best_model_at_end
    if training.load_best_model_at_end:
        training.metric_for_best_model = "eval_loss"
        training.greater_is_better = False
    return training


class FalconTrainer(ResumableTrainer):
    """SFTTrainer whose step is one global batch, whose loss weighs every target token the same.

    Args:
        model: with packing enabled and a method attached.
        args: from `trainer_arguments`.
        steps: one `Share` an optimizer step.
        corpus: the tokenized documents, which TRL wants to see.
        names: of the data's rows.
        evaluation: held-out documents, or None.
        run_folder: where ``checkpoints/`` goes.
        tokenizer: saved beside every adapter.
        describe_adapter: called with an adapter's folder after it is written, to complete it.
        callbacks: Transformers' kind.
        checkpoint_record: what every checkpoint's manifest says of the run.
        on_saved: called with a checkpoint's folder once it is whole.
        max_bad_steps: stop at so many steps in a row whose loss or gradient is not finite; 0: never.
        save_every_minutes: save whenever so long has passed since the last time; 0: never.
        hang_minutes: end with a message where a process does not move for so long; 0: never.
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
        run_folder: Path,
        tokenizer: Any,
        describe_adapter: Callable[[Path], None],
        callbacks: list[TrainerCallback],
        checkpoint_record: dict[str, Any],
        on_saved: Callable[[Path], None],
        max_bad_steps: int = 0,
        save_every_minutes: float = 0.0,
        hang_minutes: float = 0.0,
    ):
        self.steps = steps
        self.names = names
        self.evaluation = evaluation
        self.bad_steps = BadSteps(most=max_bad_steps, rows_of=self._rows_of, say=note)
        self.halvings = 0
        self.share: Share
        self._reports = Reports()
        self._first_learning_step: int | None = None
        self._ending: UserError | None = None
        self._watchdog = Watchdog(hang_minutes * 60, run_folder / "flight_record") if hang_minutes else None
        self._seconds_before = 0.0
        super().__init__(
            run_folder=run_folder,
            describe_adapter=describe_adapter,
            checkpoint_record=checkpoint_record,
            on_saved=on_saved,
            save_every_minutes=save_every_minutes,
            meter=Meter(),
            model=model,
            args=args,
            train_dataset=corpus,
            eval_dataset=corpus if evaluation is not None else None,
            processing_class=tokenizer,
            data_collator=_only,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        # First, so that the others see its counts.
        self.callback_handler.callbacks.insert(0, StepKeeper(self))
        low = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]
        if low and method_of(model).trains_in_float32:
            raise RuntimeError(f"{low[0]} is trainable in low precision, in which small updates are lost")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        kind = ShardedReduction if is_sharded(model) else Reduction
        self._reduction = kind(trained, processes=self.accelerator.num_processes)
        self._backward: Callable[..., Any] = self.accelerator.backward

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        # Not in DistributedDataParallel: `Reduction`, or a sharded model itself, adds up gradients.
        prepared = self.accelerator.prepare_model(model, evaluation_mode=True)
        prepared._is_accelerate_prepared = True
        if not zero3.is_zero3(model):
            return prepared
        engine, self.optimizer = zero3.start(
            prepared, self.optimizer, max_grad_norm=self.args.max_grad_norm or 0.0
        )
        self._backward = engine.backward
        return engine

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._watchdog is not None:
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
        self._at(self.state.global_step + 1, 0, "reading data")
        share = next(epoch_iterator, None)
        return ([] if share is None else [share]), None

    def training_step(self, model: nn.Module, inputs: Share, num_items_in_batch: Any = None) -> torch.Tensor:
        model.train()
        self._at(inputs.step + 1, 1, "computing")
        loss, halvings = accumulate_gradients(
            model,
            inputs,
            device=self.args.device,
            reduction=self._reduction,
            backward=self._backward,
            halvings=self.halvings,
        )
        stop = stop_signals.asked_to_stop() is not None
        notes = Notes(loss=loss, stop=stop, save=self._time_to_save(), halvings=halvings)
        self._at(inputs.step + 1, 2, "adding up the gradients")
        self._agreed = self._reduction(notes.tensor())
        self.share = inputs
        # Of a step that comes to nothing the loss is left out. Its mean over the processes is the global one.
        whole = self._agreed[0].isfinite()
        self._counted += whole
        return torch.where(whole, loss * self.accelerator.num_processes, 0.0)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        optimizer = self.optimizer.optimizer
        in_zero3 = isinstance(optimizer, zero3.Zero3Optimizer)
        norm = optimizer.gradient_norm() if in_zero3 else super()._get_grad_norm(model, grad_norm=grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of a sharded model
        if self._first_learning_step is None and max(self.lr_scheduler.get_last_lr()) > 0:
            self._first_learning_step = self.share.step + 1
        bad, scaler = ~self._agreed[0].isfinite(), self.accelerator.scaler
        if scaler is None or scaler.get_scale() < 1:
            # In fp16 the scaler meets gradients that overflow: it does no such step and halves its scale. At
            # such a scale nothing overflows that is a number.
            bad |= ~norm.isfinite()
        self._reports.put(self.share.step, self._agreed, bad, self.share.origins)
        told = getattr(optimizer, "_step_supports_amp_scaling", False)
        told &= in_zero3 or not is_sharded(self.model)
        if scaler is None and told:
            # The fused optimizers change nothing where this is 1: nobody waits for the device.
            optimizer.found_inf = bad.float()
        elif bool(bad):
            # The others have no such switch, and on zeros weights and moments would still decay: the host
            # waits to know. A step of bitsandbytes' waits anyway, after every parameter.
            model.zero_grad(set_to_none=True)
        return norm

    def after_step(self, control: TrainerControl) -> None:
        """Heed what the processes agreed on in the step before this one, which has just ended."""
        self._at(self.state.global_step, 3, "waiting for the device")
        for report in self._reports.take():
            agreed = report.agreed
            if agreed.halvings > self.halvings:
                self.halvings = agreed.halvings
                note(
                    f"out of memory at step {report.step + 1}: it was done again in smaller pieces. From "
                    f"here on every micro batch is split in {2**self.halvings} on all processes; the global "
                    "batch stays the same"
                )
            try:
                self.bad_steps.see(report)
            except UserError as error:  # on every process alike; what was learned before is saved first
                self._ending = error
                control.should_save = control.should_training_stop = True
            control.should_save |= agreed.save or agreed.stop
            control.should_training_stop |= agreed.stop
            self._stopping |= agreed.stop

    def before_training(self) -> None:
        """Take up what a checkpoint has kept beside the weights, and the processes' parameters as one."""
        self._counted = torch.zeros((), device=self.args.device)
        self._stopping = False
        self._ending = None
        self._logged_step = self.state.global_step
        self._reduction.share_parameters()
        if self._resumed is not None:
            kept, self._resumed = self._resumed, None
            with process_state.reading(self._states_file):
                self._tr_loss.fill_(kept["loss"])
                self._counted.fill_(kept["counted"])
                self._globalstep_last_logged = self._logged_step = kept["last_logged"]
                self.halvings = kept["halvings"]
                self.meter.load_state(kept["meter"])
                self._seconds_before = self.meter.seconds
                self.bad_steps.load_state(kept["bad_steps"])
                self._reports.load_state(kept["reports"])
        stop_signals.training_begins(note)
        endings.remember_siblings()  # which waits for all processes
        stop_signals.all_have_begun()
        if self._watchdog is not None:
            self._watchdog.start()
        self._saved_at = time.monotonic()
        self.meter.resume()

    def _at(self, step: int, phase: int, what: str) -> None:
        if self._watchdog is not None:
            self._watchdog.at(step, phase, what)

    def end_if_asked(self) -> None:
        """End the run here if it was asked to stop and has steps left, or its numbers stay bad.

        Raises:
            Stopped, UserError: on every process.
        """
        if self._ending is not None:
            last = agreement.from_main_process(lambda: last_complete(self.run_folder / "checkpoints"))
            raise UserError(f"{self._ending}. {last}")
        if self._stopping and self.state.global_step < self.state.max_steps:
            raise Stopped(self.state.global_step, self._save_failure)

    def finish_reports(self) -> None:
        """Take in the last step's report, which no step follows.

        Raises:
            UserError: if nothing was learned.
        """
        for report in self._reports.take(newest=True):
            self.bad_steps.see(report)
        if 0 < self.state.global_step <= self.bad_steps.total:
            raise UserError(
                f"all {self.state.global_step:,} steps had a loss or gradient that is not finite and were "
                "skipped: nothing was learned, and no adapter is written. Look at the rows above and the "
                "base model; lower --learning_rate, or compute in bf16 or fp32"
            )

    def reduction_share(self) -> float:
        """Of this start's training time, what went into adding up gradients, waiting for others included."""
        seconds = self.meter.seconds - self._seconds_before
        return self._reduction.clock.finish() / seconds if seconds > 0 else 0.0

    def has_learned(self) -> bool | None:
        """True where the weights that the model has now have taken a step; None where that is not known."""
        best = self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None
        step = self.state.best_global_step if best else self.state.global_step
        first = self._first_learning_step
        # The scaler of fp16 leaves steps out without a word.
        all_count = self.bad_steps.total == 0 and self.accelerator.scaler is None
        return True if first is not None and all_count and step is not None and step >= first else None

    def _process_state(self) -> dict[str, Any]:
        return {
            "random": process_state.random_states(),
            "loss": float(self._tr_loss),
            "counted": float(self._counted),
            "last_logged": self._globalstep_last_logged,
            "halvings": self.halvings,
            "meter": self.meter.state(),
            "bad_steps": self.bad_steps.state(),
            "reports": self._reports.state(),
        }

    def _rows_of(self, report: StepReport) -> str:
        if not isinstance(self.steps, TrainingSteps):
            return self.names.of(report.origins)
        return self.names.of_rows(self.train_dataset[self.steps.plan.documents(report.step)]["row"])

    def _go_on_reading(self, cursor: dict[str, Any]) -> None:
        assert isinstance(self.steps, StreamingSteps)
        self.steps.go_on(cursor)

    def floating_point_ops(self, inputs: Share) -> int:
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["loss"] = self._mean_of_counted(logs["loss"])
            logs["tokens"] = self.state.num_input_tokens_seen
            logs.update(self.meter.interval())
            logs["peak_memory_gib"] = peak_memory_gib()
        super().log(logs, start_time)

    def _mean_of_counted(self, loss: float) -> float:
        """The mean loss since the last log line over the steps that came to something."""
        steps, counted = self.state.global_step - self._logged_step, int(self._counted)
        self._logged_step = self.state.global_step
        self._counted.zero_()
        if counted == steps:
            return loss
        return loss * steps / counted if counted else float("nan")

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """The mean loss over the held-out target tokens, over all processes. No logits are kept."""
        assert self.evaluation is not None
        evaluation = self.evaluation
        self.meter.pause()
        started = time.perf_counter()
        was_training = self.model.training
        self.model.eval()
        total = torch.zeros((), device=self.args.device, dtype=torch.float64)
        sharded, place = is_sharded(self.model), self.accelerator.process_index
        for batch in evaluation.share(place, self.accelerator.num_processes, even=sharded):
            self._at(self.state.global_step, 4, "evaluating")
            total += evaluated(
                self.model, batch, device=self.args.device, halvings=self.halvings, can_retry=not sharded
            )
        self._at(self.state.global_step, 5, "adding up the evaluation")
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
