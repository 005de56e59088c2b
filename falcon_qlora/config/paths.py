"""Settings that name files and folders, made to mean the same from anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from falcon_qlora.common.recorded_paths import absolute_name, started_in

_MODELS = ("model_name_or_path", "tokenizer_name_or_path")
_OTHERS = ("adapter", "template", "cache_dir")
_DATA = ("dataset_name", "eval_split")


def with_absolute_paths(
    settings: Mapping[str, Any], root: Path | None = None, *, data: bool = True
) -> dict[str, Any]:
    """These settings with every name of a file or folder that is there as its absolute path.

    Args:
        settings: by name.
        root: what relative paths are relative to; None for the current folder.
        data: those of rows too, which messages name as the user did.
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
    """Whether a model or rows may lie on the hub, as they neither lie here nor come with the package."""
    packaged = name in ("tiny", "sample") or name.startswith("random:")
    return not packaged and not Path(name).expanduser().exists()


def settings_of_run(settings: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """The recorded settings of a run; of before they have paths relative to where the run was started."""
    root = started_in(run)
    return with_absolute_paths(settings if root is None else with_absolute_paths(settings, root))


def _absolute(setting: str, name: Any, root: Path | None) -> Any:
    # Names that mean no path whatever lies here.
    of_package = setting in _MODELS and (name == "tiny" or str(name).startswith("random:"))
    if of_package or (setting == "template" and not str(name).endswith(".jinja")):
        return name
    return absolute_name(name, root) if isinstance(name, str) else name
