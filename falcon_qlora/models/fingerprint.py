"""Fingerprints of a model folder's content: recording one shows that the writer had the folder open."""

from __future__ import annotations

import hashlib
from pathlib import Path

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import sha256
from falcon_qlora.common.record_files import PREPARED
from falcon_qlora.common.stores import is_address
from falcon_qlora.common.untrusted import file_beside, read_text
from falcon_qlora.models.checkpoints import RANDOM, weight_files
from falcon_qlora.models.locate import packaged_folder
from falcon_qlora.models.prepared import Prepared, read_prepared

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

    A model of random weights is identified by its name. For any other, only who has the files can make it. A
    base that was prepared from another model, and not changed since, has that model's.

    Args:
        name: of a model.
        revision: of a hub model, which is looked for only in the cache.

    Returns:
        None where its files are not on this machine.
    """
    if name.startswith(RANDOM):
        return f"{_FORM}{hashlib.sha256(name.encode()).hexdigest()}"
    folder = folder_here(name, revision=revision)
    told = None if folder is None else content_hash(folder)
    prepared = _prepared(folder, told)
    if prepared is not None:
        return prepared.fingerprints[0]
    return None if told is None else f"{_FORM}{told}"


def folder_here(name: str, *, revision: str | None = None) -> Path | None:
    """The folder of a model on this machine, in the hub's cache too; None where there is none."""
    if name.startswith(RANDOM):
        return None
    folder = packaged_folder(name) or named_folder(name)
    if folder is not None:
        return folder
    from huggingface_hub import try_to_load_from_cache  # folders need no hub

    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # no name that a repository can have
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def fingerprints(name: str, *, revision: str | None = None) -> list[str]:
    """The fingerprints by which records of this and older versions know a model on this machine."""
    folder, told = folder_here(name, revision=revision), model_fingerprint(name, revision=revision)
    before = None if folder is None else _hash(folder, samples=_SAMPLES_BEFORE, whole_bytes=0)
    return [each for each in (told, before) if each is not None]


def _prepared(folder: Path | None, told: str | None) -> Prepared | None:
    """The record of a prepared base that has not changed since, given its `content_hash`."""
    try:
        prepared = read_prepared(folder)
    except UserError:
        return None
    return prepared if prepared is not None and prepared.content == told else None


def is_fingerprint_of(told: object, name: str, *, revision: str | None = None) -> bool | None:
    """Whether the recorded fingerprint `told` is the model `name`'s; None where either is unknown."""
    if not isinstance(told, str):
        return None
    if told.startswith(_FORM):
        found = model_fingerprint(name, revision=revision)
    else:
        folder = packaged_folder(name) or named_folder(name)
        prepared = None if folder is None else _prepared(folder, content_hash(folder))
        if prepared is not None:
            return told in prepared.fingerprints
        found = None if folder is None else _hash(folder, samples=_SAMPLES_BEFORE, whole_bytes=0)
    return None if found is None else told == found


def tells_of_folder(told: object) -> bool:
    """Whether a recorded fingerprint can only be a folder's, as those of older versions are."""
    return isinstance(told, str) and not told.startswith(_FORM)


def shown(told: object) -> str:
    """The first digits of a fingerprint, to show to a reader."""
    return str(told).removeprefix(_FORM)[:12]


def content_hash(folder: Path) -> str | None:
    """A hash of the configuration and the weights in a folder; None where they cannot be read."""
    return _hash(folder, samples=_SAMPLES, whole_bytes=_WHOLE_BYTES)


def _hash(folder: Path, *, samples: int, whole_bytes: int) -> str | None:
    digest = hashlib.sha256()
    try:
        digest.update(read_text(folder / "config.json").encode())
        for file in weight_files(folder):
            digest.update(_told_of(file, samples=samples, whole_bytes=whole_bytes))
    except (OSError, UserError):
        return None
    return digest.hexdigest()


def _told_of(file: Path, *, samples: int, whole_bytes: int) -> bytes:
    size = file.stat().st_size
    told = f"{file.name} {size}".encode()
    if size <= whole_bytes:
        return told + sha256(file).encode()
    with file.open("rb") as opened:
        for sample in range(samples):
            opened.seek(max(size - _SAMPLE_BYTES, 0) * sample // (samples - 1))
            told += opened.read(_SAMPLE_BYTES)
    return told


def file_hash(file: Path) -> str:
    """A hash of a file's name and content, with large files sampled."""
    told = _told_of(file, samples=_SAMPLES, whole_bytes=_WHOLE_BYTES)
    return hashlib.sha256(told).hexdigest()


def changed_files(folder: Path, prepared: Prepared) -> list[str]:
    """The names of a prepared base's recorded files that are missing, or not as they were written."""
    return [
        name
        for name, told in (prepared.files or {}).items()
        if not (file := file_beside(folder / PREPARED, name)).is_file() or file_hash(file) != told
    ]


def tokenizer_fingerprint(name: str) -> str | None:
    """A hash of ``tokenizer.json``; None where `name` is no folder with one."""
    folder = named_folder(name)
    try:
        return sha256(folder / "tokenizer.json") if folder is not None else None
    except OSError:
        return None
