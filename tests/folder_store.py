"""An object store that is a folder, in place of S3: for tests of what happens when, without packages for S3.

Every process of a test sees the same one, by STORE in its environment. Files beside its objects steer it:
while GONE is there it does not answer, and an upload of the object that HELD names waits, with WAITING there.
What was asked of it is in `calls`, in the process that asked. As in S3 an object appears whole.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import fsspec


class UnreachableError(Exception):
    """As those of botocore, no OSError."""


class FolderStore(fsspec.AbstractFileSystem):
    protocol = "s3"
    calls: list[tuple[str, str]] = []

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)

    def _at(self, path: str, call: str = "") -> Path:
        folder = Path(os.environ["STORE"])
        if (folder / "GONE").exists():
            raise UnreachableError("Could not connect to the endpoint URL")
        if call:
            self.calls.append((call, path))
        return folder / "objects" / path

    def find(self, path: str, *args: Any, **kwargs: Any) -> Any:
        root = self._at("")
        files = [file for file in self._at(path).rglob("*") if file.is_file()]
        return {file.relative_to(root).as_posix(): self._about(file) for file in sorted(files)}

    def info(self, path: str, **kwargs: Any) -> Any:
        if not (file := self._at(path)).is_file():
            raise FileNotFoundError(path)
        return self._about(file)

    @staticmethod
    def _about(file: Path) -> dict[str, Any]:
        return {"size": file.stat().st_size, "ETag": str(file.stat().st_mtime_ns), "type": "file"}

    def put_file(self, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        file = self._at(rpath, "put")
        held = Path(os.environ["STORE"]) / "HELD"
        while held.exists() and rpath.endswith(held.read_text()):
            held.with_name("WAITING").touch()
            time.sleep(0.05)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(os.environ["STORE"]) / f"part-{os.getpid()}"
        shutil.copyfile(lpath, partial)
        partial.rename(file)

    def get_file(self, rpath: str, lpath: str, *args: Any, **kwargs: Any) -> None:
        shutil.copyfile(self._at(rpath, "get"), lpath)

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
        return self._at(path).read_bytes()

    def rm(self, path: Any, *args: Any, **kwargs: Any) -> None:
        for each in path:
            self._at(each, "rm").unlink()


def objects(store: Path) -> list[str]:
    """The names of all objects."""
    root = store / "objects"
    return sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file())


def register() -> None:
    """Have ``s3://`` mean this store in this process."""
    fsspec.register_implementation("s3", FolderStore, clobber=True)
