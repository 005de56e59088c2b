"""From the configuration to the model with its adapter and the trainer around it.

What these call takes plain parameters; the configuration as a whole goes no further than here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falcon_qlora.config import Configuration
from falcon_qlora.data.batches import DocumentReader
from falcon_qlora.processes import agreement, ranks, stop_signals
from falcon_qlora.run_folder.directory import RunDirectory
from falcon_qlora.training.resume import how_to_go_on
from falcon_qlora.training.rows import TrainingData, global_batch

if TYPE_CHECKING:
    from falcon_qlora.run_folder.tracking import Trackers
    from falcon_qlora.training.trainer import FalconTrainer


def model_with_adapter(configuration: Configuration, tokenizer: Any) -> Any:
    """The replica on this process's device, made trainable by the method, ready for packed documents."""
    from falcon_qlora.models.forward import enable_packing
    from falcon_qlora.models.load import load_model
    from falcon_qlora.models.locate import open_checkpoint
    from falcon_qlora.models.tokenizer import check_vocabulary
    from falcon_qlora.terminal.console import patience

    settings = configuration.model
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
        )
    check_vocabulary(tokenizer, model.config.vocab_size, name=settings.model_name_or_path)
    trained = configuration.method.attach(model, seed=configuration.run.seed)
    enable_packing(trained)
    return trained


def sample_prompts(
    configuration: Configuration, data: TrainingData, tokenizer: Any
) -> list[tuple[str, list[int]]]:
    """What sample answers are asked for: a text to show and its token ids, a prompt a pair.

    The user's prompts, written with the rows' template; without any, the prompts of the first held-out rows.
    """
    from falcon_qlora.data.templates import Turn, get_template

    if configuration.run.sample_prompts:
        template = get_template(data.template, tokenizer.special_tokens_map)
        prompts = configuration.run.sample_prompts
        texts = [template.prompt([Turn("user", prompt)]) for prompt in prompts]
        return [
            (prompt, tokenizer(text, add_special_tokens=False)["input_ids"])
            for prompt, text in zip(prompts, texts, strict=True)
        ]
    if data.held_out is None:
        return []
    rows = data.held_out.dataset.select(
        range(min(len(data.held_out.lengths), configuration.run.generate_samples))
    )
    asked = []
    for row in rows:
        first_target = next((place for place, target in enumerate(row["mask"]) if target and place), 1)
        ids = list(row["input_ids"][:first_target])
        asked.append((tokenizer.decode(ids), ids))
    return asked


def build_trainer(
    configuration: Configuration,
    directory: RunDirectory,
    *,
    tokenizer: Any,
    data: TrainingData,
    model: Any,
    trackers: Trackers,
    describe_adapter: Callable[[Path], None],
) -> FalconTrainer:
    """The trainer with everything that listens to it.

    Args:
        describe_adapter: completes an adapter's folder after it is written.
    """
    from transformers import EarlyStoppingCallback

    from falcon_qlora.inference.evaluation import Evaluation
    from falcon_qlora.inference.sample_answers import SampleAnswers
    from falcon_qlora.training.callbacks import MetricsWriter
    from falcon_qlora.training.progress import ProgressCallback
    from falcon_qlora.training.trainer import FalconTrainer, trainer_arguments

    training, run, settings = configuration.training, configuration.run, configuration.data
    training.output_dir = str(directory.path)
    training.run_name = training.run_name or directory.path.name  # Trackio asks the trainer for it
    evaluation = None
    if data.held_out is not None:
        evaluation = Evaluation(
            reader=DocumentReader(
                data.held_out.dataset,
                padding=None,
                max_length=settings.max_length,
                padding_id=tokenizer.eos_token_id,
            ),
            lengths=data.held_out.lengths,
            target_tokens=int(data.held_out.target_counts.sum()),
            micro_batch=min(training.per_device_eval_batch_size, run.per_device_train_batch_size),
            max_length=settings.max_length,
        )
    callbacks: list[Any] = [MetricsWriter(directory.append_metrics), trackers.callback, ProgressCallback()]
    if run.early_stopping and evaluation is not None:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=run.early_stopping))
        training.metric_for_best_model, training.greater_is_better = "eval_loss", False  # kept or not
    if run.generate_samples:
        prompts = sample_prompts(configuration, data, tokenizer)
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
        run_folder=directory.path,
        tokenizer=tokenizer,
        describe_adapter=describe_adapter,
        callbacks=callbacks,
        checkpoint_record={
            "global_batch": global_batch(configuration),
            "data_fingerprint": data.record.get("fingerprint"),
            "stream": data.record if settings.streaming else None,
            "launch": ranks.launch_id(),
        },
        on_saved=lambda checkpoint: stop_signals.tell_launcher(
            f"the last complete checkpoint is {checkpoint}; go on with:  {how_to_go_on(directory)}"
        ),
        max_bad_steps=run.max_bad_steps,
        save_every_minutes=run.save_every_minutes,
        hang_minutes=run.hang_minutes,
    )
