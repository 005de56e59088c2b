"""What tells the content of a model's folder, so that whoever names it can show to have had it open."""

from __future__ import annotations

import hashlib
from pathlib import Path

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import sha256
from falcon_qlora.common.untrusted import read_text
from falcon_qlora.models.checkpoints import RANDOM, weight_files
from falcon_qlora.models.locate import packaged_folder

_SAMPLES = 16  # places of a file, evenly spread: weights that were changed anywhere much differ in one
_SAMPLE_BYTES = 2**14


def named_folder(name: str) -> Path | None:
    """The folder that a model's name means as a path of this machine, there or not; None for other names."""
    if name.startswith(RANDOM) or packaged_folder(name) is not None:
        return None
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # of a user that there is not
        return Path(name)
    is_path = name.startswith(("/", "~", ".")) or ".." in path.parts or path.is_dir()
    return path if is_path else None


def model_fingerprint(name: str) -> str | None:
    """A hash of the configuration and of samples of the weights; None where `name` is no folder of a model.

    Who does not have the files cannot tell it.
    """
    folder = named_folder(name)
    if folder is None:
        return None
    digest = hashlib.sha256()
    try:
        digest.update(read_text(folder / "config.json").encode())
        for file in weight_files(folder):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with file.open("rb") as opened:
                for sample in range(_SAMPLES):
                    opened.seek(max(size - _SAMPLE_BYTES, 0) * sample // (_SAMPLES - 1))
                    digest.update(opened.read(_SAMPLE_BYTES))
    except (OSError, UserError):
        return None
    return digest.hexdigest()


def tokenizer_fingerprint(name: str) -> str | None:
    """A hash of ``tokenizer.json``; None where `name` is no folder with one."""
    folder = named_folder(name)
    try:
        return sha256(folder / "tokenizer.json") if folder is not None else None
    except OSError:
        return None
