"""The files whose names tell what a folder is, and the format number of records."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.untrusted import is_count, refuse_links

# `--resume` without a path: the newest checkpoint of `--output_dir`, or that where there is one.
LATEST, AUTO = "latest", "auto"
SETTINGS = "config.yaml"  # of a run
SETTINGS_FORMAT = 2  # settings without a number have format 1
CERTIFICATE = "certificate.json"  # of a merge
PREPARED = "falcon_qlora_base.json"  # of a quantized base
# Written only by a run that has started: a folder with any of these "holds a run".
SIGNS_OF_A_RUN = (SETTINGS, "metrics.jsonl", "summary.json", "checkpoints", "adapter")


def is_no_run(names: Collection[str]) -> bool:
    """Whether a folder with these names has some of a run's, such as ``adapter``, but not its settings."""
    return SETTINGS not in names and any(sign in names for sign in SIGNS_OF_A_RUN)


def check_format(record: Mapping[str, Any], what: str, newest: int = 1) -> None:
    """Refuse a record in a newer format than this program reads; one without a number has format 1.

    Args:
        record: what was read.
        what: its file, for the message.
        newest: the newest format that is read.

    Raises:
        UserError: if its ``format`` is larger, or not a number from 1.
    """
    found = record.get("format", 1)
    if not is_count(found, least=1):
        raise UserError(f"{what}: format {str(found)[:40]!r} is not a number from 1")
    if found > newest:
        raise UserError(f"{what}: format {found} is newer than this falcon_qlora reads; update it")


def without_format(record: Mapping[str, Any], what: str, newest: int = 1) -> dict[str, Any]:
    """A record without its format number, which `check_format` has checked."""
    check_format(record, what, newest)
    return {name: value for name, value in record.items() if name != "format"}


def settings_as_now(record: Mapping[str, Any], what: str) -> dict[str, Any]:
    """A run's recorded settings in the newest format, without the format number.

    Raises:
        UserError: if they are in the format of a later release.
    """
    settings = without_format(record, what, newest=SETTINGS_FORMAT)
    if record.get("format", 1) < 2 and settings.get("template") == "auto":
        # In format 1, `auto` never meant the tokenizer's own chat template.
        settings["template"] = "format"
    return settings


def is_record(file: Path) -> bool:
    """Whether a settings file was written by a run, and does not just have the same name."""
    others = set(SIGNS_OF_A_RUN) - {SETTINGS}
    return file.name == SETTINGS and any((file.parent / sign).exists() for sign in others)


def run_of(folder: Path) -> Path | None:
    """The run whose adapter or checkpoint `folder` is; None for an adapter by itself."""
    absolute = folder.absolute()
    candidates = [absolute.parent] if absolute.name == "adapter" else []
    if absolute.parent.name == "checkpoints":
        candidates.append(absolute.parent.parent)
    run = next((path for path in candidates if (path / SETTINGS).is_file()), None)
    if run is not None:
        refuse_links(run)
    return run
