"""Settings that name files and folders, made absolute so that they mean the same from any folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from falcon_qlora.common.recorded_paths import absolute_name, started_in
from falcon_qlora.common.stores import is_address

_MODELS = ("model_name_or_path", "tokenizer_name_or_path")
_OTHERS = ("adapter", "template", "cache_dir")
_DATA = ("dataset_name", "eval_split")
PLACES = frozenset((*_MODELS, *_OTHERS, *_DATA))


def with_absolute_paths(
    settings: Mapping[str, Any], root: Path | None = None, *, data: bool = True
) -> dict[str, Any]:
    """These settings, with the names of existing files and folders as absolute paths.

    Args:
        settings: by name.
        root: where relative paths start; None for the current folder.
        data: include the names of rows, which messages otherwise repeat as the user gave them.
    """
    found = dict(settings)
    for setting in (*_MODELS, *_OTHERS, *(_DATA if data else ())):
        value = found.get(setting)
        if isinstance(value, list):
            found[setting] = [_absolute(setting, each, root) for each in value]
        elif value is not None:
            found[setting] = _absolute(setting, value, root)
    return found


def on_the_hub(name: str) -> bool:
    """Whether a model or rows may be on the hub: they are neither local nor packaged."""
    if is_address(name):
        return False
    packaged = name in ("tiny", "sample") or name.startswith("random:")
    return not packaged and not Path(name).expanduser().exists()


def settings_of_run(settings: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """The recorded settings of a run; relative paths in older ones start where the run was started."""
    root = started_in(run)
    return with_absolute_paths(settings if root is None else with_absolute_paths(settings, root))


def _absolute(setting: str, name: Any, root: Path | None) -> Any:
    # These names are never paths, whatever files exist.
    of_package = setting in _MODELS and (name == "tiny" or str(name).startswith("random:"))
    if of_package or (setting == "template" and not str(name).endswith(".jinja")):
        return name
    return absolute_name(name, root) if isinstance(name, str) else name
