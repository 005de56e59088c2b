"""Beginning a new run from a trained adapter: what is taken over from it, and what must match it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import sha256
from falcon_qlora.common.fp8 import fp8_excludes
from falcon_qlora.common.settings import Setting, settings_of
from falcon_qlora.config import Configuration, ModelArguments
from falcon_qlora.config.arguments import RunArguments
from falcon_qlora.config.parser import refuse
from falcon_qlora.config.paths import settings_of_run
from falcon_qlora.inference.base_and_adapter import adapter_folder
from falcon_qlora.methods.interface import Method
from falcon_qlora.methods.open_adapter import check_may_open
from falcon_qlora.methods.table import is_whole
from falcon_qlora.models.locate import find_config
from falcon_qlora.processes import agreement, ranks
from falcon_qlora.run_folder.directory import RunDirectory
from falcon_qlora.terminal.console import note

# How the base was quantized is taken over unless the user sets it: it may differ.
_OF_BASE = {
    "model_name_or_path": "base_model",
    "tokenizer_name_or_path": "tokenizer",
    "quantize_mode": "quantize_mode",
    "double_quantization": "double_quantization",
}


def adopt(
    configuration: Configuration,
    start: RunDirectory | None = None,
    checkpoint: Any = None,
    *,
    find: Callable[..., Any] | None = None,
) -> None:
    """Take over the method, its settings and the base of the adapter that the configuration names, if any.

    A recipe's values for them give way; those of a flag or a file must match. A resumed run does not look at
    the adapter again, which may be gone or changed by now: its checkpoint records the same.

    Args:
        start: the run's folder, which may hold what was written before a restart.
        checkpoint: that the run resumes from, or None.
        find: finds the base's configuration, given its name and revision; None: `find_config`.

    Raises:
        UserError: if there is no such adapter, it is damaged or not the one that is meant, its base cannot be
            found, or a setting contradicts it.
    """
    run = configuration.run
    if run.adapter is None:
        return
    # Only now: they need torch, and most runs begin from no adapter.
    from falcon_qlora.methods.adapter_folder import read_adapter, read_record

    _remember(run, start, goes_on=checkpoint is not None)
    if checkpoint is not None and run.adapter_sha256 is None:
        return  # the run began from none or another: reported with the other settings that differ
    folder = adapter_folder(run.adapter) if checkpoint is None else Path(checkpoint)
    record = read_record(folder)
    if is_whole(record):
        raise UserError(f"--adapter {folder} holds a whole model: train on from it with -m {folder}")
    saved = read_adapter(folder)
    if checkpoint is None:
        found = sha256(saved.file)
        if run.adapter_sha256 not in (None, found):
            raise UserError(
                f"--adapter {folder}: the SHA-256 of its weights is {found}, not --adapter_sha256 "
                f"{run.adapter_sha256}. Restore the weights, or leave --adapter_sha256 out"
            )
        run.adapter, run.adapter_sha256 = str(folder.absolute()), found
    config = _adopt_base(configuration, record, folder, find or find_config)
    configuration.method = _method(configuration, saved.method, folder, config)
    saved.check(config)


def _remember(run: RunArguments, start: RunDirectory | None, *, goes_on: bool) -> None:
    """Take the adapter's path and its weights' SHA-256 from the record of a run that has begun."""
    if start is None or not start.config_file.is_file():
        return
    if not goes_on and start.read("environment").get("launch") != ranks.launch_id():
        return  # it is an earlier run's, which this one replaces
    settings = settings_of_run(start.read_config(), start.path)
    assert run.adapter is not None
    named, known = Path(run.adapter).absolute(), settings.get("adapter")
    if known in (str(named), str(named / "adapter")):
        run.adapter, run.adapter_sha256 = known, run.adapter_sha256 or settings.get("adapter_sha256")


def _adopt_base(
    configuration: Configuration, record: dict[str, Any], folder: Path, find_base: Callable[..., Any]
) -> Any:
    """Take over the base that a record names, unless a flag or file does; return its configuration."""
    named, base = configuration.explicit.keys(), configuration.model
    settings = {each.name: each for each in settings_of(ModelArguments)}
    for name, recorded in _OF_BASE.items():
        if name not in named:
            value = record.get(recorded)
            if value is None and name == "model_name_or_path":
                raise UserError(f"--adapter {folder} names no base model. Name it with -m.")
            if value is not None:  # another tool's adapter records only its base's name
                setattr(base, name, settings[name].read(value, f"{folder}: {recorded}"))

    def find() -> Any:
        for flag, what in (("model_name_or_path", "base model"), ("tokenizer_name_or_path", "tokenizer")):
            name = getattr(base, flag)
            path = None
            if flag not in named and name:
                path = check_may_open(name, what, record, folder, say_so=f"--{flag} FOLDER")
            if path is not None:
                note(f"the {what} is {path}, which {folder} names")
        return find_base(base.model_name_or_path, revision=base.model_revision)

    return agreement.from_main_process(find)


def _method(configuration: Configuration, trained: Method, folder: Path, config: Any) -> Method:
    """The adapter's method, with the configuration's values for settings that may differ."""
    asked, explicit = configuration.method, configuration.explicit
    named = {name for name, origin in explicit.items() if not origin.startswith("recipe ")}
    if "method" in named and asked.name != trained.name:
        raise UserError(_contradiction("method", explicit["method"], asked.name, folder, trained.name))
    kept: dict[str, Any] = {}
    faults: list[str] = []
    has = {each.name: each for each in settings_of(type(trained))}
    for each in settings_of(type(asked)):
        if each.name not in named:
            continue
        value = getattr(asked, each.field)
        if each.name not in has:
            faults.append(f"--{each.name} does nothing with {trained.title}, which {folder} was trained with")
        elif not each.in_weights:
            kept[each.field] = value
        elif not _is_same(each, value, trained, config):
            was = getattr(trained, each.field)
            faults.append(_contradiction(each.name, explicit[each.name], value, folder, was))
    refuse(faults)
    method = dataclasses.replace(trained, **kept)
    if configuration.model.compute_dtype == "fp8":
        excluded = fp8_excludes(kernels=configuration.model.kernels, **method.fp8_facts())
        if excluded is not None:
            raise UserError(f"--compute_dtype fp8: {excluded}")
    return method


def _is_same(setting: Setting, value: Any, trained: Method, config: Any) -> bool:
    if value == getattr(trained, setting.field):
        return True
    if not setting.is_list:
        return False
    # The same linears have several spellings: what counts is what is trained.
    asked = dataclasses.replace(trained, **{setting.field: value})
    return asked.saved_shapes(config) == trained.saved_shapes(config)


def _contradiction(name: str, origin: str, value: Any, folder: Path, was: Any) -> str:
    where = f"--{name}" if origin == "flag" else f"{name} in {origin}"
    shown, had = (", ".join(each) if isinstance(each, tuple) else each for each in (value, was))
    return (
        f"{where} is {shown}, but the adapter in {folder} has {had}: leave it out, or train a new adapter "
        "without --adapter"
    )
