"""The CSV that rows are appended to, of one process or of several GPUs."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import check_writable

COLUMNS = tuple(
    "date commit gpu gpus driver torch model variant quantize_mode compute_dtype checkpointing "
    "micro_batch_tokens tokens_per_second samples_per_second_512 tflops_4n ceiling_share peak_allocated_gb "
    "peak_reserved_gb step_ms ratio_to_first note".split()
)

_HEADER_BYTES = 10_000  # beyond that of the bench's columns


def check_csv(file: Path) -> None:
    """Refuse a file that rows cannot be appended to, or that has other columns.

    Raises:
        UserError: naming the file.
    """
    check_writable(file, "--csv")
    if not file.exists():
        return
    with file.open("rb") as opened:
        first = opened.readline(_HEADER_BYTES)
    # What is no text has other columns, too.
    if first and first.decode(errors="replace").strip() != ",".join(COLUMNS):
        raise UserError(f"--csv {file}: its columns are not the bench's; name another file")


def append_csv(file: Path, made: Sequence[Mapping[str, Any]]) -> None:
    """Add the rows at the end of `file`, which is made where it is not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.stat().st_size if file.exists() else 0
    with file.open("a", newline="", encoding="utf-8") as opened:
        if written and not _ends_with_a_line(file):
            opened.write("\n")  # an editor left it out: the first row would be the end of the last line
        writer = csv.DictWriter(opened, COLUMNS, extrasaction="ignore", lineterminator="\n")
        if not written:
            writer.writeheader()
        writer.writerows(made)


def _ends_with_a_line(file: Path) -> bool:
    with file.open("rb") as opened:
        opened.seek(-1, os.SEEK_END)
        return opened.read() == b"\n"
