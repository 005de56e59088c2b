"""A run whose `--output_dir` is an address: the folder here that is written, and what lies at the address.

The folder here stays the truth; `checkpoint.mirror` copies it to the address, `checkpoint.bring` back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from falcon_qlora.common import stores
from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import user_cache
from falcon_qlora.common.record_files import SETTINGS, SIGNS_OF_A_RUN, is_no_run
from falcon_qlora.common.stores import Store, StoreError

# In the folder and at the address: which run it is, and which of its starts writes to the address.
MARK = "mirror.json"
_FLAG = "--output_dir"
# Of a run, for the commands that open its adapter.
_RECORDS = (SETTINGS, "data.json", "kernels.json", "summary.json", "environment.json")
_PARTS = re.compile(r"(?P<run>.+?)(?P<inside>(/checkpoints/[^/]+|/adapter)?)/*")
_MARKED = re.compile(r"[\w.-]{1,253}")  # what identifies a run or a start, or a host's name
_BUCKET = re.compile(r"(\w+://[^/]+)/*")
_ONE_SLASH = re.compile(r"(s3|gs):/(?!/)")
_WHOLE = re.compile(r"checkpoints/step-(\d+)/manifest\.json")


def local_folder(address: str) -> Path:
    """The folder here of the run at `address`; it need not exist.

    Raises:
        UserError: if the address is not of a kind that is supported, or nothing here can be kept.
    """
    stores.check(address, _FLAG)
    bucket = _BUCKET.fullmatch(address)
    if bucket is not None:
        raise UserError(f"{_FLAG} {address}: name a folder in the bucket, such as {bucket[1]}/run")
    stores.require_lasting_cache(address, _FLAG)
    return user_cache("runs") / stores.slug(address.rstrip("/"))


def folder_of(name: str | Path) -> Path:
    """The folder that `--output_dir` means.

    Raises:
        UserError: see `local_folder`; or if it is an address that lacks a slash.
    """
    if _ONE_SLASH.match(str(name)):
        raise UserError(f"{_FLAG} {name}: an address has two slashes: {str(name).replace(':/', '://', 1)}")
    return local_folder(str(name)) if stores.is_address(name) else Path(name)


def found_at(address: str) -> dict[str, stores.File]:
    """What lies at the address.

    Raises:
        UserError: if the store does not answer.
    """
    try:
        return Store(address).files()
    except StoreError as error:
        raise UserError(f"{_FLAG} {address}: cannot be reached ({error})") from None


def steps_at(found: Mapping[str, Any]) -> list[int]:
    """The steps of the checkpoints among these objects, oldest first: those with a manifest."""
    return sorted(int(match[1]) for match in map(_WHOLE.fullmatch, found) if match)


def steps_here(folder: Path) -> list[int]:
    """The same of a folder here."""
    manifests = (folder / "checkpoints").glob("step-*/manifest.json")
    return steps_at({file.relative_to(folder).as_posix(): None for file in manifests})


def holds_run(address: str) -> bool:
    """Whether a run has been copied to the address.

    Raises:
        UserError: if the store does not answer.
    """
    return any(name.split("/")[0] in SIGNS_OF_A_RUN for name in found_at(address))


def holds_what_is_no_runs(address: str) -> bool:
    """Whether things with the names of a run's are at the address, and no run that has begun there.

    Returns:
        False where the store does not answer: a run then begins without it, and `Mirror` looks later.
    """
    try:
        return are_no_runs(Store(address).files())
    except StoreError:
        return False


def are_no_runs(found: Iterable[str]) -> bool:
    """The same of what was found at an address."""
    tops = {name.split("/")[0] for name in found}
    return is_no_run(tops) and MARK not in tops


def bring_settings(address: str, *, begun: bool) -> Path:
    """The folder of the run here, with the settings of the run at the address where it has none.

    Args:
        begun: only of a run that has a checkpoint.

    Raises:
        UserError: if the store does not answer, and there is no run here.
    """
    folder = local_folder(address)
    if steps_here(folder):
        return folder
    found = found_at(address)
    if SETTINGS in found and (steps_at(found) or not begun):
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        try:
            Store(address).get(SETTINGS, folder / SETTINGS)
        except StoreError as error:
            raise UserError(f"{_FLAG} {address}: cannot be read ({error})") from None
    return folder


def mark_of(read: Callable[[], bytes | str]) -> dict[str, Any]:
    """What a mark says: {} where it cannot be read. It is anybody's content, and parts of it name folders."""
    try:
        told = json.loads(read())
    except (OSError, ValueError, RecursionError):
        return {}
    entries = told.items() if isinstance(told, dict) else ()
    return {name: each for name, each in entries if isinstance(each, str) and _MARKED.fullmatch(each)}


def opened(address: str, flag: str, *, whole: bool = False) -> Path:
    """A copy here of the run, adapter, checkpoint or other folder at an address.

    Args:
        flag: that named it.
        whole: with all checkpoints of a run; otherwise only the one that is named.

    Raises:
        UserError: if it cannot be had.
    """
    stores.check(address, flag)
    parts = _PARTS.fullmatch(address)
    assert parts is not None
    run, inside = parts["run"], parts["inside"].strip("/")
    if whole and not inside:
        return stores.fetched(run, flag)
    wanted = (*_RECORDS, inside or "adapter")
    if not inside and not any(name.startswith("adapter/") for name in found_at(run)):
        return stores.fetched(run, flag)
    return stores.fetched(run, flag, wanted) / inside
