"""What a run records about itself: before it starts, beside every adapter, and when it is done."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from falcon_qlora.common.files import write_json
from falcon_qlora.common.quantities import counted, passes, sized
from falcon_qlora.common.record_files import AUTO
from falcon_qlora.config import Configuration
from falcon_qlora.config.arguments import RunArguments
from falcon_qlora.methods.adapter_folder import write_record
from falcon_qlora.methods.interface import Method, method_of
from falcon_qlora.methods.lora import Lora
from falcon_qlora.models.fast_path import MEND, described, failed_libraries
from falcon_qlora.models.fingerprint import tokenizer_fingerprint
from falcon_qlora.models.layouts import layout_of
from falcon_qlora.models.quantize import is_quantized_linear
from falcon_qlora.models.sharded import whole_shape
from falcon_qlora.models.sharded_base import sharded_base_of
from falcon_qlora.models.sizes import weight_bytes
from falcon_qlora.models.tokenizer import save_tokenizer
from falcon_qlora.processes import devices, ranks
from falcon_qlora.run_folder.directory import RunDirectory
from falcon_qlora.run_folder.environment import collect_environment
from falcon_qlora.run_folder.model_card import ModelCard
from falcon_qlora.run_folder.tracking import Trackers
from falcon_qlora.terminal.console import joined
from falcon_qlora.training.batch_tokens import Cutter
from falcon_qlora.training.estimate import Estimate
from falcon_qlora.training.resume import forget_after, step_of
from falcon_qlora.training.rows import TrainingData, global_batch
from falcon_qlora.training.speed_note import speed_note

if TYPE_CHECKING:
    from trl import SFTConfig

    from falcon_qlora.data.packing import Plan

# Fewer steps than these hardly move an adapter.
_FEW_STEPS = 10


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
        checkpoint: that the run resumes from; what was logged after it is removed, as it is done again.
    """
    if not ranks.is_main_process():
        return
    if checkpoint is not None:
        forget_after(directory, step_of(checkpoint))
    elif configuration.run.overwrite:
        directory.clear(keep=trackers.written)
    elif ranks.restart_count():
        forget_after(directory, 0)
    elif configuration.run.resume == AUTO:  # what a run left that ended before its first checkpoint
        directory.clear(keep=trackers.written)
    directory.write_config(configuration.resolved())
    directory.write("environment", {**collect_environment(), "launch": ranks.launch_id()})
    write_json(directory.data_file, data.record)
    directory.write("kernels", kernels or {"all blocks": "reference path: --kernels off"})


def counts(model: Any) -> dict[str, Any]:
    """Parameters and quantized linears of a model with an adapter; quantized weights count unpacked."""
    trainable = sum(whole_shape(p).numel() for p in model.parameters() if p.requires_grad)
    groups = [group for group in method_of(model).parameter_groups(model.config) if not group.of_base]
    return {
        "trainable_parameters": trainable,
        "total_parameters": layout_of(model.config).parameter_count() + sum(group.count for group in groups),
        "quantized_linears": sum(is_quantized_linear(module) for module in model.modules()),
    }


def start_rows(
    configuration: Configuration,
    directory: RunDirectory,
    data: TrainingData,
    model: Any,
    *,
    tracking: list[str],
    kernels: dict[str, str],
    cutter: Cutter,
    checkpoint: str | None,
) -> list[tuple[str, str]]:
    """What the terminal shows before the first step: labels and texts."""
    settings, run, known = configuration.model, configuration.run, data.statistics
    sizes, device, processes = counts(model), devices.local_device(), ranks.world_size()
    trainable, total = sizes["trainable_parameters"], sizes["total_parameters"]
    quantized = settings.quantize_mode != "16bit"
    weights = weight_bytes(
        model.config,
        settings.quantize_mode,
        double_quantization=settings.double_quantization,
        compute_bytes=model.dtype.itemsize,
        processes=processes if sharded_base_of(model) is not None else 1,
        offloaded=run.offload_base,
    )
    nodes = processes // ranks.local_world_size()
    batch = f"{global_batch(run)} × {configuration.data.max_length:,} tokens a step"
    at_a_time = f"{run.per_device_train_batch_size} at a time on each device"
    return [
        (
            "model",
            joined(
                settings.model_name_or_path,
                f"{model.config.num_hidden_layers} blocks of {model.config.hidden_size}",
                f"{layout_of(model.config).parameter_count():,} parameters",
            ),
        ),
        (
            "quantized",
            joined(
                settings.quantize_mode if quantized else "no: 16bit",
                _quantization(configuration, model),
                quantized and f"{sizes['quantized_linears']:,} linear layers",
                f"{sized(weights)} on each device",
            ),
        ),
        ("kernels", described(kernels) if kernels else "off: the reference path"),
        ("memory", cutter.activations.described()),
        (
            "training",
            joined(
                method_of(model).describe(),
                run.adapter and f"begun from {run.adapter}",
                f"{trainable:,} of {total:,} parameters ({100 * trainable / total:.2f}%)",
            ),
        ),
        (
            "devices",
            joined(
                f"CPU, {counted(processes, 'process', 'processes')}"
                if device.type == "cpu"
                else f"{processes} × {torch.cuda.get_device_name(device)}",
                nodes > 1 and f"{nodes} machines",
            ),
        ),
        (
            "data",
            joined(
                known and counted(known.documents, "document"),
                known and f"{known.tokens:,} tokens, {known.target_tokens:,} of them in the loss",
                *data.notes,
            ),
        ),
        (
            "held out",
            ""
            if data.held_out is None
            else joined(
                counted(len(data.held_out.lengths), "document"),
                evaluated_when(configuration.training, data.total_steps),
            ),
        ),
        (
            "steps",
            joined(
                f"{data.total_steps:,}",
                data.epochs and passes(data.epochs),
                f"{batch}, {cutter.cut.told() if configuration.data.packing else at_a_time}",
                None if data.efficiency is None else f"packed {100 * data.efficiency:.0f}% full",
                checkpoint and f"going on from step {step_of(checkpoint):,}",
                checkpoint and step_of(checkpoint) >= data.total_steps and "nothing is left to train",
            ),
        ),
        *[("tracking" if index == 0 else "", line) for index, line in enumerate(tracking)],
        ("writes to", str(directory)),
    ]


def evaluated_when(training: SFTConfig, steps: int) -> str:
    """How often held-out rows are evaluated, for the terminal.

    Args:
        training: the trainer's settings.
        steps: of the run.
    """
    strategy = str(getattr(training.eval_strategy, "value", training.eval_strategy))
    if strategy == "no":
        return "never evaluated (--eval_strategy no)"
    every = training.eval_steps or 1
    if every < 1:
        every = math.ceil(every * steps)
    by_steps = "every step" if every == 1 else f"every {int(every):,} steps"
    often = "after each epoch" if strategy == "epoch" else by_steps
    later = f", from {strategy.removesuffix('s')} {training.eval_delay:g} on" if training.eval_delay else ""
    return f"evaluated {'at the start and ' if training.eval_on_start else ''}{often}{later}"


def describe_adapter(
    configuration: Configuration,
    data: TrainingData,
    base_fingerprint: str | None,
    tokenizer: Any,
    folder: Path,
    summary: dict[str, Any] | None = None,
) -> None:
    """Complete an adapter's folder: its model card, and what `generate` needs to open and prompt it.

    A tokenizer with added tokens is saved there too.

    Args:
        base_fingerprint: from `check_base`.
        tokenizer: that was used in training.
        folder: holds what was trained.
        summary: of the run, once it is done.
    """
    settings, rows, method = configuration.model, configuration.data, configuration.method
    run = configuration.run
    write_record(
        folder,
        {
            "base_model": settings.model_name_or_path,
            "base_fingerprint": base_fingerprint,
            "quantize_mode": settings.quantize_mode,
            "double_quantization": settings.double_quantization,
            "tokenizer": settings.tokenizer_name_or_path,
            "tokenizer_fingerprint": tokenizer_fingerprint(
                settings.tokenizer_name_or_path or settings.model_name_or_path
            ),
            "template": data.template,
            "template_fingerprint": data.record["template_fingerprint"],
            "dataset_format": data.dataset_format,
            "method": method.name,
            **method.flags(),
            "began_from": run.adapter,
            "began_from_sha256": run.adapter_sha256,
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
        opened_by="falcon-qlora" if refused_by_peft(method) else method.opened_by,
        refused_by_peft=refused_by_peft(method),
        datasets=rows.dataset_name,
        settings={name: resolved[name] for name in shown if resolved.get(name) is not None},
        data={name: value for name, value in data.record.items() if isinstance(value, int)},
        summary=summary or {},
        template=data.template,
        template_sha256=data.record["template_fingerprint"],
        began_from=(run.adapter, run.adapter_sha256 or "") if run.adapter else None,
        vocabulary=len(tokenizer) if method.new_token_count else None,
    ).write(folder)
    if method.new_token_count:
        save_tokenizer(tokenizer, folder)


def _quantization(configuration: Configuration, model: Any) -> str:
    settings = configuration.model
    computing = f"computing in {str(model.dtype).removeprefix('torch.')}"
    if settings.quantize_mode == "4bit":
        return f"NF4{', double quantization' if settings.double_quantization else ''}, {computing}"
    return f"LLM.int8(), {computing}" if settings.quantize_mode == "8bit" else computing


def refused_by_peft(method: Method) -> list[str]:
    """Linears with LoRA for which plain PEFT does not open the adapter."""
    return method.refused_by_peft if isinstance(method, Lora) else []


def _unseen_tokens(data: TrainingData, method: Method) -> list[str]:
    """A note on new tokens that no document has: their rows learn nothing. Not known for a stream."""
    if not isinstance(method, Lora) or not method.new_tokens or data.statistics is None:
        return []
    seen: set[int] = set()
    for batch in data.dataset.with_format("numpy", columns=["input_ids"]).iter(batch_size=1000):
        seen.update(np.unique(np.concatenate(batch["input_ids"])).tolist())
    unseen = [
        token
        for token, row in zip(method.new_tokens, method.token_rows or (), strict=True)
        if row not in seen
    ]
    if not unseen:
        return []
    told = f"no document has {', '.join(unseen)}: what no template writes is not trained. In text and "
    told += "prompt_completion rows new tokens are tokens; else give a --template FILE.jinja that writes them"
    return [told]


def _idle_processes(run: RunArguments, plan: Plan | None) -> list[str]:
    """A note on processes that a step has no document for. Of a stream it is not known."""
    processes, sequences = ranks.world_size(), global_batch(run)
    if sequences >= processes or plan is None:
        return []
    documents = [len(step) for step in plan.epoch(0)]
    short = sum(each < processes for each in documents)
    always = processes - max(documents)
    if not short:
        return []
    idle = f"at least {counted(max(always, 1), 'is', 'are')} idle in "
    idle += "every step" if always > 0 else f"{short / len(documents):.0%} of the steps"
    more = "" if run.resume else f"--global_batch_size {processes} or more, or "
    return [
        f"{processes} processes share {counted(sequences, 'sequence')} a step: {idle}; give {more}fewer GPUs"
    ]


def start_notes(
    configuration: Configuration,
    data: TrainingData,
    model: Any,
    kernels: dict[str, str],
    estimate: Estimate | None,
) -> list[str]:
    """What a user should know of the run before its first step."""
    longest = configuration.data.max_length
    notes = [
        f"{file}: ignored, as they are no longer settings: {', '.join(keys)}"
        for file, keys in configuration.passed_over.items()
    ]
    if configuration.kept:
        named = ", ".join(configuration.kept)
        notes.append(f"--recipe {configuration.run.recipe}: the resumed run keeps its own {named}")
    notes += [f"{failure}. The run is slower without it. {MEND}" for failure in failed_libraries(kernels)]
    if configuration.model.model_name_or_path.startswith("random:"):
        notes.append(
            "the base model's weights are random: speed and memory are real, losses and answers mean nothing"
        )
    by_epochs = data.epochs is not None and configuration.run.max_steps <= 0
    if by_epochs and data.total_steps < _FEW_STEPS and not configuration.run.dry_run:  # which has one
        notes.append(
            f"the rows make {counted(data.total_steps, 'step')} in all, too few to learn much: more with "
            "--num_train_epochs, or with a smaller -b or --max_length"
        )
    notes += _idle_processes(configuration.run, data.plan)
    layout, method = layout_of(model.config), configuration.method
    if isinstance(method, Lora) and method.target_modules in (None, ("all-linear",)):
        notes += [f"{name} stays without LoRA: {why}" for name, why in layout.not_for_peft.items()]
    notes += [
        f"LoRA on {name}: falcon_qlora opens and merges the adapter, plain PEFT does not. {why}"
        for name, why in layout.not_for_peft.items()
        if name in refused_by_peft(method)
    ]
    if configuration.method.new_token_count:
        notes += _unseen_tokens(data, method_of(model))
    if speed := speed_note(configuration, model, estimate):
        notes.append(speed)
    if told := layout.told_beyond_positions(longest, f"--max_length {longest:,}"):
        if data.statistics is not None:
            told += f". The longest document has {data.statistics.longest:,} tokens"
        notes.append(told)
    return notes
