"""The loop: TRL's SFTTrainer, fed with shares of global batches and asked for nothing a GPU must wait for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import falcon_qlora.models.quantize  # noqa: F401  # isort: skip  # before trl imports bitsandbytes: see there
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from falcon_qlora.checkpoint.write import restore_adapter, save_checkpoint
from falcon_qlora.data.batches import DocumentReader, Share, StreamingSteps, TrainingSteps, filled_up
from falcon_qlora.data.plan import deal_evaluation
from falcon_qlora.methods.interface import method_of
from falcon_qlora.models.sharded import is_sharded
from falcon_qlora.step import accumulate_gradients, sum_of_losses

REFERENCE_SAMPLE_POSITIONS = 512


def trainer_arguments(training: SFTConfig, *, total_steps: int) -> SFTConfig:
    """Set what this trainer needs whatever the user's settings; returns the same object.

    Micro batches are ours, so the loop sees no accumulation, no packing and no preparing of data; and so is
    what blocks compute again, see `models.activations`.

    Args:
        training: the user's settings.
        total_steps: optimizer steps of the run.
    """
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
    training.ddp_find_unused_parameters = False
    training.ddp_broadcast_buffers = False
    # Transformers renames the first to the second.
    training.gradient_checkpointing = training.activation_checkpointing = False
    training.gradient_checkpointing_kwargs = training.activation_checkpointing_kwargs = None
    training.load_best_model_at_end = training.eval_strategy != "no" and training.load_best_model_at_end
    if training.load_best_model_at_end:
        training.metric_for_best_model = "eval_loss"
        training.greater_is_better = False
    return training


@dataclass(kw_only=True)
class Meter:
    """Counts real tokens and computed positions against the seconds spent training.

    Time between `pause` and `resume` (evaluation, saving) counts for nothing.
    """

    tokens: int = 0
    positions: int = 0
    capacity: int = 0
    seconds: float = 0.0
    _since: float | None = field(default=None, repr=False)
    _last: tuple[int, int, int, float] = field(default=(0, 0, 0, 0.0), repr=False)

    def resume(self) -> None:
        self._since = time.perf_counter()

    def pause(self) -> None:
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
            self._since = None

    def add(self, *, tokens: int, positions: int, capacity: int) -> None:
        self.tokens += tokens
        self.positions += positions
        self.capacity += capacity

    def interval(self) -> dict[str, float]:
        """Rates since the last call; the caller has made sure that the device is done."""
        if self._since is not None:
            self.pause()
            self.resume()
        now = (self.tokens, self.positions, self.capacity, self.seconds)
        tokens, positions, capacity, seconds = (a - b for a, b in zip(now, self._last, strict=True))
        self._last = now
        return rates(tokens=int(tokens), positions=int(positions), capacity=int(capacity), seconds=seconds)

    def total(self) -> dict[str, float]:
        """Rates over the whole run."""
        return rates(
            tokens=self.tokens, positions=self.positions, capacity=self.capacity, seconds=self.seconds
        )


def rates(*, tokens: int, positions: int, capacity: int, seconds: float) -> dict[str, float]:
    """Tokens/s count real tokens; samples/s count 512 computed positions, as the 2023 reference did."""
    if seconds <= 0:
        return {}
    return {
        "tokens_per_second": tokens / seconds,
        "samples_per_second_512": positions / REFERENCE_SAMPLE_POSITIONS / seconds,
        "packing_efficiency": tokens / capacity if capacity else 1.0,
    }


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out documents and how to go through them.

    Args:
        reader: of the held-out corpus, packed.
        lengths: ``[documents]``, tokens.
        target_tokens: over the whole corpus.
        micro_batch: sequences of `max_length` in one forward.
        max_length: tokens.
    """

    reader: DocumentReader
    lengths: Any
    target_tokens: int
    micro_batch: int
    max_length: int


class FalconTrainer(SFTTrainer):
    """SFTTrainer whose step is one global batch, whose loss weighs every target token the same.

    Args:
        model: with packing enabled and a method attached.
        args: from `trainer_arguments`.
        steps: one `Share` an optimizer step.
        corpus: the tokenized documents, which TRL wants to see.
        evaluation: held-out documents, or None.
        run_folder: where ``checkpoints/`` goes.
        tokenizer: saved beside every adapter.
        describe_adapter: called with an adapter's folder after it is written, to complete it.
        callbacks: Transformers' kind.
    """

    def __init__(
        self,
        model: nn.Module,
        args: SFTConfig,
        *,
        steps: TrainingSteps | StreamingSteps,
        corpus: Any,
        evaluation: Evaluation | None,
        run_folder: Path,
        tokenizer: Any,
        describe_adapter: Callable[[Path], None],
        callbacks: list[TrainerCallback],
    ):
        self.steps = steps
        self.evaluation = evaluation
        self.run_folder = run_folder
        self.describe_adapter = describe_adapter
        self.meter = Meter()
        self.share: Share
        super().__init__(
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
        self.callback_handler.callbacks.insert(0, _Progress(self))
        # Frozen weights are the same on every process already: DDP need not send them around.
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        frozen += [name for name, _ in model.named_buffers()]
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
        low = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]
        if low and method_of(model).trains_in_float32:
            raise RuntimeError(f"{low[0]} is trainable in low precision, in which small updates are lost")

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        if not is_sharded(model):
            return super()._wrap_model(model, training, dataloader)
        # It reduces its gradients itself: Accelerate brings autocast, and no DistributedDataParallel.
        prepared = self.accelerator.prepare_model(model, evaluation_mode=True)
        prepared._is_accelerate_prepared = True
        return prepared

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

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
        share = next(epoch_iterator, None)
        return ([] if share is None else [share]), None

    def training_step(self, model: nn.Module, inputs: Share, num_items_in_batch: Any = None) -> torch.Tensor:
        model.train()
        loss = accumulate_gradients(
            model,
            inputs,
            device=self.args.device,
            processes=self.accelerator.num_processes,
            backward=self.accelerator.backward,
        )
        self.share = inputs
        return loss

    def floating_point_ops(self, inputs: Share) -> int:
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["tokens"] = self.state.num_input_tokens_seen
            logs.update(self.meter.interval())
            logs["peak_memory_gib"] = peak_memory_gib()
        super().log(logs, start_time)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """The mean loss over the held-out target tokens, over all processes. No logits are kept."""
        assert self.evaluation is not None
        evaluation = self.evaluation
        self.meter.pause()
        started = time.perf_counter()
        was_training = self.model.training
        self.model.eval()
        dealt = deal_evaluation(
            evaluation.lengths,
            processes=self.accelerator.num_processes,
            micro_batch=evaluation.micro_batch,
            max_length=evaluation.max_length,
        )
        parts = dealt[self.accelerator.process_index]
        if is_sharded(self.model):  # each forward takes all processes
            parts = filled_up(parts, max(map(len, dealt)))
        total = torch.zeros((), device=self.args.device, dtype=torch.float64)
        with torch.no_grad():
            for part in parts:
                batch = evaluation.reader.micro_batch(part).to(self.args.device)
                # Not through DDP: processes may have different numbers of micro batches.
                total += sum_of_losses(self.model, batch).double()
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

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.meter.pause()
        save_checkpoint(self, self.run_folder / "checkpoints")
        self.meter.resume()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        restore_adapter(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        restore_adapter(self.model, Path(self.state.best_model_checkpoint))


class _Progress(TrainerCallback):
    """Keeps count of tokens, the epoch of the plan, and the time that counts as training."""

    def __init__(self, trainer: FalconTrainer):
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.meter.resume()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        share = self._trainer.share
        state.epoch = share.epoch
        state.num_input_tokens_seen += share.global_tokens
        self._trainer.meter.add(
            tokens=share.global_tokens, positions=share.global_positions, capacity=share.global_capacity
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._trainer.meter.pause()


class MetricsWriter(TrainerCallback):
    """Writes one line a log step, the evaluation's loss in the line of its step.

    Args:
        append: called on the main process with the step and what was logged.
    """

    def __init__(self, append: Callable[[int, dict[str, Any]], None]):
        self._append = append
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


def peak_memory_gib() -> float:
    """GiB this process reserved on its GPU at the most; without one, its peak resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _only(items: list[Any]) -> Any:
    return items[0]
