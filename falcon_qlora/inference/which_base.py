"""Whether the base that an adapter meets is the one that it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def differs(record: dict[str, Any], base: str, *, revision: str | None = None) -> bool:
    """Whether an adapter was trained on another base than `base`, as far as their content is known."""
    from falcon_qlora.methods.open_adapter import is_as_recorded

    return is_as_recorded(base, "base model", record, revision=revision) is False


def base_note(record: dict[str, Any], folder: Path, base: str, *, revision: str | None = None) -> str | None:
    """What is to be said where an adapter meets another base than it was trained on, or perhaps another.

    Args:
        record: what the adapter's folder says of itself.
        folder: the adapter's.
        base: name of the model that it is opened on, which is on this machine.
        revision: of that on the hub.
    """
    from falcon_qlora.methods.open_adapter import is_as_recorded
    from falcon_qlora.models.fingerprint import model_fingerprint, shown

    trained_on, told = record.get("base_model"), record.get("base_fingerprint")
    same = is_as_recorded(base, "base model", record, revision=revision)
    if same is False:
        found = shown(model_fingerprint(base, revision=revision))
        return (
            f"the adapter in {folder} was trained on another base: {trained_on} (fingerprint {shown(told)}), "
            f"not {base} (fingerprint {found})"
        )
    if same is None and trained_on not in (None, base):
        return (
            f"the adapter in {folder} was trained on {trained_on}; whether {base} is the same model cannot "
            "be checked, as only its name is recorded"
        )
    return None
