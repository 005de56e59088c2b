"""A cache on disk whose entries are folders named by the hash of everything that went into them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import user_cache

_ABANDONED_SECONDS = 7 * 24 * 3600


def default_directory() -> Path:
    """The user's cache folder for tokenized data."""
    return user_cache("data")


def key_of(parts: dict[str, Any]) -> str:
    """A hexadecimal hash of `parts`, which JSON must be able to write."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def entry(directory: Path | None, key: str, fill: Callable[[Path], None]) -> Path:
    """The folder of this key, made by `fill` where there is none.

    An entry is either whole or not there: it is filled under another name and renamed. Several processes may
    fill the same entry at once; the first to finish wins, and the others use what it left.

    Args:
        directory: of the cache; None is the user's.
        key: from `key_of`.
        fill: writes the entry's files into the empty folder that it is given.

    Raises:
        UserError: if the folder cannot be written.
    """
    directory = default_directory() if directory is None else directory
    target = directory / key[:32]
    if target.is_dir():
        return target
    try:
        directory.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{key[:8]}.", suffix=".part", dir=directory))
    except OSError as error:
        raise UserError(
            f"the cache folder {directory} cannot be written: {error.strerror}; "
            "name another one with --cache_dir"
        ) from None
    _remove_abandoned(directory)
    try:
        fill(scratch)
        try:
            scratch.chmod(0o755)  # a temporary folder is closed to others, a shared cache is not
            scratch.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the cache folder {directory} is full; free some space or name another one with --cache_dir"
            ) from None
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def remove(folder: Path) -> None:
    """Take an entry out of the cache, at once and as a whole; another process may do so too."""
    with contextlib.suppress(FileNotFoundError):
        unwanted = Path(tempfile.mkdtemp(prefix=f"{folder.name[:8]}.", suffix=".part", dir=folder.parent))
        try:
            folder.rename(unwanted / folder.name)
        finally:
            shutil.rmtree(unwanted, ignore_errors=True)


def _remove_abandoned(directory: Path) -> None:
    """Remove what killed processes have left unfinished for days."""
    for scratch in directory.glob("*.part"):
        try:
            if time.time() - scratch.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(scratch, ignore_errors=True)
        except OSError:
            continue  # another process was faster
