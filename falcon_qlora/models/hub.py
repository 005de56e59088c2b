"""Models from the Hugging Face hub: what would be downloaded, whether it fits the disk, and the download."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from falcon_qlora.errors import UserError

GIB = 2**30

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SIDE_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|merges\.txt|chat_template\.jinja"
)
_SAFETENSORS = re.compile(r"model.*\.safetensors(\.index\.json)?")
_TORCH_FILES = re.compile(r"pytorch_model.*\.bin(\.index\.json)?")


@dataclass(frozen=True, kw_only=True)
class Download:
    """The files of a hub model that loading it needs.

    Attributes:
        repository: its id.
        revision: branch, tag or commit; None for the main branch.
        files: names of the files.
        total_bytes: of all of them.
        missing_bytes: of those not in the cache yet.
        free_bytes: free space of the disk that holds the cache.
        cache: where they go.
    """

    repository: str
    revision: str | None
    files: tuple[str, ...]
    total_bytes: int
    missing_bytes: int
    free_bytes: int
    cache: Path

    def check_disk(self) -> None:
        """Refuse a download that the disk cannot take.

        Raises:
            UserError: saying by how much.
        """
        if self.missing_bytes > self.free_bytes:
            short = (self.missing_bytes - self.free_bytes) / GIB
            raise UserError(
                f"{self.repository} needs {self.missing_bytes / GIB:.1f} GiB more in {self.cache}, where "
                f"{self.free_bytes / GIB:.1f} GiB are free: {short:.1f} GiB too little. Free some, or set "
                "HF_HOME to a folder on a larger disk."
            )


def fetch_model(repository: str, *, revision: str | None = None) -> Path:
    """Download what loading a hub model needs, as far as it is not in the cache, and return its folder.

    The model's kind, its size and the disk's free space are checked before any weights are downloaded. Where
    the hub cannot be reached, the cache is used.

    Raises:
        UserError: if the model does not exist, may not be read, is no classic Falcon, does not fit on the
            disk, or is neither in the cache nor to be had.
    """
    check_hub_id(repository)
    if constants.HF_HUB_OFFLINE:
        return _cached_model(repository, revision, "HF_HUB_OFFLINE is set")
    try:
        download = plan_download(repository, revision=revision)
    except _Unreachable as error:
        return _cached_model(repository, revision, f"the hub cannot be reached ({error})")
    if download.missing_bytes:
        _check_kind(repository, revision)
        download.check_disk()
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(download.files)))
    except (HTTPError, OSError) as error:
        raise UserError(
            f"The download of {repository} stopped: {_first_line(error)}. What has arrived is kept; run "
            "the same command again to go on."
        ) from None


def plan_download(repository: str, *, revision: str | None = None) -> Download:
    """Ask the hub which files loading a model needs and how large they are.

    Raises:
        UserError: if the model does not exist or may not be read.
    """
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    except GatedRepoError:
        raise UserError(
            f"{repository} is gated: accept its terms on https://huggingface.co/{repository}, then log in "
            "with `hf auth login`."
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{repository} has no revision {revision!r}.") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"There is no model {repository!r}: no such folder here, and none on the hub that you can see."
        ) from None
    except (HTTPError, OSError) as error:
        raise _Unreachable(_first_line(error)) from error
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    files = wanted_files(list(sizes), repository)
    missing = [name for name in files if not _is_cached(repository, name, info.sha)]
    cache = Path(constants.HF_HUB_CACHE).expanduser()
    return Download(
        repository=repository,
        revision=revision,
        files=tuple(files),
        total_bytes=sum(sizes[name] for name in files),
        missing_bytes=sum(sizes[name] for name in missing),
        free_bytes=shutil.disk_usage(_nearest_existing(cache)).free,
        cache=cache,
    )


def wanted_files(names: list[str], repository: str) -> list[str]:
    """Of a repository's files those that loading needs: safetensors where there are any, else torch files.

    Raises:
        UserError: if it holds no weights.
    """
    for pattern in (_SAFETENSORS, _TORCH_FILES):
        weights = [name for name in names if pattern.fullmatch(name)]
        if any(not name.endswith(".json") for name in weights):
            return sorted(weights + [name for name in names if _SIDE_FILES.fullmatch(name)])
    raise UserError(f"{repository} holds no weights (model*.safetensors or pytorch_model*.bin).")


def check_hub_id(name: str) -> None:
    """Raise a UserError where `name` can be no hub id, so it was meant as a folder."""
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise UserError(f"There is no folder {name!r}, and a hub id would look like tiiuae/falcon-7b.")


class _Unreachable(Exception):
    pass


def _check_kind(repository: str, revision: str | None) -> None:
    from falcon_qlora.models.checkpoints import read_folder_config

    try:
        path = hf_hub_download(repository, "config.json", revision=revision)
    except (HTTPError, OSError):
        return  # reported by the download that follows
    read_folder_config(Path(path).parent, source=repository)


def _cached_model(repository: str, revision: str | None, why: str) -> Path:
    how_to = (
        "Download it ahead on a machine that reaches the hub (falcon-qlora prepare, with the same flags) and "
        "take the cache (HF_HOME) along, or name a local folder. Offline, set HF_HUB_OFFLINE=1."
    )
    try:
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        raise UserError(f"{repository} is not in the cache, and {why}. {how_to}") from None
    from falcon_qlora.models.checkpoints import weight_files

    try:
        weight_files(folder)
    except UserError:
        raise UserError(f"{repository} is in the cache in part only, and {why}. {how_to}") from None
    return folder


def _is_cached(repository: str, name: str, commit: str | None) -> bool:
    return isinstance(try_to_load_from_cache(repository, name, revision=commit), str)


def _nearest_existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
