"""What a model's name means: a packaged model, a random preset, a local folder or a hub id."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.stores import fetched, is_address
from falcon_qlora.common.untrusted import read_json
from falcon_qlora.models.checkpoints import (
    RANDOM,
    Checkpoint,
    FolderCheckpoint,
    outline_of_random,
    parse_random,
    raw_config,
    read_folder_config,
)
from falcon_qlora.models.layouts import PRESETS, family_of, published_preset, read_config
from falcon_qlora.models.schemes import scheme_of
from falcon_qlora.models.tiny import tiny_path

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def open_checkpoint(model_name_or_path: str, *, revision: str | None = None, seed: int = 0) -> Checkpoint:
    """Find a model by the name that a user gives.

    Raises:
        UserError: if there is none.
    """
    if model_name_or_path.startswith(RANDOM):
        return parse_random(model_name_or_path, seed)
    folder = find_folder(model_name_or_path, revision=revision)
    raw, source = raw_config(folder), str(folder / "config.json")
    config, scheme = read_config(raw, source=source), scheme_of(raw, source)
    return FolderCheckpoint(model_name_or_path, config, folder, scheme)


def find_folder(model_name_or_path: str, *, revision: str | None = None) -> Path:
    """The folder of a packaged, local or hub model; missing files of a hub model are downloaded.

    Raises:
        UserError: if there is none.
    """
    if is_on_hub(model_name_or_path):
        from falcon_qlora.models.hub import fetch_model  # most loads need no hub

        return fetch_model(model_name_or_path, revision=revision)
    return packaged_folder(model_name_or_path) or Path(model_name_or_path).expanduser()


def find_config(name: str, *, revision: str | None = None) -> PreTrainedConfig:
    """The base model's configuration, without its weights.

    Raises:
        UserError: if there is no such model, or it is of no known layout.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError

    from falcon_qlora.models.hub import Unreachable, plan_model

    if is_on_hub(name):
        # Without the hub, the cache may hold the model; if not, the error says how to fill it.
        with contextlib.suppress(Unreachable, HTTPError, OSError):
            plan_model(name, revision=revision).check_disk()
            file = Path(hf_hub_download(name, "config.json", revision=revision))
            return read_folder_config(file.parent, source=name)
    return open_checkpoint(name, revision=revision).config


def find_outline(name: str, *, revision: str | None = None) -> Any:
    """The settings of a base model that counts depend on; no library is loaded unless it is on the hub.

    Raises:
        UserError: as `find_config`.
    """
    return find_config(name, revision=revision) if is_on_hub(name) else _outline(name)


def find_outline_here(name: str, *, revision: str | None = None) -> Any:
    """As `find_outline`, without asking the hub: of its models those in the cache, and published ones.

    Raises:
        UserError: if this machine does not know it.
    """
    if not is_on_hub(name):
        return _outline(name)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(cached, str):
        raw = read_json(Path(cached))
        return family_of(raw, source=name).outline(raw, name)
    preset = published_preset(name)
    if preset is None:
        raise UserError(
            f"{name} is not in the cache here, and the hub is not asked: give a folder, or {RANDOM} and "
            f"the preset of its shape: {', '.join(PRESETS)}"
        )
    return outline_of_random(f"{RANDOM}{preset}")


def _outline(name: str) -> Any:
    if name.startswith(RANDOM):
        return outline_of_random(name)
    folder = packaged_folder(name) or Path(name).expanduser()
    raw, source = raw_config(folder), str(folder / "config.json")
    return family_of(raw, source=source).outline(raw, source)


def is_on_hub(model_name_or_path: str) -> bool:
    """Whether a name is neither packaged nor random nor a local folder, so can only be a hub id.

    Raises:
        UserError: if it cannot be a hub id either.
    """
    if model_name_or_path.startswith(RANDOM) or packaged_folder(model_name_or_path) is not None:
        return False
    if Path(model_name_or_path).expanduser().is_dir():
        return False
    if not _HUB_ID.fullmatch(model_name_or_path) or model_name_or_path.startswith("."):
        raise UserError(
            f"There is no folder {model_name_or_path!r}, and a hub id would look like tiiuae/falcon-7b"
        )
    return True


def packaged_folder(model_name_or_path: str) -> Path | None:
    """The folder of a model that comes with the package, or of a copy of one at an address; else None."""
    if is_address(model_name_or_path):
        return fetched(model_name_or_path, "--model_name_or_path")
    return tiny_path() if model_name_or_path == "tiny" else None
