"""Fingerprints of a model folder's content: recording one shows that the writer had the folder open."""

from __future__ import annotations

import hashlib
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import sha256
from falcon_qlora.common.stores import is_address
from falcon_qlora.common.untrusted import read_text
from falcon_qlora.models.checkpoints import RANDOM, weight_files
from falcon_qlora.models.locate import packaged_folder

# Files up to the first size are hashed whole, larger ones at this many evenly spread places.
_WHOLE_BYTES = 2**26
_SAMPLES = 64
_SAMPLE_BYTES = 2**14
# Fingerprints without this prefix are from older versions: of folders only, at 16 places of every file.
_FORM = "2:"
_SAMPLES_BEFORE = 16


def named_folder(name: str) -> Path | None:
    """The local folder that a model's name means, whether or not it exists; None for other names."""
    if is_address(name):
        return packaged_folder(name)
    if name.startswith(RANDOM) or packaged_folder(name) is not None:
        return None
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # an unknown user's home
        return Path(name)
    is_path = name.startswith(("/", "~", ".")) or ".." in path.parts or path.is_dir()
    return path if is_path else None


def model_fingerprint(name: str, *, revision: str | None = None) -> str | None:
    """A hash of a model's configuration and its weights, with large files sampled.

    A model of random weights is identified by its name. For any other, only who has the files can make it.

    Args:
        name: of a model.
        revision: of a hub model, which is looked for only in the cache.

    Returns:
        None where its files are not on this machine.
    """
    if name.startswith(RANDOM):
        return f"{_FORM}{hashlib.sha256(name.encode()).hexdigest()}"
    folder = packaged_folder(name) or named_folder(name)
    if folder is None:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        folder = Path(cached).parent if isinstance(cached, str) else None
    told = None if folder is None else _hash(folder, samples=_SAMPLES, whole_bytes=_WHOLE_BYTES)
    return None if told is None else f"{_FORM}{told}"


def is_fingerprint_of(told: object, name: str, *, revision: str | None = None) -> bool | None:
    """Whether the recorded fingerprint `told` is the model `name`'s; None where either is unknown."""
    if not isinstance(told, str):
        return None
    if told.startswith(_FORM):
        found = model_fingerprint(name, revision=revision)
    else:
        folder = packaged_folder(name) or named_folder(name)
        found = None if folder is None else _hash(folder, samples=_SAMPLES_BEFORE, whole_bytes=0)
    return None if found is None else told == found


def tells_of_folder(told: object) -> bool:
    """Whether a recorded fingerprint can only be a folder's, as those of older versions are."""
    return isinstance(told, str) and not told.startswith(_FORM)


def shown(told: object) -> str:
    """The first digits of a fingerprint, to show to a reader."""
    return str(told).removeprefix(_FORM)[:12]


def _hash(folder: Path, *, samples: int, whole_bytes: int) -> str | None:
    digest = hashlib.sha256()
    try:
        digest.update(read_text(folder / "config.json").encode())
        for file in weight_files(folder):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            if size <= whole_bytes:
                digest.update(sha256(file).encode())
                continue
            with file.open("rb") as opened:
                for sample in range(samples):
                    opened.seek(max(size - _SAMPLE_BYTES, 0) * sample // (samples - 1))
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
