"""Which files of a folder hold the rows of a split."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from falcon_qlora.common.errors import UserError, nearest
from falcon_qlora.data.files import SUFFIXES, data_suffix

# What in a file's name says which split it belongs to.
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}
_METADATA_FILES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def files_of_folder(folder: Path, name: str, split: str) -> Sequence[Path]:
    """The files that hold the rows of a split, in order.

    Args:
        folder: with files of rows, also in folders of its own.
        name: of the folder, as the user gave it.
        split: a file without a word for one in its name is of ``train``.

    Raises:
        UserError: if there is none.
    """
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and data_suffix(path) is not None
        and path.name not in _METADATA_FILES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise UserError(f"{name}: the folder holds no {kinds()} file")
    splits = {path: _split_of(path.relative_to(folder)) for path in files}
    # Without a word for the split in its name a file is for training.
    chosen = [path for path in files if (splits[path] or "train") == split]
    if not chosen:
        there = sorted({of or "train" for of in splits.values()})
        raise UserError(
            f"{name}: no file of the folder is named as one of split {split!r}{nearest(split, there)}; "
            f"there are files for {', '.join(there)}"
        )
    return chosen


def _split_of(path: Path) -> str | None:
    words = re.split(r"[^a-z]+", str(path).lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)


def kinds() -> str:
    """The kinds of files that hold rows, for a sentence."""
    return ", ".join(SUFFIXES[:-1]) + f" or {SUFFIXES[-1]}"
