"""Models from the Hugging Face hub: what would be downloaded, whether it fits the disk, and the download."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

from falcon_qlora.common.errors import UserError, first_line
from falcon_qlora.common.files import free_bytes
from falcon_qlora.common.quantities import sized
from falcon_qlora.common.untrusted import is_count

_SIDE_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|merges\.txt|chat_template\.jinja"
)
_SAFETENSORS = re.compile(r"model.*\.safetensors(\.index\.json)?")
_NO_DATA = re.compile(r"(^|/)\.git|\.(md|py|ipynb|png|jpe?g|svg)$|^dataset_infos\.json$")
_ADAPTER = "adapter_config.json"
_TORCH_FILES = re.compile(r"pytorch_model.*\.bin(\.index\.json)?")


class Unreachable(UserError):
    """The hub does not answer."""


@dataclass(frozen=True, kw_only=True)
class Download:
    """The files of a hub repository that are needed.

    Attributes:
        repository: its id.
        kind: ``model`` or ``dataset``.
        files: names of the files.
        total_bytes: of all of them.
        missing_bytes: of those not in the cache yet.
        free_bytes: free space of the disk that holds the cache.
        cache: where they go.
    """

    repository: str
    kind: str
    files: tuple[str, ...]
    total_bytes: int
    missing_bytes: int
    free_bytes: int
    cache: Path

    def check_disk(self, *, copies: int = 1, taken: int = 0) -> int:
        """Refuse a download that the disk cannot take.

        Args:
            copies: how many copies of the bytes the disk must hold, in one form or another.
            taken: bytes of the free space that other downloads will take.

        Returns:
            The bytes that it will take itself.

        Raises:
            UserError: saying by how much.
        """
        needed, free = copies * self.missing_bytes, self.free_bytes - taken
        if needed > free:
            beside = " beside what else is downloaded" if taken else ""
            raise UserError(
                f"{self.repository} needs {sized(needed, 1)} more in {self.cache}, where "
                f"only {sized(free, 1)} are free{beside}: {sized(needed - free, 1)} short. "
                "Free space, or set HF_HOME to a folder on a larger disk"
            )
        return needed


def fetch_model(repository: str, *, revision: str | None = None) -> Path:
    """Download the files that loading a hub model needs and the cache lacks, and return its folder.

    The model's kind, its size and the disk's free space are checked before any weights are downloaded. Where
    the hub cannot be reached, the cache is used.

    Raises:
        UserError: if the model does not exist, may not be read, is of no known layout, does not fit on the
            disk, or is neither in the cache nor reachable.
    """
    try:
        download = plan_model(repository, revision=revision)
    except Unreachable as error:
        return _cached_model(repository, revision, str(error))
    download.check_disk()
    try:
        with _understood(repository):
            return Path(snapshot_download(repository, revision=revision, allow_patterns=list(download.files)))
    except (HTTPError, OSError) as error:
        raise UserError(
            f"The download of {repository} stopped: {first_line(error)}. What has arrived is kept; run "
            "the same command again to go on"
        ) from None


def fetch_tokenizer(repository: str, *, revision: str | None = None) -> Path:
    """Download a hub model's small files, including its tokenizer, and return their folder.

    Raises:
        UserError: as `fetch_model`.
    """
    try:
        sizes, _ = _sizes(repository, "model", revision)
        files = [name for name in sizes if _SIDE_FILES.fullmatch(name)]
        with _understood(repository):
            return Path(snapshot_download(repository, revision=revision, allow_patterns=files))
    except Unreachable as error:
        why = str(error)
    except (HTTPError, OSError) as error:
        why = f"the hub cannot be reached ({first_line(error)})"
    return _cached(repository, revision, "tokenizer.json", f"The tokenizer of {repository}", why)


def plan_model(repository: str, *, revision: str | None = None) -> Download:
    """Ask the hub which files loading a model needs, how large they are, and whether it can be loaded.

    Raises:
        UserError: if the model does not exist, may not be read, or is of no known layout.
        Unreachable: if the hub does not answer.
    """
    sizes, commit = _sizes(repository, "model", revision)
    files = wanted_files(list(sizes), repository)
    download = _download(repository, "model", {name: sizes[name] for name in files}, commit)
    if download.missing_bytes:
        from falcon_qlora.models.checkpoints import read_folder_config

        with contextlib.suppress(HTTPError, OSError), _understood(repository):  # the download reports it
            path = hf_hub_download(repository, "config.json", revision=revision)
            read_folder_config(Path(path).parent, source=repository)
    return download


def plan_dataset(repository: str, *, config: str | None = None) -> Download:
    """Ask the hub how large a data set's files are; an upper bound where it has several configurations.

    Raises:
        UserError: if it does not exist or may not be read.
        Unreachable: if the hub does not answer.
    """
    sizes, commit = _sizes(repository, "dataset", None)
    data = {name: size for name, size in sizes.items() if not _NO_DATA.search(name)}
    named = {name: size for name, size in data.items() if config is not None and config in Path(name).parts}
    return _download(repository, "dataset", named or data, commit)


def _sizes(repository: str, kind: str, revision: str | None) -> tuple[dict[str, int], str | None]:
    """Bytes of each file of a repository, and its commit."""
    if constants.HF_HUB_OFFLINE:
        raise Unreachable("HF_HUB_OFFLINE is set")
    try:
        ask = HfApi().dataset_info if kind == "dataset" else HfApi().model_info
        with _understood(repository):
            info = ask(repository, revision=revision, files_metadata=True)
            files = {file.rfilename: file.size or 0 for file in info.siblings or []}
            if not all(isinstance(name, str) and is_count(size) for name, size in files.items()):
                raise ValueError("a file without a name, or a size")
    except GatedRepoError:
        page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repository}"
        raise UserError(
            f"{repository} is gated: accept its terms on {page}, then log in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{repository} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"There is no {kind} {repository!r}: no such folder here, and none on the hub that you can see"
        ) from None
    except (HTTPError, OSError) as error:
        raise Unreachable(f"the hub cannot be reached ({first_line(error)})") from error
    return files, info.sha


@contextlib.contextmanager
def _understood(repository: str) -> Iterator[None]:
    """Report an answer from which the library cannot make what it expects.

    Raises:
        UserError: naming the hub.
    """
    try:
        yield
    except OSError:
        raise
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        told = f"{type(error).__name__}: {first_line(error, limit=100)}"
        raise UserError(
            f"{repository}: {constants.ENDPOINT} does not answer as a hub does ({told}): check HF_ENDPOINT"
        ) from None


def _download(repository: str, kind: str, sizes: dict[str, int], commit: str | None) -> Download:
    cache = Path(constants.HF_HUB_CACHE).expanduser()
    find = partial(try_to_load_from_cache, repository, revision=commit, repo_type=kind)
    return Download(
        repository=repository,
        kind=kind,
        files=tuple(sizes),
        total_bytes=sum(sizes.values()),
        missing_bytes=sum(size for name, size in sizes.items() if not isinstance(find(name), str)),
        free_bytes=free_bytes(cache),
        cache=cache,
    )


def check_login(token: str | None) -> None:
    """Check that the hub knows the user, before there is anything to upload.

    Raises:
        UserError: if it does not, or cannot be reached.
    """
    try:
        HfApi(token=token).whoami()
    except (HTTPError, OSError, ValueError) as error:
        told = first_line(error, limit=100)
        raise UserError(
            f"--push_to_hub: the hub does not know you ({told}). Log in with `hf auth login`, or drop it"
        ) from None


def push_folder(
    folder: Path,
    repository: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Upload a model's folder to the hub, creating the repository if needed; returns its URL.

    Raises:
        UserError: if the hub refuses it. The folder stays as it is.
    """
    api = HfApi(token=token)
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id, folder_path=folder, revision=revision, commit_message="falcon-qlora"
        )
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(
            f"{folder} is written, but was not uploaded to {repository}: {first_line(error)}. Log in with "
            f"`hf auth login`, then: hf upload {repository} {folder}"
        ) from None
    return str(url)


def wanted_files(names: list[str], repository: str) -> list[str]:
    """The files of a repository that loading needs: safetensors where there are any, else torch files.

    Raises:
        UserError: if it holds no weights.
    """
    for pattern in (_SAFETENSORS, _TORCH_FILES):
        weights = [name for name in names if pattern.fullmatch(name)]
        if any(not name.endswith(".json") for name in weights):
            return sorted(weights + [name for name in names if _SIDE_FILES.fullmatch(name)])
    if _ADAPTER in names:
        raise _is_an_adapter(repository)
    raise UserError(f"{repository} holds no weights (model*.safetensors or pytorch_model*.bin)")


def _is_an_adapter(repository: str) -> UserError:
    return UserError(
        f"{repository} holds an adapter, not a model. Download it (hf download {repository} --local-dir "
        "FOLDER), name it with --adapter FOLDER, and its base with -m"
    )


def _cached_model(repository: str, revision: str | None, why: str) -> Path:
    from falcon_qlora.models.checkpoints import weight_files

    known = partial(try_to_load_from_cache, repository, revision=revision)
    if isinstance(known(_ADAPTER), str) and not isinstance(known("config.json"), str):
        raise _is_an_adapter(repository)
    folder = _cached(repository, revision, "config.json", repository, why)
    try:
        weight_files(folder)
    except UserError:
        raise UserError(_not_cached(f"{repository} is in the cache in part only", why)) from None
    return folder


def _cached(repository: str, revision: str | None, needed: str, what: str, why: str) -> Path:
    """The cached folder that holds the file `needed`."""
    try:
        folder = snapshot_download(
            repository, revision=revision, allow_patterns=[needed], local_files_only=True
        )
    except (HTTPError, OSError):
        raise UserError(_not_cached(f"{what} is not in the cache", why)) from None
    return Path(folder)


def _not_cached(what: str, why: str) -> str:
    return (
        f"{what}, and {why}. Download it ahead where the hub can be reached (falcon-qlora "
        "prepare, with the same flags), bring the cache (HF_HOME) here and set HF_HUB_OFFLINE=1; or name a "
        "local folder"
    )
