"""Where a merge or a prepared base is written. Imports no large library: mistakes are told at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import being_written, free_bytes, quoted, replaced_folder, try_to_write
from falcon_qlora.common.quantities import sized
from falcon_qlora.common.record_files import CERTIFICATE, PREPARED


def shard_bytes(size: str) -> int:
    """Bytes of ``5GB`` or ``500MB``, where a GB is 10^9.

    Raises:
        UserError: for anything else.
    """
    number, unit = size.strip().upper()[:-2], size.strip().upper()[-2:]
    scale = {"KB": 10**3, "MB": 10**6, "GB": 10**9}.get(unit)
    if scale is None or not number.strip().isdigit() or int(number) < 1:
        raise UserError(f"--max_shard_size {size}: expected a size such as 5GB or 500MB")
    return int(number) * scale


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What is written: the flag that names its folder, a word for it, and the file by which it is known."""

    flag: str
    what: str
    mark: str


MERGE = Kind(flag="--out", what="merge", mark=CERTIFICATE)
BASE = Kind(flag="--output_dir", what="prepared base", mark=PREPARED)


def check_disk(out: Path, needed: int, kind: Kind = MERGE) -> None:
    """Refuse what does not fit on the disk of `out`.

    Raises:
        UserError: saying how much is missing.
    """
    free = free_bytes(out)
    if needed > free:
        fewer = ", or make one merge instead of two (--base 16bit or --base dequantized)" * (kind is MERGE)
        raise UserError(
            f"{kind.flag} {out}: the {kind.what} needs {sized(needed)}, only {sized(free)} free: "
            f"{sized(needed - free)} short. Free space, or name a folder on another disk{fewer}"
        )


def check_out(out: Path, *, overwrite: bool, kind: Kind = MERGE) -> None:
    """Refuse to replace what the user may want to keep.

    Raises:
        UserError: if `out` exists, unless `overwrite` is set and it is of this kind or an empty folder; if
            another process is writing it; or if it cannot be written there.
    """
    try:
        try_to_write(out.parent)
    except OSError as error:
        raise UserError(f"{kind.flag} {out}: cannot write there ({error.strerror})") from None
    if (found := being_written(out)) is not None:
        partial, is_sure = found
        told = ". Wait for it to end"
        if not is_sure:
            left = quoted(str(partial))
            told = f", or was killed at it: if none is at work, remove what is left (rm -r {left})"
        raise UserError(f"{kind.flag} {out}: another process is writing this {kind.what}{told}")
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / kind.mark).is_file()):
        raise UserError(
            f"{kind.flag} {out}: exists already and is not a {kind.what}; name another folder"
            + ", as --overwrite does not replace it" * overwrite
        )
    if not overwrite:
        raise UserError(
            f"{kind.flag} {out}: exists already. Name another folder, or replace it (--overwrite)"
        )


@contextlib.contextmanager
def new_folder(out: Path, *, overwrite: bool, kind: Kind = MERGE) -> Iterator[Path]:
    """Yield an empty folder, which becomes `out` when the block ends without an error.

    Raises:
        UserError: if another process has made `out` meanwhile, unless `overwrite` is set.
    """
    with replaced_folder(out, first_wins=not overwrite) as folder:
        yield folder
        ours = folder.stat().st_ino
    if out.stat().st_ino != ours:
        raise UserError(
            f"{kind.flag} {out}: another process has written this folder meanwhile. Its {kind.what} stays, "
            "this one was not kept: name another folder, or replace it (--overwrite)"
        )
