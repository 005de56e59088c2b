"""What is wrong with the files that the flags name, told before a library is loaded or a process starts.

Whatever is found here would be found later as well, in the same words; nothing is decided. Torch is not
imported, and of large data only the beginning is read.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from falcon_qlora.config import Configuration, DataArguments
from falcon_qlora.data.formats import AUTO, BY_FORMAT, resolve_template
from falcon_qlora.data.rendering import render
from falcon_qlora.data.selection import is_fraction
from falcon_qlora.data.settings import RowSettings
from falcon_qlora.data.sources import LocalSource, Source, find_source
from falcon_qlora.data.templates import TEMPLATES, TOKENIZER, Template, get_template
from falcon_qlora.inference.base_and_adapter import adapter_folder
from falcon_qlora.models.checkpoints import RANDOM, raw_config
from falcon_qlora.models.layouts import family_of
from falcon_qlora.models.locate import is_on_hub, packaged_folder
from falcon_qlora.training.rows import row_settings

_ROWS = 1000


def look(configuration: Configuration) -> None:
    """Refuse what shows in the names of files, their first rows and a base model's configuration.

    Raises:
        UserError: as the run would.
    """
    model, run = configuration.model, configuration.run
    if run.adapter is not None and not run.resume:
        adapter_folder(run.adapter)
    if run.adapter is None or "model_name_or_path" in configuration.explicit:
        look_at_model(model.model_name_or_path)
    if model.tokenizer_name_or_path is not None:
        is_on_hub(model.tokenizer_name_or_path)
    look_at_rows(configuration.data, configuration.data.eval_split)


def look_at_model(name: str) -> None:
    """Refuse a folder that is no model's, or that of a family that is not trained here; and no folder.

    Raises:
        UserError: as what opens the model would.
    """
    if is_on_hub(name) or name.startswith(RANDOM):
        return
    folder = packaged_folder(name) or Path(name).expanduser()
    family_of(raw_config(folder), source=str(folder / "config.json"))


def look_at_rows(data: DataArguments, split: str | None) -> None:
    """Refuse rows that are not there, and what is wrong with the first thousand of each data set here.

    Args:
        data: which rows, and how they are read.
        split: as ``--eval_split`` takes it; None for the rows themselves alone.

    Raises:
        UserError: as what reads them would.
    """
    settings = RowSettings(**row_settings(data))
    if data.template not in (AUTO, BY_FORMAT, *TEMPLATES):
        get_template(data.template)
    sources = settings.sources()
    limit = _ROWS if data.max_rows is None else min(_ROWS, data.max_rows // len(sources))
    for source in sources:
        _look_at_source(settings, source, limit)
    if split is None or is_fraction(split):
        return
    if split.startswith("split:"):
        held_out = settings.sources(split.removeprefix("split:"))
    else:
        of_file = "train" if Path(split).expanduser().is_file() else settings.dataset_split
        held_out = [find_source(split, config=settings.dataset_config, split=of_file)]
    for source in held_out:
        _look_at_source(settings, source, _ROWS)


def _look_at_source(settings: RowSettings, source: Source, rows: int) -> None:
    if not isinstance(source, LocalSource):
        return
    row_format, columns = settings.recognise(source.columns(), source.name)
    template = _template(settings.template, row_format)
    for place, row in itertools.islice(source.read(), rows):
        render(row, row_format, template, columns=columns, place=place)


def _template(name: str, row_format: str) -> Template:
    """The template, where it needs no tokenizer; else what has a conversation read and writes nothing."""
    name = resolve_template(name, row_format, SimpleNamespace(chat_template="it may have one"))
    if name in TEMPLATES and name != TOKENIZER:
        return get_template(name)
    silent: Any = SimpleNamespace(name=name, segments=lambda turns, tools: [], unread=lambda turns, tools: [])
    return silent
