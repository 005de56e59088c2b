"""A manifest of sizes and checksums shows whether a checkpoint, or a final adapter, is unaltered."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import sha256, write_json
from falcon_qlora.common.record_files import check_format
from falcon_qlora.common.untrusted import leads_out, read_json

MANIFEST = "manifest.json"
_FORMAT = 2  # 1: one checksum a file, of whatever size
_AT_ONCE = 8  # files or pieces hashed at once; hashing releases Python's lock
_PIECE_BYTES = 2**26  # a larger file has a checksum for every piece of this size
_NAME = re.compile(r"step-(\d+)")


def step_folders(checkpoints: Path) -> list[tuple[int, Path]]:
    """The checkpoints in a folder by step, oldest first, whole or not."""
    if not checkpoints.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in checkpoints.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match)


def describe_file(file: Path) -> dict[str, Any]:
    """A file's entry in a manifest."""
    return _described([file])[file]


def _described(files: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """Each file's entry; the hashes are made side by side, those of a large file's pieces too."""
    sizes = {file: file.stat().st_size for file in files}
    pieces = [(file, start) for file, size in sizes.items() for start in range(0, max(size, 1), _PIECE_BYTES)]
    with ThreadPoolExecutor(_AT_ONCE) as threads:  # a model and its optimizer state are tens of GB
        made = threads.map(lambda piece: sha256(piece[0], piece[1], _PIECE_BYTES), pieces)
        hashes: dict[Path, list[str]] = {file: [] for file in files}
        for (file, _), checksum in zip(pieces, made, strict=True):
            hashes[file].append(checksum)
    return {
        file: {"bytes": sizes[file], "sha256": each[0] if len(each) == 1 else each}
        for file, each in hashes.items()
    }


def write_manifest(
    folder: Path,
    record: dict[str, Any],
    described: dict[str, dict[str, Any]] | None = None,
    *,
    leave_out: Collection[str] = (),
) -> None:
    """Record every file's size and checksum, and `record`; call it once all files are written.

    Args:
        record: plain values, such as `step` and `processes`.
        described: entries by name, for files that were described when they were written.
        leave_out: names of files that may be changed.
    """
    described = described or {}
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in {MANIFEST, *described, *leave_out}
    ]
    entries = {path.relative_to(folder).as_posix(): about for path, about in _described(files).items()}
    write_json(folder / MANIFEST, {"format": _FORMAT, **record, "files": entries | described})


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `write_manifest` wrote.

    Raises:
        ValueError: if there is none, or it is not of this form.
    """
    try:
        manifest = read_json(folder / MANIFEST)
    except UserError:
        raise ValueError(f"its {MANIFEST} is missing or cannot be read") from None
    try:
        check_format(manifest, f"its {MANIFEST}", newest=_FORMAT)
    except UserError as error:
        raise ValueError(str(error)) from None
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(map(_describes_a_file, files.values())):
        raise ValueError(f"its {MANIFEST} lists no files")
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise ValueError(f"its {MANIFEST} names a file outside of it: {name[:80]!r}")
    return manifest


def _describes_a_file(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("bytes"), int)
        and isinstance(of := entry.get("sha256"), str | list)
        and all(isinstance(each, str) for each in of)
    )


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None where it is whole and unaltered."""
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error)
    for name, entry in manifest["files"].items():
        path = folder / name
        try:
            if leads_out(path, folder):
                return f"{name} is a link that leads out of it"
            if not path.is_file():
                return f"{name[:80]} is missing"
        except OSError as error:
            return f"{name[:80]}: {error.strerror}"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes instead of {entry['bytes']:,}"
    found = _described([folder / name for name in manifest["files"]])
    for name, entry in manifest["files"].items():
        path = folder / name
        # In a manifest of format 1 a large file has one checksum too.
        whole = isinstance(entry["sha256"], str) and entry["bytes"] > _PIECE_BYTES
        if (sha256(path) if whole else found[path]["sha256"]) != entry["sha256"]:
            return f"{name} is not what was written (its checksum differs)"
    return None


def fault_in_run(checkpoint: Path) -> str | None:
    """As `fault`, of a folder that was found in its run and not named: it must lie there itself."""
    if leads_out(checkpoint, checkpoint.parent):
        return "a link that leads out of the run; give it as --resume PATH if it is meant"
    return fault(checkpoint)


def newest_whole(checkpoints: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint that is whole, and the newer ones that are not, each with what is wrong."""
    faulty: list[tuple[Path, str]] = []
    for _, path in reversed(step_folders(checkpoints)):
        wrong = fault_in_run(path)
        if wrong is None:
            return path, faulty
        faulty.append((path, wrong))
    return None, faulty
