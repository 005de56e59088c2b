"""Which folders of this machine the files of a trained folder may have opened.

The files of an adapter or its run may come from anywhere. One that training wrote here tells the content of
the folders that it names; only such a folder, or one inside of theirs, is opened without the user's word.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.record_files import run_of


def may_open(name: str, what: str, record: dict[str, Any], folder: Path) -> bool:
    """Whether the files of a trained folder may have the model `name` opened, if it is a path at all.

    Args:
        name: of a model.
        what: ``base model`` or ``tokenizer``.
        record: what `folder` says of itself.
        folder: with the trained tensors.
    """
    # Here, as it imports torch, for which commands are not to wait before they start.
    from falcon_qlora.models.fingerprint import model_fingerprint, named_folder, tokenizer_fingerprint

    path = named_folder(name)
    if path is None or _lies_within(path, folder):
        return True
    base = what == "base model"
    told = record.get("base_fingerprint" if base else "tokenizer_fingerprint")
    return isinstance(told, str) and told == (
        model_fingerprint(name) if base else tokenizer_fingerprint(name)
    )


def check_may_open(name: str, what: str, record: dict[str, Any], folder: Path, *, say_so: str) -> Path | None:
    """Refuse a folder that `may_open` says no to.

    Args:
        name, what, record, folder: as there.
        say_so: how the user names the folder, if that is what is meant.

    Returns:
        The folder outside of theirs that the files name; None for any other name.

    Raises:
        UserError: saying how to have it opened.
    """
    from falcon_qlora.models.fingerprint import named_folder

    if not may_open(name, what, record, folder):
        raise UserError(
            f"{folder} names {name!r}, a folder of this machine, as its {what}, and does not tell what lies "
            f"there now. If that is right, say so: {say_so}."
        )
    path = named_folder(name)
    return None if path is None or _lies_within(path, folder) else path


def _lies_within(path: Path, folder: Path) -> bool:
    """Whether a path lies in a trained folder, or in the run that it is of."""
    run = run_of(folder)
    roots = [folder] if run is None else [folder, run]
    return any(path.resolve().is_relative_to(root.resolve()) for root in roots)
