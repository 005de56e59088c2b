"""Report errors in the files that flags name, before a library is loaded or a process starts.

Every error found here would be found later too, with the same message; nothing is decided here. Torch is not
imported, and only the beginning of large data is read.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from falcon_qlora.checkpoint import manifest
from falcon_qlora.common import record_files
from falcon_qlora.common.errors import UserError
from falcon_qlora.config import Configuration, DataArguments
from falcon_qlora.config.parser import FLAG
from falcon_qlora.data.formats import AUTO, BY_FORMAT, resolve_template
from falcon_qlora.data.rendering import render
from falcon_qlora.data.selection import is_fraction
from falcon_qlora.data.settings import RowSettings
from falcon_qlora.data.sources import LocalSource, Source
from falcon_qlora.data.templates import TEMPLATES, TOKENIZER, Template, get_template
from falcon_qlora.inference.base_and_adapter import adapter_folder
from falcon_qlora.methods.adapter_folder import RECORD, read_adapter, read_record
from falcon_qlora.methods.open_adapter import check_is_there
from falcon_qlora.methods.table import is_whole
from falcon_qlora.models.checkpoints import RANDOM, check_preset
from falcon_qlora.models.locate import find_outline, is_on_hub
from falcon_qlora.run_folder.choose import choose
from falcon_qlora.run_folder.directory import RunDirectory
from falcon_qlora.training.held_out import NAME_ANOTHER
from falcon_qlora.training.rows import row_settings

_ROWS = 1000


def look(configuration: Configuration) -> None:
    """Refuse errors that show in file names, the first rows and the base model's configuration.

    Raises:
        UserError: as the run would.
    """
    model, run, method = configuration.model, configuration.run, configuration.method
    _look_at_output(configuration)
    if run.resume:
        _look_at_recorded(configuration)
    if run.adapter is not None and not run.resume:
        _look_at_adapter(run.adapter, base_is_named="model_name_or_path" in configuration.explicit)
    if run.adapter is None or "model_name_or_path" in configuration.explicit:
        outline = look_at_model(model.model_name_or_path)
        if outline is not None and run.adapter is None:
            method.parameter_groups(outline)
    if model.tokenizer_name_or_path is not None:
        is_on_hub(model.tokenizer_name_or_path)
    look_at_rows(configuration.data, configuration.data.eval_split)


def _look_at_output(configuration: Configuration) -> None:
    """Refuse an output folder that is in use, and a run to resume that does not exist."""
    run = configuration.run
    if run.output_dir is None and not run.resume:
        return
    choose(
        run.output_dir,
        model=configuration.model.model_name_or_path,
        settings=configuration.method.short,
        resume=run.resume,
        overwrite=run.overwrite,
        make=False,
        dry_run=run.dry_run,
    )


def _look_at_recorded(configuration: Configuration) -> None:
    """Refuse to resume a run whose base or tokenizer is a folder that is gone, where no flag names it."""
    model, run, explicit = configuration.model, configuration.run, configuration.explicit
    by_folder = (record_files.LATEST, record_files.AUTO)
    directory = Path(str(run.output_dir if run.resume in by_folder else run.resume))
    is_checkpoint = directory.parent.name == "checkpoints"
    steps = [] if is_checkpoint else manifest.step_folders(RunDirectory(directory).checkpoints)
    folder = steps[-1][1] if steps else directory
    record = read_record(folder) if (folder / RECORD).is_file() else {}
    for setting, flag, what in _RECORDED:
        name = getattr(model, setting)
        if name is not None and explicit.get(setting) != FLAG:
            check_is_there(name, what, record, folder, say_so=f"{flag} FOLDER")


_RECORDED = (
    ("model_name_or_path", "-m", "base model"),
    ("tokenizer_name_or_path", "--tokenizer_name_or_path", "tokenizer"),
)


def _look_at_adapter(name: str, *, base_is_named: bool) -> None:
    folder = adapter_folder(name)
    record = read_record(folder)
    if is_whole(record):
        return  # the run refuses it, and says what to do instead
    read_adapter(folder)
    if not base_is_named and record.get("base_model"):
        say_so = "--model_name_or_path FOLDER"
        check_is_there(record["base_model"], "base model", record, folder, say_so=say_so)


def look_at_model(name: str) -> Any:
    """Refuse a missing folder, and one without a model of a family that can be trained.

    Returns:
        The part of its configuration that counting parameters needs; None if that is not in a local folder.

    Raises:
        UserError: as opening the model would.
    """
    if name.startswith(RANDOM):
        check_preset(name)
        return None
    return None if is_on_hub(name) else find_outline(name)


def look_at_rows(data: DataArguments, split: str | None) -> None:
    """Refuse missing rows, and errors in the first thousand rows of each local dataset.

    Args:
        data: which rows, and how they are read.
        split: as ``--eval_split`` takes it; None to look at the training rows only.

    Raises:
        UserError: as reading them would.
    """
    settings = RowSettings(**row_settings(data))
    if data.template not in (AUTO, BY_FORMAT, *TEMPLATES):
        get_template(data.template)
    sources = settings.sources()
    for source, limit in zip(sources, settings.limits(data.max_rows), strict=True):
        _look_at_source(settings, source, _ROWS if limit is None else min(_ROWS, limit))
    if split is not None and not is_fraction(split):
        _look_at_split(settings, split)


def look_at_held_out(data: DataArguments) -> None:
    """Refuse held-out rows as `look_at_rows` does training rows.

    Raises:
        UserError: as `held_out_text` would.
    """
    if data.eval_split is None:
        return
    try:
        if is_fraction(data.eval_split):
            look_at_rows(data, None)
        else:
            _look_at_split(RowSettings(**row_settings(data)), data.eval_split)
    except UserError as error:
        raise UserError(*error.lines, NAME_ANOTHER) from None


def _look_at_split(settings: RowSettings, split: str) -> None:
    settings = replace(settings, held_out=True)
    for source in settings.held_out_sources(split):
        _look_at_source(settings, source, _ROWS)


def _look_at_source(settings: RowSettings, source: Source, rows: int) -> None:
    if not isinstance(source, LocalSource):
        return
    row_format, columns = settings.recognise(source.columns(), source.name)
    template = _template(settings.template, row_format)
    for place, row in itertools.islice(source.read(), rows):
        render(row, row_format, template, columns=columns, place=place)


def _template(name: str, row_format: str) -> Template:
    """The template if it needs no tokenizer; else a stand-in that reads conversations and writes nothing."""
    name = resolve_template(name, row_format, SimpleNamespace(chat_template="it may have one"))
    if name in TEMPLATES and name != TOKENIZER:
        return get_template(name)
    silent: Any = SimpleNamespace(
        name=name,
        segments=lambda turns, tools: [],
        unread=lambda turns, tools: [],
        suited=lambda turns, tools: turns,
    )
    return silent
