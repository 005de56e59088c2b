"""Paths in records: absolute, so that they mean the same from any folder."""

from __future__ import annotations

import shlex
from pathlib import Path

from falcon_qlora.common.record_files import SETTINGS
from falcon_qlora.common.untrusted import YAML_LIMIT_BYTES, read_text


def absolute_name(name: str, root: Path | None = None) -> str:
    """`name` in `root`, by default the current folder, as an absolute path; unchanged if it is missing."""
    try:
        path = (root or Path.cwd()) / Path(name).expanduser()
        return str(path) if path.exists() else name
    except (OSError, ValueError, RuntimeError):  # for names that no file can have
        return name


def started_in(run: Path) -> Path | None:
    """The folder in which a run was started: relative paths in older records start there.

    The first line of the run's settings file has that file's path as it was when written.

    Returns:
        None if that path is not relative, or the settings file is no longer at such a path.
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
