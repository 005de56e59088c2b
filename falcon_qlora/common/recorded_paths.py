"""Names of files and folders in records: absolute, so that they mean the same from anywhere."""

from __future__ import annotations

import shlex
from pathlib import Path

from falcon_qlora.common.record_files import SETTINGS
from falcon_qlora.common.untrusted import YAML_LIMIT_BYTES, read_text


def absolute_name(name: str, root: Path | None = None) -> str:
    """The absolute path of what `name` means in `root`, by default the current folder; `name` if nothing."""
    try:
        path = (root or Path.cwd()) / Path(name).expanduser()
        return str(path) if path.exists() else name
    except (OSError, ValueError, RuntimeError):  # of names that nothing can have
        return name


def started_in(run: Path) -> Path | None:
    """The folder in which a run was started, to which the paths in records of before are relative.

    The first line of its settings names them as the run was told to write them.

    Returns:
        None where that was no relative path, or the run lies under another one now.
    """
    try:
        first = read_text(run / SETTINGS, limit_bytes=YAML_LIMIT_BYTES).partition("\n")[0]
        words = shlex.split(first.removeprefix("#"))
        told = Path(words[words.index("--config") + 1])
    except (ValueError, IndexError):
        return None
    found, depth = (run / SETTINGS).absolute(), len(told.parts)
    if told.is_absolute() or ".." in told.parts or found.parts[-depth:] != told.parts:
        return None
    return found.parents[depth - 1]
