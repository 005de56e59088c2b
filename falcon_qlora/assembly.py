"""From the configuration to the parts of a run: what `train` puts together, a function a part.

Everything these call takes plain parameters; the configuration as a whole goes no further than here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falcon_qlora import distributed
from falcon_qlora.config import Configuration
from falcon_qlora.data.batches import DocumentReader, StreamingSteps, TrainingSteps
from falcon_qlora.data.plan import Plan
from falcon_qlora.errors import UserError
from falcon_qlora.run_directory import RunDirectory

if TYPE_CHECKING:
    from falcon_qlora.tracking import Trackers
    from falcon_qlora.trainer import FalconTrainer


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What a run trains on.

    Attributes:
        steps: one `Share` an optimizer step, for this process.
        total_steps: optimizer steps of the run.
        epochs: passes over the data in them; None for a stream.
        dataset: the tokenized documents, of a stream only its first: what TRL looks at.
        statistics: what became of the rows; None for a stream.
        held_out: the held-out documents, or None.
        record: what data.json says.
        dataset_format: of the rows, as recognised.
        template: that wrote them.
        efficiency: real tokens in a step over its room, on average; None for a stream.
        notes: what else happened to the rows, for the terminal.
    """

    steps: TrainingSteps | StreamingSteps
    total_steps: int
    epochs: float | None
    dataset: Any
    statistics: Any
    held_out: Any
    record: dict[str, Any]
    dataset_format: str
    template: str
    efficiency: float | None = None
    notes: list[str] = field(default_factory=list)


def load_tokenizer(configuration: Configuration) -> Any:
    """The tokenizer; the main process downloads it."""
    from falcon_qlora.models import tokenizer

    model = configuration.model
    return distributed.main_process_first(
        lambda: tokenizer.load_tokenizer(
            model.model_name_or_path,
            tokenizer_name_or_path=model.tokenizer_name_or_path,
            revision=model.model_revision,
        )
    )


def corpora(configuration: Configuration, tokenizer: Any, **changes: Any) -> tuple[Any, Any]:
    """The tokenized documents to train on, and those held out or None; from the cache where they are there.

    Args:
        changes: arguments of `prepare_corpora` that replace the configuration's.
    """
    from falcon_qlora.data.tokenize import prepare_corpora
    from falcon_qlora.models.tokenizer import tokenizer_fingerprint

    data, run = configuration.data, configuration.run
    settings = _row_settings(configuration) | {
        "eval_split": data.eval_split,
        "tokenizer": tokenizer,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "seed": run.seed,
        "num_proc": data.dataset_num_proc,
        "cache_dir": Path(data.cache_dir) if data.cache_dir else None,
        "max_rows": data.max_rows,
    }
    return prepare_corpora(**settings | changes)


def training_data(configuration: Configuration, tokenizer: Any) -> TrainingData:
    """Rows, tokens, and which of them make each step."""
    if configuration.data.streaming:
        return _streamed_data(configuration, tokenizer)
    data, run = configuration.data, configuration.run
    corpus, held_out = distributed.main_process_first(lambda: corpora(configuration, tokenizer))
    plan = Plan(
        lengths=corpus.lengths,
        fingerprint=corpus.fingerprint,
        seed=run.seed,
        global_batch=global_batch(configuration),
        max_length=data.max_length,
        packed=data.packing,
        order=data.train_sampling_strategy,
    )
    total_steps = run.max_steps if run.max_steps > 0 else plan.steps(run.num_train_epochs)
    steps = TrainingSteps(
        DocumentReader(
            corpus.dataset,
            padding=None if data.packing else data.padding,
            max_length=data.max_length,
            padding_id=tokenizer.eos_token_id,
        ),
        plan,
        corpus.target_counts,
        steps=total_steps,
        micro_batch=run.per_device_train_batch_size,
        process=distributed.process_index(),
        processes=distributed.world_size(),
    )
    epoch, place = plan.locate(total_steps)
    first_epoch = plan.epoch(0)
    room = len(first_epoch) * plan.global_batch * plan.max_length
    record: dict[str, Any] = {
        "fingerprint": corpus.fingerprint,
        **corpus.statistics.to_dict(),
        "sources": [use.to_dict() for use in corpus.sources],
    }
    if held_out is not None:
        record["held_out"] = {"fingerprint": held_out.fingerprint, **held_out.statistics.to_dict()}
    return TrainingData(
        steps=steps,
        total_steps=total_steps,
        epochs=epoch + place / len(plan.epoch(epoch)),
        dataset=corpus.dataset,
        statistics=corpus.statistics,
        held_out=held_out,
        record=record,
        dataset_format=corpus.sources[0].format,
        template=corpus.sources[0].template,
        efficiency=float(corpus.lengths.sum()) / room if data.packing else None,
        notes=_what_happened(corpus.statistics),
    )


def _streamed_data(configuration: Configuration, tokenizer: Any) -> TrainingData:
    """Rows that are read as they are needed; held-out rows, being few, are tokenized ahead as always."""
    import datasets

    from falcon_qlora.data.stream import recognise_stream, stream_documents

    data, run = configuration.data, configuration.run
    settings = _row_settings(configuration) | {"max_rows": data.max_rows}

    def documents(epoch: int) -> Iterator[dict[str, Any]]:
        return stream_documents(**settings, tokenizer=tokenizer, seed=run.seed, epoch=epoch)

    held_out = None
    if data.eval_split is not None:
        held_out = distributed.main_process_first(lambda: _held_out_of_stream(configuration, tokenizer))
    dataset_format, template = distributed.main_process_first(
        lambda: recognise_stream(
            dataset_name=data.dataset_name,
            dataset_config=data.dataset_config,
            dataset_split=data.dataset_train_split,
            dataset_format=data.dataset_format,
            columns=data.columns(),
            template=data.template,
        )
    )
    first = next(documents(0), None)
    if first is None:
        raise UserError(f"{', '.join(data.dataset_name)}: no row has an answer to train on")
    steps = StreamingSteps(
        documents,
        steps=run.max_steps,
        global_batch=global_batch(configuration),
        micro_batch=run.per_device_train_batch_size,
        max_length=data.max_length,
        padding=None if data.packing else data.padding,
        padding_id=tokenizer.eos_token_id,
        process=distributed.process_index(),
        processes=distributed.world_size(),
    )
    return TrainingData(
        steps=steps,
        total_steps=run.max_steps,
        epochs=None,
        dataset=datasets.Dataset.from_list([first]),
        statistics=None,
        held_out=held_out,
        record={"streaming": True, "sources": data.dataset_name},
        dataset_format=dataset_format,
        template=template,
        notes=["streamed: rows are read as they are needed"],
    )


def _held_out_of_stream(configuration: Configuration, tokenizer: Any) -> Any:
    split = configuration.data.eval_split
    assert split is not None
    changes: dict[str, Any] = {"dataset_name": [split], "dataset_weights": None}
    if split.startswith("split:"):
        changes = {"dataset_split": split.removeprefix("split:"), "dataset_weights": None}
    return corpora(configuration, tokenizer, eval_split=None, **changes)[0]


def _what_happened(statistics: Any) -> list[str]:
    told = {
        "rows_dropped_empty": "dropped (empty answer)",
        "rows_dropped_masked": "dropped (no answer left)",
        "rows_dropped_overlong": "dropped (too long)",
        "rows_truncated": "truncated",
        "rows_split": "split",
        "rows_duplicate": "duplicate",
    }
    counted = [(getattr(statistics, name), what) for name, what in told.items()]
    return [f"{count:,} {what}" for count, what in counted if count]


def global_batch(configuration: Configuration) -> int:
    """Sequences of one optimizer step, over all processes and micro batches."""
    run = configuration.run
    if run.global_batch_size is not None:
        return run.global_batch_size
    return run.per_device_train_batch_size * distributed.world_size() * run.gradient_accumulation_steps


def model_with_adapter(configuration: Configuration, tokenizer: Any) -> Any:
    """The quantized replica on this process's device, with LoRA on top, ready for packed documents."""
    from falcon_qlora.methods.lora import attach_lora
    from falcon_qlora.models.checkpoints import open_checkpoint
    from falcon_qlora.models.forward import enable_packing
    from falcon_qlora.models.load import load_model
    from falcon_qlora.models.tokenizer import check_vocabulary

    settings, lora = configuration.model, configuration.lora
    # Downloads what is missing.
    distributed.main_process_first(
        lambda: open_checkpoint(settings.model_name_or_path, revision=settings.model_revision)
    )
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
    model = attach_lora(
        model,
        r=lora.lora_r,
        alpha=lora.lora_alpha,
        dropout=lora.lora_dropout,
        target_modules=lora.lora_target_modules,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        seed=configuration.run.seed,
    )
    enable_packing(model)
    return model


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


def _row_settings(configuration: Configuration) -> dict[str, Any]:
    data = configuration.data
    return {
        "dataset_name": data.dataset_name,
        "dataset_weights": data.dataset_weights,
        "dataset_config": data.dataset_config,
        "dataset_split": data.dataset_train_split,
        "dataset_format": data.dataset_format,
        "columns": data.columns(),
        "template": data.template,
        "train_on": data.train_on,
        "append_end_token": data.append_end_token,
        "overlong": data.overlong,
        "max_length": data.max_length,
    }


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

    from falcon_qlora.answers import SampleAnswers
    from falcon_qlora.progress import ProgressCallback
    from falcon_qlora.trainer import Evaluation, FalconTrainer, MetricsWriter, trainer_arguments

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
        evaluation=evaluation,
        run_folder=directory.path,
        tokenizer=tokenizer,
        describe_adapter=describe_adapter,
        callbacks=callbacks,
    )
