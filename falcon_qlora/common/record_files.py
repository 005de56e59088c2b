"""Files by whose names a folder tells what it is, whatever else is in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.untrusted import is_count, refuse_links

SETTINGS = "config.yaml"  # of a run
SETTINGS_FORMAT = 2  # without a number they are of the first
CERTIFICATE = "certificate.json"  # of a merge
# What only a run that has started leaves behind: these make a folder one that "holds a run".
SIGNS_OF_A_RUN = (SETTINGS, "metrics.jsonl", "summary.json", "checkpoints", "adapter")


def check_format(record: Mapping[str, Any], what: str, newest: int = 1) -> None:
    """Refuse a record of a form that came after this program; one without a number is of the first.

    Args:
        record: what was read.
        what: the file it is of, for the message.
        newest: the newest form that is read.

    Raises:
        UserError: if its ``format`` is a larger number, or none at all.
    """
    found = record.get("format", 1)
    if not is_count(found, least=1):
        raise UserError(f"{what}: format {str(found)[:40]!r} is not a number from 1")
    if found > newest:
        raise UserError(f"{what}: format {found} is newer than this falcon_qlora reads; update it")


def without_format(record: Mapping[str, Any], what: str, newest: int = 1) -> dict[str, Any]:
    """A record without the number of its form, which `check_format` has checked."""
    check_format(record, what, newest)
    return {name: value for name, value in record.items() if name != "format"}


def settings_as_now(record: Mapping[str, Any], what: str) -> dict[str, Any]:
    """A run's recorded settings, without the number of their form, as they are to be given now.

    Raises:
        UserError: if they are of a later release's form.
    """
    settings = without_format(record, what, newest=SETTINGS_FORMAT)
    if record.get("format", 1) < 2 and settings.get("template") == "auto":
        # The tokenizer's own chat template was none of what `auto` could mean.
        settings["template"] = "format"
    return settings


def is_record(file: Path) -> bool:
    """Whether a file of settings is a run's own, and no one else's that happens to be called so."""
    others = set(SIGNS_OF_A_RUN) - {SETTINGS}
    return file.name == SETTINGS and any((file.parent / sign).exists() for sign in others)


def run_of(folder: Path) -> Path | None:
    """The run whose adapter, or a checkpoint of which, lies in `folder`; None for an adapter by itself."""
    absolute = folder.absolute()
    candidates = [absolute.parent] if absolute.name == "adapter" else []
    if absolute.parent.name == "checkpoints":
        candidates.append(absolute.parent.parent)
    run = next((path for path in candidates if (path / SETTINGS).is_file()), None)
    if run is not None:
        refuse_links(run)
    return run
