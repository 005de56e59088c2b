"""``falcon-qlora eval``: perplexity and answer loss of a base model, an adapter or a merge on text.

``--adapter DIR`` measures the quantized base with the adapter; ``-m MODEL`` measures a model alone, quantized
as ``-q`` says (a merge is quantized only if ``-q`` is given). The text is ``--dataset_name``; without it, the
rows that the adapter's run held out.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from falcon_qlora.commands.first_look import look_at_held_out, look_at_rows
from falcon_qlora.commands.opening import less_memory, merge_record, note_aside, parse_with_run, source_of
from falcon_qlora.commands.words import split
from falcon_qlora.common.errors import UserError, first_line, nearest, printable
from falcon_qlora.common.files import check_writable, write_json
from falcon_qlora.common.settings import setting
from falcon_qlora.config import Configuration
from falcon_qlora.data.formats import AUTO, BY_FORMAT, resolve_template
from falcon_qlora.data.selection import is_fraction
from falcon_qlora.data.settings import RowSettings
from falcon_qlora.data.stream import recognise_source
from falcon_qlora.inference.answers import trained_template
from falcon_qlora.inference.base_and_adapter import Source, load_adapted, load_measured, tokenizer_of
from falcon_qlora.processes.watchdog import end_native_code_after
from falcon_qlora.run_folder.directory import RunDirectory
from falcon_qlora.terminal.console import note, print_plain
from falcon_qlora.terminal.library_logging import quiet_libraries
from falcon_qlora.terminal.output import say_loading


@dataclass(kw_only=True)
class EvalArguments:
    """What to measure."""

    _argument_group_name = "Evaluation"

    adapter: str | None = setting(None, "Folder of a trained adapter, or of the run that made it.")
    most_tokens: int | None = setting(
        None,
        "Measure on the first whole documents of at most so many tokens, one at least; unset: all.",
        least=2,
    )
    tasks: list[str] | None = setting(
        None, "Run these tasks of lm-evaluation-harness instead, such as arc_easy,hellaswag."
    )
    results: str | None = setting(None, "JSON file to write the figures to.")


def main(argv: list[str]) -> int:
    """Run the command and return its exit status."""
    configuration, named, folder, run = parse_with_run(argv, verb="eval", extra_arguments=EvalArguments)
    wanted: EvalArguments = configuration.extra
    if wanted.tasks and importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks needs lm-evaluation-harness: pip install 'falcon-qlora[lm-eval]'")
    if wanted.tasks and wanted.most_tokens is not None:
        raise UserError("--most_tokens does nothing with --tasks, which have their own text: drop it")
    if wanted.results:
        check_writable(Path(wanted.results), "--results", whole=True)
    if not wanted.tasks and "dataset_name" not in named and configuration.data.eval_split is None:
        raise UserError("no text to measure on: name it with --dataset_name FILE")

    # Only now, so that a wrong flag is reported at once.
    end_native_code_after(configuration.run.hang_minutes)
    say_loading(aside=True)
    quiet_libraries()
    source, record = source_of(configuration, folder, named=named)
    record = record or merge_record(source.model)
    with less_memory(source, "a smaller -b or --max_length"):
        if wanted.tasks:
            figures = _run_tasks(configuration, source, wanted.tasks)
        else:
            rows_are_named = "dataset_name" in named and "eval_split" not in named
            split = configuration.data.eval_split
            from_file = "eval_split" in named and split is not None and not is_fraction(split)
            if "template" in named or not (from_file or "dataset_name" in named):
                record = {}  # rows are written as the user says, and a run's own as in training
            figures = _measure(configuration, source, run, record, all_rows=rows_are_named)
    width = max(len(name) for name in figures) + 2
    for name, value in figures.items():
        label = name if " " in name else name.replace("_", " ")  # a task's name stays as it is
        print_plain(f"{label.ljust(width)}{_shown(value)}")
    if wanted.results:
        write_json(Path(wanted.results), figures)
    return 0


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else printable(value)


def _measure(
    configuration: Configuration,
    source: Source,
    run: RunDirectory | None,
    record: dict[str, Any],
    *,
    all_rows: bool,
) -> dict[str, Any]:
    from falcon_qlora.training.held_out import held_out_text, rows_of

    if all_rows:
        look_at_rows(configuration.data, None)
    else:
        look_at_held_out(configuration.data)
    tokenizer = tokenizer_of(source)
    _take_trained_template(configuration, record, tokenizer, all_rows=all_rows)
    text = rows_of(configuration, tokenizer) if all_rows else held_out_text(configuration, tokenizer, run)
    most_tokens = configuration.extra.most_tokens
    for each in text.told("--most_tokens", most_tokens):
        note_aside(each)
    # Only now: what is wrong with the rows is told without them.
    import torch

    from falcon_qlora.inference.evaluation import batches_of, mean_loss, predictions, token_losses
    from falcon_qlora.models.fast_path import described

    batches = batches_of(
        text,
        max_tokens=configuration.data.max_length * configuration.run.per_device_train_batch_size,
        most_tokens=most_tokens,
    )
    model, kernels = load_measured(source, run)
    losses, counted = [], []
    for batch in batches:
        predicted = predictions(model, [batch], answers_only=False)
        losses.append(token_losses(predicted))
        counted.append(predicted.answers)
    every, answers = torch.cat(losses), torch.cat(counted)
    loss = mean_loss(every)
    return {
        "text": text.source,
        "fingerprint": text.fingerprint,
        "documents": sum(len(batch.lengths) for batch in batches),
        "answer_tokens": int(answers.sum()),
        "answer_loss": mean_loss(every[answers]),
        "tokens": len(every),
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "computed_in": str(model.dtype).removeprefix("torch."),
        "kernels": described(kernels),
    }


def _take_trained_template(
    configuration: Configuration, record: dict[str, Any], tokenizer: Any, *, all_rows: bool
) -> None:
    """Have rows that the user names written with the template of training, if it can write them."""
    from falcon_qlora.training.rows import row_settings

    data, name = configuration.data, record.get("template", AUTO)
    if data.template != AUTO or name in (AUTO, BY_FORMAT):
        return
    trained = f"--adapter {configuration.extra.adapter}" if configuration.extra.adapter else "the merge"
    trained_template(record, tokenizer, trained=trained, say_so="--template FILE", tell=note_aside)
    split = None if all_rows else data.eval_split
    of_dataset = split is None or is_fraction(split)
    settings = RowSettings(**row_settings(data), held_out=not of_dataset)
    for rows in settings.sources() if of_dataset else settings.held_out_sources(str(split)):
        row_format, _, other = recognise_source(settings, rows, tokenizer)
        try:
            resolve_template(name, row_format)
        except UserError:
            note_aside(
                f"{rows.name}: written with template {other}, as {name}, with which {trained} was trained, "
                f"cannot write rows of format {row_format}"
            )
            return
    data.template = name


def _run_tasks(configuration: Configuration, source: Source, words: list[str]) -> dict[str, Any]:
    """The figures of the tasks, by name."""

    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    asked = split(words)
    for name in asked:
        if not manager.match_tasks([name]):
            known = nearest(name, manager.all_tasks)
            raise UserError(f"--tasks: lm-evaluation-harness has no {name!r}{known}")
    if configuration.model.compute_dtype == "fp8":
        note("tasks run in bfloat16: FP8 needs packed documents")
    model, tokenizer = load_adapted(source)
    try:
        found = lm_eval.simple_evaluate(
            model=HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=configuration.run.per_device_train_batch_size,
                max_length=configuration.data.max_length,
            ),
            tasks=manager.match_tasks(asked),
            task_manager=manager,
            log_samples=False,
        )
    except OSError as error:  # the errors of the hub and of datasets are OSErrors
        raise UserError(f"--tasks {','.join(asked)}: the data cannot be read ({first_line(error)})") from None
    # A metric's name ends with that of the filter on the answers.
    return {
        f"{task} {name.removesuffix(',none')}": value
        for task, numbers in found["results"].items()
        for name, value in numbers.items()
        if isinstance(value, int | float)
    }
