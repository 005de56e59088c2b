"""A manifest of sizes and checksums shows whether a checkpoint, or a final adapter, is unaltered."""

from __future__ import annotations

import re
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import sha256, write_json
from falcon_qlora.common.record_files import check_format
from falcon_qlora.common.untrusted import leads_out, read_json

MANIFEST = "manifest.json"
_FORMAT = 1
_AT_ONCE = 4  # files hashed at once; hashing releases Python's lock
_NAME = re.compile(r"step-(\d+)")


def step_folders(checkpoints: Path) -> list[tuple[int, Path]]:
    """The checkpoints in a folder by step, oldest first, whole or not."""
    if not checkpoints.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in checkpoints.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match)


def describe_file(file: Path) -> dict[str, Any]:
    """A file's entry in a manifest."""
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


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
    names = [path.relative_to(folder).as_posix() for path in files]
    with ThreadPoolExecutor(_AT_ONCE) as threads:  # a whole model and its optimizer state are tens of GB
        entries = dict(zip(names, threads.map(describe_file, files), strict=True))
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
        and isinstance(entry.get("sha256"), str)
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
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        found = threads.map(sha256, [folder / name for name in manifest["files"]])
        for (name, entry), checksum in zip(manifest["files"].items(), found, strict=True):
            if checksum != entry["sha256"]:
                return f"{name} is not what was written (its checksum differs)"
    return None


def newest_whole(checkpoints: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint that is whole, and the newer ones that are not, each with what is wrong."""
    faulty: list[tuple[Path, str]] = []
    for _, path in reversed(step_folders(checkpoints)):
        wrong = fault(path)
        if wrong is None:
            return path, faulty
        faulty.append((path, wrong))
    return None, faulty
