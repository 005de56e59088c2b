"""What the commands after training open: from the command line, a run's settings and the trained folder."""

from __future__ import annotations

import sys
from collections.abc import Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from falcon_qlora.commands.first_look import look_at_model
from falcon_qlora.common.errors import UserError, memory_advice, printable
from falcon_qlora.common.record_files import CERTIFICATE
from falcon_qlora.common.untrusted import read_json
from falcon_qlora.config import Configuration, configure, read_flags
from falcon_qlora.data.formats import AUTO, BY_FORMAT
from falcon_qlora.inference.base_and_adapter import Source, adapter_folder
from falcon_qlora.methods.adapter_folder import read_adapter, read_record
from falcon_qlora.methods.open_adapter import base_note, check_may_open
from falcon_qlora.methods.table import is_whole
from falcon_qlora.models.locate import is_on_hub, open_checkpoint
from falcon_qlora.run_folder.directory import RunDirectory


def parse_with_run(
    argv: list[str], *, verb: str, extra_arguments: type
) -> tuple[Configuration, Collection[str], Path | None, RunDirectory | None]:
    """Read a command line, on top of the settings of the run that made ``--adapter`` if these exist.

    A settings file that the command line names is read instead of the run's.

    Returns:
        The configuration; which settings the user gave, by flags or by a recipe or file that flags name; the
        adapter's folder; and its run. The last two are None if there is none.
    """
    given = read_flags(argv, verb=verb, extra_arguments=extra_arguments)
    configuration = configure(given, verb=verb, extra_arguments=extra_arguments)
    named, adapter = configuration.explicit.keys(), configuration.extra.adapter
    folder = adapter_folder(adapter) if adapter else None
    run = RunDirectory.of_adapter(folder) if folder is not None else None
    if run is not None and configuration.run.config is None:
        given["config"] = str(run.config_file)
        configuration = configure(given, verb=verb, extra_arguments=extra_arguments)
    return configuration, named, folder, run


def source_of(
    configuration: Configuration, folder: Path | None, *, named: Collection[str]
) -> tuple[Source, dict[str, Any]]:
    """What to open, and the folder's record. A flag or a file overrides the record.

    Another local folder is read only if the user names it or `check_may_open` allows it.

    Args:
        configuration: with the settings of the run, if there is one.
        folder: from `adapter_folder`; None for the model alone.
        named: settings that the user named.

    Raises:
        UserError: if the folder's files cannot be read; if they name no base model, or one that must not be
            opened; or if the user names a base for a whole model.
    """
    settings, explicit = configuration.model, configuration.explicit
    record = {} if folder is None else read_record(folder)
    whole = is_whole(record)
    if folder is not None and whole:
        if "model_name_or_path" in named:
            raise UserError(
                f"--model_name_or_path: {folder} is a fully fine-tuned model, which needs no base: drop it"
            )
        has_its_own = (folder / "tokenizer.json").is_file()
        record["tokenizer"] = (
            str(folder) if has_its_own else record.get("tokenizer") or record.get("base_model")
        )

    def given(name: str, recorded: str) -> Any:
        value = getattr(settings, name)
        return value if name in explicit or record.get(recorded) is None else record[recorded]

    base = given("model_name_or_path", "base_model")
    own = record.get("own_tokenizer") if "tokenizer_name_or_path" not in named else None
    tokenizer = own or given("tokenizer_name_or_path", "tokenizer")
    # None where nothing says how: as the checkpoint is stored.
    mode, double_quantization = (
        getattr(settings, name) if name in explicit else record.get(name)
        for name in ("quantize_mode", "double_quantization")
    )
    if folder is None:
        if explicit.get("quantize_mode") != "flag" and _is_merge(base):
            mode = "16bit"  # even if a run's settings file says how its base was stored
    else:
        if not base and not whole:
            raise UserError(f"{folder} names no base model. Name it with --model_name_or_path")
        tokenizer = tokenizer or (base if whole else None)
        opened = {} if whole else {"model_name_or_path": ("base model", base)}
        opened["tokenizer_name_or_path"] = ("tokenizer", tokenizer)
        for flag, (what, name) in opened.items():
            if name and flag not in named:
                path = check_may_open(name, what, record, folder, say_so=f"--{flag} FOLDER")
                if path is not None:
                    note_aside(f"the {what} is {path}, which {folder} names")
        if not whole:
            _say_whether_other(record, folder, base, settings.model_revision)
            trained = record.get("quantize_mode")
            if trained not in (None, mode) and explicit.get("quantize_mode") != "flag":
                note_aside(f"{base} is stored in {mode}, and the adapter was trained on {trained}")
    if not whole:
        look_at_model(base)
        if folder is not None:
            read_adapter(folder)
    if tokenizer:
        is_on_hub(tokenizer)
    return Source(
        model=str(folder) if whole else base,
        tokenizer=tokenizer,
        revision=settings.model_revision,
        quantize_mode=mode,
        compute_dtype=settings.compute_dtype,
        double_quantization=double_quantization,
        norms_in_float32=settings.norms_in_float32,
        llm_int8_threshold=settings.llm_int8_threshold,
        kernels=settings.kernels,
        kernels_are_named="flag" in {explicit.get("kernels"), explicit.get("compute_dtype")},
        adapter=None if whole else folder,
        offload=configuration.run.offload_base,
    ), record


def less_memory(source: Source, *ways: str) -> AbstractContextManager[None]:
    """Have the message for a GPU's memory that runs out in the block name what takes less."""
    return memory_advice(f"take less: {', '.join([*ways, *source.ways_to_hold_less])}")


def _say_whether_other(record: dict[str, Any], folder: Path, base: str, revision: str | None) -> None:
    if record.get("base_model") not in (None, base):
        open_checkpoint(base, revision=revision)  # downloads what is missing: it will be opened anyway
    told = base_note(record, folder, base, revision=revision)
    if told is not None:
        note_aside(told)


def merge_record(name: str) -> dict[str, Any]:
    """The template that a merge's certificate names, as an adapter's record has it; {} where there is none.

    Raises:
        UserError: if the certificate cannot be read.
    """
    folder = _merge_folder(name)
    origin = {} if folder is None else read_json(folder / CERTIFICATE).get("origin")
    if not isinstance(origin, dict):
        return {}
    template = origin.get("template")
    if not isinstance(template, str) or template in ("", AUTO, BY_FORMAT):
        return {}
    return {"template": template, "template_fingerprint": origin.get("template_sha256")}


def _merge_folder(name: str) -> Path | None:
    from falcon_qlora.models.fingerprint import named_folder

    folder = named_folder(name)
    return folder if folder is not None and (folder / CERTIFICATE).is_file() else None


def _is_merge(name: str) -> bool:
    """Whether `name` is the folder of a merge; if so, print that it is loaded in 16 bits."""
    folder = _merge_folder(name)
    if folder is None:
        return False
    note_aside(f"{folder} is a merge, loaded in 16 bits as it was made; -q 4bit quantizes it")
    return True


def note_aside(message: str) -> None:
    """Print a note on standard error, apart from a command's results."""
    print(printable(f"note: {message}"), file=sys.stderr)
