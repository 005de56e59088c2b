"""Builds the model with its adapter, and the trainer around it, from the settings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falcon_qlora.config.arguments import ModelArguments, RunArguments
from falcon_qlora.data.batches import DocumentReader
from falcon_qlora.processes import agreement, ranks, stop_signals
from falcon_qlora.run_folder.directory import RunDirectory
from falcon_qlora.terminal.console import note, patience
from falcon_qlora.training.resume import how_to_go_on
from falcon_qlora.training.rows import TrainingData, global_batch
from falcon_qlora.training.same_run import DRAWING

if TYPE_CHECKING:
    from trl import SFTConfig

    from falcon_qlora.methods.interface import Method
    from falcon_qlora.run_folder.tracking import Trackers
    from falcon_qlora.training.batch_tokens import Cutter
    from falcon_qlora.training.trainer import FalconTrainer


def model_with_adapter(
    settings: ModelArguments,
    method: Method,
    tokenizer: Any,
    *,
    seed: int,
    adapter: str | None = None,
    share_out: bool = False,
    offload: bool = False,
) -> Any:
    """The model on this process's device, made trainable by the method, ready for packed documents.

    Args:
        adapter: the folder of a trained adapter to begin from; None for a fresh one.
        share_out, offload: where the frozen weights lie, see `load_model`.
    """
    from falcon_qlora.models.forward import enable_packing
    from falcon_qlora.models.load import load_model
    from falcon_qlora.models.locate import open_checkpoint
    from falcon_qlora.models.tokenizer import check_vocabulary

    # Downloads what is missing.
    agreement.main_process_first(
        lambda: open_checkpoint(settings.model_name_or_path, revision=settings.model_revision)
    )
    with patience() as doing:
        doing(f"loading {settings.model_name_or_path}")
        model = load_model(
            settings.model_name_or_path,
            quantize_mode=settings.quantize_mode,
            compute_dtype=settings.compute_dtype,
            double_quantization=settings.double_quantization,
            norms_in_float32=settings.norms_in_float32,
            llm_int8_threshold=settings.llm_int8_threshold,
            revision=settings.model_revision,
            share_out=share_out,
            offload=offload,
        )
    check_vocabulary(
        tokenizer, model.config.vocab_size, name=settings.model_name_or_path, added=method.new_token_count
    )
    method = method.for_tokenizer(tokenizer)
    if adapter is None:
        trained = method.attach(model, seed=seed)
    else:
        trained = method.open(model, Path(adapter), trainable=True)
    enable_packing(trained)
    return trained


def sample_prompts(run: RunArguments, data: TrainingData, tokenizer: Any) -> list[tuple[str, list[int]]]:
    """The prompts of the sample answers: for each, a text to show and its token ids.

    They are the user's prompts, in the rows' template; without any, the prompts of the first held-out rows.
    """
    from falcon_qlora.data.templates import Turn, get_template
    from falcon_qlora.data.tokens import prompt_ids

    if run.sample_prompts:
        template = get_template(data.template, tokenizer.special_tokens_map, tokenizer.chat_template)
        return [
            (prompt, prompt_ids(template, [Turn("user", prompt)], tokenizer)) for prompt in run.sample_prompts
        ]
    if data.held_out is None:
        return []
    rows = data.held_out.dataset.select(range(min(len(data.held_out.lengths), run.generate_samples)))
    asked = []
    for row in rows:
        first_target = next((place for place, target in enumerate(row["mask"]) if target and place), 1)
        ids = list(row["input_ids"][:first_target])
        asked.append((tokenizer.decode(ids), ids))
    return asked


def trainer_arguments(training: SFTConfig, *, total_steps: int) -> SFTConfig:
    """The user's settings, changed where this trainer needs fixed values.

    The step makes micro-batches and clips, so the loop sees no gradient accumulation, no packing, no data
    preparation and no `max_grad_norm`. Recomputation is chosen elsewhere too, see `models.activations`.

    Args:
        training: the user's settings.
        total_steps: optimizer steps of the run.
    """
    training = copy.copy(training)
    if training.n_gpu > 1:
        # Otherwise Transformers uses DataParallel in one process without a launcher.
        note(f"one of {training.n_gpu} GPUs is used: this is one process. falcon-qlora train uses all")
        training._n_gpu = 1
    training.max_steps = total_steps
    training.max_grad_norm = 0.0
    training.dataset_kwargs = {"skip_prepare_dataset": True}
    training.remove_unused_columns = False
    training.include_num_input_tokens_seen = "no"
    training.average_tokens_across_devices = False
    training.disable_tqdm = True
    training.log_level = training.log_level_replica = "error"  # the trainer sets it for all of Transformers
    training.logging_nan_inf_filter = False  # it waits for the loss of every step
    training.push_to_hub = False  # done at the end of the run instead
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


def build_trainer(
    training: SFTConfig,
    run: RunArguments,
    directory: RunDirectory,
    *,
    max_length: int,
    tokenizer: Any,
    data: TrainingData,
    model: Any,
    trackers: Trackers,
    describe_adapter: Callable[[Path], None],
    settings: dict[str, Any],
    began: float,
    cutter: Cutter,
) -> FalconTrainer:
    """The trainer with its callbacks.

    Args:
        training: the settings of TRL's trainer.
        max_length: tokens of a sequence.
        describe_adapter: completes an adapter's folder after it is written.
        settings: `same_run.compared_settings`.
        began: seconds since the epoch at which the command began.
        cutter: how a step is cut into micro-batches.
    """
    from transformers import EarlyStoppingCallback

    from falcon_qlora.checkpoint.checkpointer import Checkpointer
    from falcon_qlora.inference.evaluation import Evaluation
    from falcon_qlora.inference.sample_answers import SampleAnswers
    from falcon_qlora.processes.watchdog import Watchdog
    from falcon_qlora.training.callbacks import MetricsWriter
    from falcon_qlora.training.progress import ProgressCallback
    from falcon_qlora.training.trainer import FalconTrainer

    training.output_dir = str(directory.path)
    training.run_name = training.run_name or directory.path.name  # Trackio asks the trainer for it
    evaluation = None
    if data.held_out is not None:
        evaluation = Evaluation(
            reader=DocumentReader(
                data.held_out.dataset, padding=None, max_length=max_length, padding_id=tokenizer.eos_token_id
            ),
            lengths=data.held_out.lengths,
            target_tokens=int(data.held_out.target_counts.sum()),
            micro_batch=training.per_device_eval_batch_size,
            max_length=max_length,
        )
    watchdog = Watchdog(run.hang_minutes * 60, directory.path / "flight_record")
    go_on = f"; go on {how_to_go_on(directory)}"
    if training.save_only_model:
        go_on = ", weights only: the run cannot be resumed"
    checkpointer = Checkpointer(
        directory.checkpoints,
        describe_adapter=describe_adapter,
        record={
            "global_batch": global_batch(run),
            "data_fingerprint": data.record.get("fingerprint"),
            "stream": data.record if data.record.get("streaming") else None,
            "launch": ranks.launch_id(),
            "drawing": DRAWING,
            "settings": settings,
            **({"cut": cutter.record()} if data.steps.dealing.tokens is not None else {}),
        },
        on_saved=lambda checkpoint: stop_signals.tell_launcher(
            f"the last complete checkpoint is {checkpoint}{go_on}"
        ),
        every_minutes=run.save_every_minutes,
        limit=training.save_total_limit,
        weights_only=training.save_only_model,
        address=directory.address,
        at=watchdog.at,
    )
    callbacks: list[Any] = [
        MetricsWriter(directory.append_metrics),
        trackers.callback,
        ProgressCallback(checkpointer.unsaved),
    ]
    if run.early_stopping and evaluation is not None:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=run.early_stopping))
        training.metric_for_best_model, training.greater_is_better = "eval_loss", False  # kept or not
    if run.generate_samples:
        prompts = sample_prompts(run, data, tokenizer)
        callbacks.append(
            SampleAnswers(prompts[: run.generate_samples], tokenizer, directory.path / "samples.jsonl")
        )
    return FalconTrainer(
        model,
        trainer_arguments(training, total_steps=data.total_steps),
        steps=data.steps,
        corpus=data.dataset,
        names=data.names,
        evaluation=evaluation,
        checkpointer=checkpointer,
        cutter=cutter,
        watchdog=watchdog,
        tokenizer=tokenizer,
        callbacks=callbacks,
        began=began,
        max_length=max_length,
        max_grad_norm=training.max_grad_norm or 0.0,
        max_bad_steps=run.max_bad_steps,
    )
