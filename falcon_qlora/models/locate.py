"""What the name of a model means: a packaged model, a random preset, a local folder, the hub."""

from __future__ import annotations

import re
from pathlib import Path

from falcon_qlora.common.errors import UserError
from falcon_qlora.models.checkpoints import (
    RANDOM,
    Checkpoint,
    FolderCheckpoint,
    parse_random,
    read_folder_config,
)
from falcon_qlora.models.tiny import tiny_path

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def open_checkpoint(model_name_or_path: str, *, revision: str | None = None, seed: int = 0) -> Checkpoint:
    """Find a model by what a user names it.

    Raises:
        UserError: if there is none.
    """
    if model_name_or_path.startswith(RANDOM):
        return parse_random(model_name_or_path, seed)
    folder = find_folder(model_name_or_path, revision=revision)
    return FolderCheckpoint(model_name_or_path, read_folder_config(folder), folder)


def find_folder(model_name_or_path: str, *, revision: str | None = None) -> Path:
    """The folder of a packaged, local or hub model; of a hub model it downloads what is missing.

    Raises:
        UserError: if there is none.
    """
    if is_on_hub(model_name_or_path):
        from falcon_qlora.models.hub import fetch_model  # most loads need no hub

        return fetch_model(model_name_or_path, revision=revision)
    return packaged_folder(model_name_or_path) or Path(model_name_or_path).expanduser()


def is_on_hub(model_name_or_path: str) -> bool:
    """Whether a name is neither packaged nor random nor a folder here, so can only be a hub id.

    Raises:
        UserError: if it cannot be one.
    """
    if model_name_or_path.startswith(RANDOM) or packaged_folder(model_name_or_path) is not None:
        return False
    if Path(model_name_or_path).expanduser().is_dir():
        return False
    if not _HUB_ID.fullmatch(model_name_or_path) or model_name_or_path.startswith("."):
        raise UserError(
            f"There is no folder {model_name_or_path!r}, and a hub id would look like tiiuae/falcon-7b."
        )
    return True


def packaged_folder(model_name_or_path: str) -> Path | None:
    """The folder of a model that comes with the package, or None."""
    return tiny_path() if model_name_or_path == "tiny" else None
