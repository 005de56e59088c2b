"""A cache on disk whose entries are folders named by the hash of everything that went into them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import remove_leftovers, replaced_folder, user_cache

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EFBIG, errno.EIO)


def key_of(parts: dict[str, Any]) -> str:
    """A hexadecimal hash of `parts`, which JSON must be able to write."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def place_of(directory: Path | None, key: str) -> Path:
    """Where the entry of this key is, if there is one."""
    return (user_cache("data") if directory is None else directory) / key[:32]


def entry(
    directory: Path | None,
    key: str,
    fill: Callable[[Path], None],
    is_whole: Callable[[Path], bool] = lambda entry: True,
) -> Path:
    """The folder of this key; `fill` makes it if it is missing or damaged.

    An entry is filled under another name and renamed. Several processes may fill the same entry at once; the
    first to finish wins, and the others use its entry.

    Args:
        directory: of the cache; None: the user's.
        key: from `key_of`.
        fill: writes the entry's files into the empty folder that it gets.
        is_whole: whether an entry is still as it was written.

    Raises:
        UserError: if the cache folder is full or cannot be written.
    """
    target = place_of(directory, key)
    directory = target.parent
    damaged = target.is_dir()
    if damaged and is_whole(target):
        return target
    for left in directory.glob(".*-partial-*"):  # left by processes that were killed
        remove_leftovers(directory / left.name[1:].partition("-")[0])
    try:
        if damaged:  # left in place, it would win over the new one
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(target)
        with replaced_folder(target, first_wins=True) as folder:
            fill(folder)
    except OSError as error:
        if error.errno not in (*_FULL, *_NOT_WRITABLE):
            raise
        failed = f"cannot be written: {os.strerror(error.errno)};"
        what = "is full; free some space or" if error.errno in _FULL else failed
        raise UserError(f"the cache folder {directory} {what} name another one with --cache_dir") from None
    return target
