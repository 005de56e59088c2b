"""Checks of a merge's destination, made before any large library is loaded."""

from __future__ import annotations

from pathlib import Path

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import free_bytes, try_to_write
from falcon_qlora.common.quantities import gib
from falcon_qlora.common.record_files import CERTIFICATE


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


def check_disk(out: Path, needed: int) -> None:
    """Refuse a merge that does not fit on the disk of `out`.

    Raises:
        UserError: saying how much is missing.
    """
    free = free_bytes(out)
    if needed > free:
        raise UserError(
            f"--out {out}: the merge needs {gib(needed)}, only {gib(free)} free. Free space, name a folder "
            "on another disk, or make one merge instead of two (--base 16bit or --base dequantized)"
        )


def check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse to replace what the user may want to keep.

    Raises:
        UserError: if `out` exists, unless `overwrite` is set and it is a merge or an empty folder; or if it
            cannot be written there.
    """
    try:
        try_to_write(out.parent)
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there ({error.strerror})") from None
    if not out.exists():
        return
    if not overwrite:
        raise UserError(f"--out {out}: exists already. Name another folder, or replace it (--overwrite)")
    if not out.is_dir() or (any(out.iterdir()) and not (out / CERTIFICATE).is_file()):
        raise UserError(f"--out {out}: not a merge, which --overwrite does not replace; name another folder")
