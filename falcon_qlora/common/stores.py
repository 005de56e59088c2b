"""Folders of object stores, such as ``s3://bucket/run``: the one place that calls fsspec.

    store = Store("s3://bucket/run")
    store.put(Path("run/config.yaml"), "config.yaml")
    store.files()                     # {"config.yaml": File(bytes=812, tag='"5d41…"')}
    fetched("s3://bucket/rows.jsonl") # a copy on this machine, made once

An object appears whole or not at all, and cannot be renamed. What s3fs, botocore and gcsfs raise has no class
in common, and little of it is an OSError: here all of it becomes a `StoreError` with one line.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from falcon_qlora.common.errors import UserError, one_line, printable, without_credentials
from falcon_qlora.common.files import CACHE, replaced, replaced_folder, user_cache
from falcon_qlora.common.quantities import sized

_MARK = "://"
# Scheme → the extra of this package that can read it.
_EXTRAS = {"s3": "s3", "gs": "gcs"}
# Of the disk here: s3fs makes EIO and others of what a server says.
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# A server that takes connections and is silent shall be told of soon. Whoever calls tries again.
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"connect_timeout": 10, "read_timeout": 30, "retries": {"max_attempts": 1}}}
}


class StoreError(Exception):
    """A store does not answer, or refuses; the text is one line."""


@dataclass(frozen=True)
class File:
    """An object as it is listed.

    Attributes:
        bytes: its size.
        tag: differs if its content does.
    """

    bytes: int
    tag: str


def is_address(name: object) -> bool:
    """Whether `name` is the address of something, and no path."""
    return _MARK in str(name)


def check(address: str, flag: str) -> None:
    """Refuse an address whose kind is not known, or for which a package is missing.

    Args:
        flag: that named it.

    Raises:
        UserError: naming both.
    """
    scheme, _, rest = address.partition(_MARK)
    if scheme not in _EXTRAS:
        kinds = " and ".join(f"{each}{_MARK}" for each in _EXTRAS)
        raise UserError(
            f"{flag} {address}: of addresses only {kinds} are supported. Name a folder, or one of them"
        )
    if not rest.strip("/") or ".." in PurePosixPath(rest).parts:
        raise UserError(
            f"{flag} {address}: name a bucket and a folder in it, such as {scheme}{_MARK}bucket/run"
        )
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError:
        raise UserError(
            f"{flag} {address}: a package for {scheme}{_MARK} is missing: pip install "
            f"'falcon_qlora[{_EXTRAS[scheme]}]'"
        ) from None


class Store:
    """A folder of an object store.

    Args:
        address: of a kind that `check` accepts.
    """

    def __init__(self, address: str):
        self.address = address.rstrip("/")
        self._scheme, _, self._root = self.address.partition(_MARK)

    def files(self, inside: str = "") -> dict[str, File]:
        """The objects below this folder, by their names in it; {} where there are none.

        Args:
            inside: only those below this folder of it.
        """
        top = f"{self._root}/{inside}".rstrip("/")
        with self._errors():
            found = self._system().find(top, detail=True)
        for name in found:
            if ".." in PurePosixPath(name).parts or not name.isprintable():
                raise StoreError(f"an object there is named {name[-80:]!r}, which is no file's name")
        return {
            name.removeprefix(f"{self._root}/"): File(int(about.get("size") or 0), _tag(about))
            for name, about in found.items()
            if name.startswith(f"{top}/")
        }

    def file(self, name: str) -> dict[str, File]:
        """As `files`, of the one object of this name."""
        with self._errors():
            try:
                about = self._system().info(f"{self._root}/{name}")
            except FileNotFoundError:
                return {}
        return {name: File(int(about.get("size") or 0), _tag(about))} if about["type"] == "file" else {}

    def put(self, file: Path, name: str) -> None:
        """Upload a file.

        Raises:
            OSError: if the file is not there.
        """
        file.stat()
        with self._errors():
            self._system().put_file(str(file), f"{self._root}/{name}")

    def get(self, name: str, file: Path) -> None:
        """Download an object; `file` is then whole, or as it was.

        Raises:
            OSError: if it cannot be written here.
        """
        with replaced(file) as temporary, self._errors():
            self._system().get_file(f"{self._root}/{name}", str(temporary))
            temporary.touch()  # an empty object may leave no file

    def read(self, name: str) -> bytes:
        """The content of a small object."""
        with self._errors():
            return bytes(self._system().cat_file(f"{self._root}/{name}"))

    def remove(self, names: list[str]) -> None:
        with self._errors():
            if names:
                self._system().rm([f"{self._root}/{name}" for name in names])

    def _system(self) -> Any:
        import fsspec
        import fsspec.asyn

        # What becomes of a call is told here; what breaks beside it would be printed with a trace.
        fsspec.asyn.get_loop().set_exception_handler(_log_quietly)
        system = fsspec.filesystem(self._scheme, use_listings_cache=False, **_OPTIONS.get(self._scheme, {}))
        system.retries = 1  # their own, of s3fs and gcsfs
        return system

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
                raise
            told = without_credentials(one_line(error, limit=160))
            raise StoreError(
                told if isinstance(error, OSError) else f"{type(error).__name__}: {told}"
            ) from error


def _log_quietly(loop: Any, context: dict[str, Any]) -> None:
    logging.getLogger(__name__).debug("%s", context.get("message"), exc_info=context.get("exception"))


def _tag(about: dict[str, Any]) -> str:
    known = (about.get(each) for each in ("ETag", "etag", "md5Hash", "LastModified", "mtime", "updated"))
    return str(next(filter(None, known), ""))


@functools.cache
def fetched(address: str, flag: str, inside: tuple[str, ...] = ("",)) -> Path:
    """A copy on this machine of the file or folder at `address`, made once for each of its contents.

    Args:
        flag: that named it.
        inside: of a folder only what is named so, or lies below a folder of such a name.

    Raises:
        UserError: if there is nothing there, or it cannot be had.
    """
    check(address, flag)
    store = Store(address)
    try:
        found = {name: about for name, about in store.files().items() if _is_in(name, inside)}
        is_file = not found
        if is_file:
            parent, name = store.address.rsplit("/", 1)
            store = Store(parent)
            found = store.file(name)
        if not found:
            raise UserError(f"{flag} {address}: there is nothing")
        listed = sorted((name, about.bytes, about.tag) for name, about in found.items())
        content = hashlib.sha256(repr((store.address, listed)).encode()).hexdigest()[:16]
        folder = user_cache("remote") / f"{slug(address)}-{content}"
        if not folder.is_dir():
            size = sum(each.bytes for each in found.values())
            print(printable(f"note: copying {address} to {folder} ({sized(size, 1)})"), file=sys.stderr)
            with replaced_folder(folder, first_wins=True) as partial:
                for name in found:
                    store.get(name, partial / name)
        return folder / next(iter(found)) if is_file else folder
    except StoreError as error:
        raise UserError(f"{flag} {address}: cannot be read ({error})") from None
    except OSError as error:
        raise UserError(f"{flag} {address}: cannot be copied here ({error.strerror})") from None


def _is_in(name: str, inside: tuple[str, ...]) -> bool:
    return any(not each or name == each or name.startswith(f"{each}/") for each in inside)


def slug(address: str) -> str:
    """A folder's name that tells of `address`, and that no other address has."""
    readable = re.sub(r"[^A-Za-z0-9._]+", "-", address.partition(_MARK)[2]).strip("-.")[-60:]
    return f"{readable}-{hashlib.sha256(address.encode()).hexdigest()[:12]}"


def require_lasting_cache(address: str, flag: str) -> None:
    """Refuse where what is cached goes with the command."""
    if CACHE in os.environ:
        raise UserError(
            f"{flag} {address}: its local folder needs a place that stays, and the user's cache cannot be "
            "written: set XDG_CACHE_HOME"
        )
