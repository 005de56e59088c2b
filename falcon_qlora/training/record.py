"""What a run writes down about itself: before it starts, beside every adapter, and when it is done."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from falcon_qlora.checkpoint.adapter_check import AdapterFaultError, check_adapter
from falcon_qlora.checkpoint.manifest import newest_whole, write_manifest
from falcon_qlora.checkpoint.write import disk_errors, last_complete, not_kept, require_same_replicas
from falcon_qlora.common.errors import UserError, reason_of
from falcon_qlora.common.quantities import GIB
from falcon_qlora.common.version import VERSION
from falcon_qlora.config import Configuration
from falcon_qlora.data.batches import TrainingSteps
from falcon_qlora.data.templates import template_fingerprint
from falcon_qlora.methods.adapter_folder import write_record
from falcon_qlora.methods.interface import method_of
from falcon_qlora.models.fast_path import described
from falcon_qlora.models.fingerprint import model_fingerprint, tokenizer_fingerprint
from falcon_qlora.models.layouts import layout_of
from falcon_qlora.models.quantize import is_quantized_linear
from falcon_qlora.models.sharded import is_sharded, take_part, whole_shape
from falcon_qlora.models.sizes import weight_bytes
from falcon_qlora.processes import agreement, devices, ranks
from falcon_qlora.processes.stop_signals import Stopped
from falcon_qlora.run_folder.directory import RunDirectory
from falcon_qlora.run_folder.environment import collect_environment
from falcon_qlora.run_folder.model_card import ModelCard
from falcon_qlora.run_folder.summary import Summary
from falcon_qlora.run_folder.tracking import Trackers
from falcon_qlora.terminal import console
from falcon_qlora.terminal.console import StartSummary
from falcon_qlora.training.activations import Activations
from falcon_qlora.training.resume import forget_after, how_to_go_on, step_of
from falcon_qlora.training.rows import TrainingData, global_batch
from falcon_qlora.training.throughput import peak_memory_gib
from falcon_qlora.training.trainer import FalconTrainer

# Before a disk that failed is tried again.
_PAUSE_SECONDS = 3.0


def write_start(
    configuration: Configuration,
    directory: RunDirectory,
    data: TrainingData,
    trackers: Trackers,
    kernels: dict[str, str],
    checkpoint: str | None,
) -> None:
    """Write the configuration, the environment and the data's record; on the main process.

    Args:
        kernels: block → what runs it, for kernels.json.
        checkpoint: that the run goes on from; what was logged after it is forgotten, as it is done again.
    """
    if not ranks.is_main_process():
        return
    if checkpoint is not None:
        forget_after(directory, step_of(checkpoint))
    elif configuration.run.overwrite:
        directory.clear(keep=trackers.written)
    elif ranks.restart_count():
        forget_after(directory, 0)
    directory.write_config(configuration.resolved())
    directory.write_environment(collect_environment(world_size=ranks.world_size()))
    directory.write_data(data.record)
    directory.write_kernels(kernels or {"all blocks": "reference path: --kernels off"})


def counts(model: Any) -> dict[str, int]:
    """Parameters and quantized linears of a model with an adapter; quantized weights counted unpacked."""
    trainable = sum(whole_shape(p).numel() for p in model.parameters() if p.requires_grad)
    groups = [group for group in method_of(model).parameter_groups(model.config) if not group.of_base]
    return {
        "trainable_parameters": trainable,
        "total_parameters": layout_of(model.config).parameter_count() + sum(group.count for group in groups),
        "quantized_linears": sum(is_quantized_linear(module) for module in model.modules()),
    }


def start_summary(
    configuration: Configuration,
    directory: RunDirectory,
    data: TrainingData,
    model: Any,
    *,
    tracking: list[str],
    kernels: dict[str, str],
    activations: Activations,
    checkpoint: str | None,
    notes: list[str],
) -> StartSummary:
    """What the terminal shows before the first step.

    Args:
        notes: to end with, beside what follows from the configuration.
    """
    settings, run, rows = configuration.model, configuration.run, configuration.data
    counted = counts(model)
    statistics = data.statistics
    micro_batch = run.per_device_train_batch_size
    sequences = global_batch(configuration)
    return StartSummary(
        model=settings.model_name_or_path,
        layout=f"{model.config.num_hidden_layers} blocks of {model.config.hidden_size}",
        total_parameters=counted["total_parameters"],
        trainable_parameters=counted["trainable_parameters"],
        quantize_mode=settings.quantize_mode,
        quantization=_quantization(configuration, model),
        quantized_linears=counted["quantized_linears"],
        model_gib=_weights_gib(configuration, model),
        kernels=described(kernels) if kernels else "off: the reference path",
        activations=activations.described(),
        method=method_of(model).describe(),
        world_size=ranks.world_size(),
        device=devices.name_of(devices.local_device()),
        nodes=ranks.world_size() // ranks.local_world_size(),
        documents=statistics.documents if statistics else None,
        tokens=statistics.tokens if statistics else None,
        target_tokens=statistics.target_tokens if statistics else None,
        data_notes=data.notes,
        eval_documents=len(data.held_out.lengths) if data.held_out is not None else None,
        steps=data.total_steps,
        epochs=data.epochs,
        batch=f"{sequences} × {rows.max_length:,} tokens a step, {micro_batch} at a time on each device",
        packing_efficiency=data.efficiency,
        tracking=tracking,
        output_dir=directory.path,
        resumed_step=step_of(checkpoint) if checkpoint else None,
        notes=[*_notes(configuration), *notes],
    )


def describe_adapter(
    configuration: Configuration, data: TrainingData, folder: Path, summary: dict[str, Any] | None = None
) -> None:
    """Complete an adapter's folder: its model card, and what `generate` must know to open and ask it."""
    settings, rows, method = configuration.model, configuration.data, configuration.method
    write_record(
        folder,
        {
            "base_model": settings.model_name_or_path,
            "base_fingerprint": model_fingerprint(settings.model_name_or_path),
            "quantize_mode": settings.quantize_mode,
            "double_quantization": settings.double_quantization,
            "tokenizer": settings.tokenizer_name_or_path,
            "tokenizer_fingerprint": tokenizer_fingerprint(
                settings.tokenizer_name_or_path or settings.model_name_or_path
            ),
            "template": data.template,
            "template_fingerprint": template_fingerprint(data.template),
            "dataset_format": data.dataset_format,
            "method": method.name,
            **method.flags(),
        },
    )
    resolved = configuration.resolved()
    shown = (
        f"method quantize_mode double_quantization compute_dtype {' '.join(method.flags())} max_length "
        "packing train_on optim learning_rate lr_scheduler_type warmup_steps max_grad_norm seed"
    ).split()
    ModelCard(
        base_model=settings.model_name_or_path,
        method=method.name,
        title=method.title,
        trains=method.trains,
        opened_by=method.opened_by,
        base_is_random=settings.model_name_or_path.startswith("random:"),
        datasets=rows.dataset_name,
        settings={name: resolved[name] for name in shown if resolved.get(name) is not None},
        data={name: value for name, value in data.record.items() if isinstance(value, int)},
        summary=summary or {},
        template=data.template,
        version=VERSION,
    ).write(folder)


def finish(
    configuration: Configuration,
    directory: RunDirectory,
    trainer: FalconTrainer,
    data: TrainingData,
    trackers: Any,
    activations: Activations,
) -> Summary:
    """Prove that the replicas agree, write the adapter and the summary, and say what was written.

    Raises:
        UserError: if the replicas differ, if the adapter cannot be written, or if as it lies on the disk it
            is not the one in memory; it is not kept.
    """
    model = trainer.model
    if not is_sharded(model):
        held = itertools.chain(model.parameters(), model.buffers())
        require_same_replicas(held, directory.checkpoints, step=trainer.state.global_step)
    peaks = agreement.gather_objects(peak_memory_gib())
    reductions = agreement.gather_objects(round(trainer.reduction_share(), 4))
    lines: list[dict[str, Any]] = []
    with _told_if_not_written(directory.summary_file):
        lines = directory.read_metrics()
    losses = [line["loss"] for line in lines if "loss" in line]
    evaluations = [
        (line["eval_loss"], line["step"])
        for line in lines
        if line.get("eval_loss") is not None and line["step"] > 0  # before, there is nothing to keep
    ]
    best: tuple[float | None, int | None] = min(evaluations, default=(None, None))
    if trainer.args.load_best_model_at_end:  # of the adapter that is kept
        best = trainer.state.best_metric, trainer.state.best_global_step
    totals = trainer.meter.total()
    summary = Summary(
        steps=trainer.state.global_step,
        first_loss=losses[0] if losses else None,
        final_loss=losses[-1] if losses else None,
        train_seconds=trainer.meter.seconds,
        tokens_per_second=totals.get("tokens_per_second", 0.0),
        samples_per_second_512=totals.get("samples_per_second_512", 0.0),
        peak_memory_gib=max(peaks),
        total_peak_memory_gib=sum(peaks),
        world_size=ranks.world_size(),
        best_eval_loss=best[0],
        best_step=best[1],
        bad_steps=trainer.step.bad_steps.total,
        micro_batch_parts=2**trainer.step.halvings,
        tokens=trainer.state.num_input_tokens_seen,
        samples=_samples(trainer),
        predicted_peak_memory_gib=activations.predicted_gib,
        reduction_shares=reductions if len(reductions) > 1 else None,
        **counts(model),
    )
    _keep_adapter(configuration, directory, trainer, data, asdict(summary))
    if ranks.is_main_process():
        with _told_if_not_written(directory.summary_file):
            directory.write_summary(summary)
        with _told_if_not_written(directory.loss_picture):
            directory.draw_loss(title=configuration.model.model_name_or_path)
        console.print_end(asdict(summary), directory.contents(), adapter=directory.adapter)
    trackers.finish(summary=asdict(summary), adapter=directory.adapter)
    return summary


def _keep_adapter(
    configuration: Configuration,
    directory: RunDirectory,
    trainer: FalconTrainer,
    data: TrainingData,
    summary: dict[str, Any],
) -> None:
    """Write the adapter's folder; where the disk fails, once more after a while.

    Raises:
        UserError: see `finish`; on all processes alike.
    """
    model = trainer.model

    def write() -> str | None:
        took_part = False
        try:
            with directory.write_folder(directory.adapter) as folder:
                took_part = True
                with disk_errors():
                    method_of(model).save(model, folder)
                    trainer.processing_class.save_pretrained(folder)
                    describe_adapter(configuration, data, folder, summary)
                check_adapter(folder, model, trained=trainer.has_learned())
                # A model card is there to be written on.
                write_manifest(folder, {"step": trainer.state.global_step}, leave_out=["README.md"])
        except OSError as error:
            if is_sharded(model) and not took_part:
                take_part(model)  # the others do
            return reason_of(error)
        except AdapterFaultError as error:
            told = not_kept(error, directory.checkpoints, step=trainer.state.global_step)
            raise UserError(told) from None
        return None

    for tries_left in (1, 0):
        if is_sharded(model) and not ranks.is_main_process():
            take_part(model)
        failure = agreement.from_main_process(write)
        if failure is None:
            return
        if tries_left:
            console.note(f"the adapter could not be written ({failure}): it is tried once more in a moment")
            time.sleep(_PAUSE_SECONDS)
    last = agreement.from_main_process(lambda: last_complete(directory.checkpoints))
    raise UserError(f"all steps are done, but {directory.adapter} could not be written ({failure}). {last}")


@contextlib.contextmanager
def _told_if_not_written(file: Path) -> Iterator[None]:
    """The adapter is worth more than what is said about it."""
    try:
        yield
    except OSError as error:
        console.note(f"{file} could not be written ({reason_of(error)})")


def stop(
    directory: RunDirectory, stopped: Stopped, trackers: Trackers, *, steps: int, resumable: bool
) -> None:
    """Say where a run that was asked to stop has come to, and how it goes on.

    Args:
        steps: of the whole run.
        resumable: whether its checkpoints hold the optimizer's state.

    Raises:
        UserError: if it could not be saved there.
    """
    trackers.finish(exit_status=int(stopped.failure is not None))
    if ranks.is_main_process():
        with contextlib.suppress(OSError):
            directory.draw_loss()
    where = f"stopped at step {stopped.step:,} of {steps:,}"
    if stopped.failure is not None:
        whole = agreement.from_main_process(lambda: newest_whole(directory.checkpoints)[0])
        last = f"the last complete checkpoint is {whole}" if whole else "there is no complete checkpoint"
        raise UserError(f"{where}, but the checkpoint could not be saved ({stopped.failure}); {last}")
    if not resumable:
        kept = directory.checkpoint(stopped.step)
        console.print_plain(f"{where}. {kept} holds the weights alone: the run cannot go on")
        return
    console.print_plain(f"{where}. Go on with:  {how_to_go_on(directory)}")


def _samples(trainer: FalconTrainer) -> int | None:
    plan = trainer.steps.plan if isinstance(trainer.steps, TrainingSteps) else None
    return plan.documents_until(trainer.state.global_step) if plan is not None else None


def _weights_gib(configuration: Configuration, model: Any) -> float:
    settings = configuration.model
    taken = weight_bytes(
        model.config,
        settings.quantize_mode,
        double_quantization=settings.double_quantization,
        compute_bytes=model.dtype.itemsize,
    )
    return taken / GIB


def _quantization(configuration: Configuration, model: Any) -> str:
    settings = configuration.model
    computing = f"computing in {str(model.dtype).removeprefix('torch.')}"
    if settings.quantize_mode == "4bit":
        return f"NF4{', double quantization' if settings.double_quantization else ''}, {computing}"
    return f"LLM.int8(), {computing}" if settings.quantize_mode == "8bit" else computing


def _notes(configuration: Configuration) -> list[str]:
    if not configuration.model.model_name_or_path.startswith("random:"):
        return []
    return ["the base model's weights are random: speed and memory are real, losses and answers mean nothing"]
