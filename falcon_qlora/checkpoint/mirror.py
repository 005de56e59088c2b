"""A run's folder is copied to an address while training goes on.

    mirror = Mirror.of(directory, limit=2, goes_on=False)  # once the run has written its start
    missing = mirror.flush(60)                             # at the end: what could not be uploaded, or None

One thread looks at the folder; nothing waits for it. A store has no rename: a checkpoint or an adapter is
there once its manifest is, which is uploaded last and removed first. What an uploaded checkpoint replaces is
removed after it. Where the store does not answer, this is told once and tried again.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from falcon_qlora.checkpoint.manifest import MANIFEST
from falcon_qlora.common.by_url import MARK, are_no_runs, mark_of, steps_at, steps_here
from falcon_qlora.common.files import write_json
from falcon_qlora.common.stores import Store, StoreError
from falcon_qlora.processes import ranks
from falcon_qlora.run_folder.directory import RunDirectory
from falcon_qlora.terminal.console import note

_LOOK_SECONDS = 1.0
# Between two uploads of metrics and other records that change all the time.
_RECORDS_SECONDS = 60.0
_LONGEST_PAUSE_SECONDS = 60.0
_PAUSE_AT_END_SECONDS = 2.0
_LINKS = ".mirror-"
_OF_OTHERS = re.compile(r"checkpoints/(?!step-\d+/)")
# Before a flush says that it goes on.
_SILENT_SECONDS = 3.0
# What the trackers keep, and what is of this machine alone.
_NOT_COPIED = ("checkpoints", "tensorboard", "wandb", "flight_record")
_Sign = tuple[int, int]  # a file's size and its time of change


class _OthersError(Exception):
    """Another start of the run, or another run, has the address."""


class Mirror:
    """Copies a run's folder to its address, from now until the process ends.

    Args:
        directory: with an address.
        limit: how many checkpoints the run keeps; None: all.
        goes_on: whether the run goes on from a checkpoint: what else is at the address then stays.
        overwrite: a run at the address is replaced.
    """

    def __init__(self, directory: RunDirectory, *, limit: int | None, goes_on: bool, overwrite: bool = False):
        assert directory.address is not None
        self._directory, self._limit = directory, limit
        self._goes_on, self._overwrite = goes_on, overwrite
        self.store = Store(directory.address)
        # What is at the address: the sign of the file that was uploaded; None: not known.
        self._there: dict[str, _Sign | None] | None = None
        self._seen = self._at_start = set(steps_here(directory.path))  # steps that were here
        self._start = uuid.uuid4().hex
        self._lost: str | None = None
        self._failure: str | None = None
        self._uploaded_at: datetime.datetime | None = None
        self._records_at = -_RECORDS_SECONDS
        self._asked = self._done = 0
        self._changed = threading.Condition()
        self._write_mark()
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    @classmethod
    def of(cls, directory: RunDirectory, **how: Any) -> Mirror | None:
        """The mirror of a run that has an address, on the main process; else None."""
        return cls(directory, **how) if directory.address is not None and ranks.is_main_process() else None

    def flush(self, patience_seconds: float, *, hurry: bool = False) -> str | None:
        """Upload what is missing; on the main thread, once the folder no longer changes.

        Args:
            patience_seconds: without anything being uploaded; with `hurry`, at all.

        Returns:
            What is missing at the address, and why; None if nothing is.
        """
        with self._changed:
            self._asked += 1
            wanted, uploaded = self._asked, self._uploaded_at
            self._changed.notify_all()
            began, told = time.monotonic(), False
            deadline = began + patience_seconds
            while self._done < wanted and self._lost is None:
                if not hurry and self._uploaded_at != uploaded:
                    uploaded, deadline = self._uploaded_at, time.monotonic() + patience_seconds
                if time.monotonic() > deadline:
                    break
                if not told and time.monotonic() - began > _SILENT_SECONDS:
                    told = True
                    note(f"uploading for up to {patience_seconds:.0f} s: {self._missing()}")
                self._changed.wait(0.2)
        if self._done >= wanted:
            return None
        why = self._lost or self._failure or f"no time for more than {patience_seconds:.0f} s"
        return f"{self._missing()} ({why})"

    def stop(self) -> None:
        """End the thread, once its pass is over."""
        self._lost = "stopped"
        self._thread.join()

    def _write_mark(self) -> None:
        file = self._directory.path / MARK
        run = mark_of(file.read_bytes).get("run") if self._goes_on else None
        self._run = run if isinstance(run, str) else uuid.uuid4().hex
        self._mark = {"run": self._run, "start": self._start, "host": socket.gethostname()}
        with contextlib.suppress(OSError):  # a full disk
            write_json(file, self._mark)

    def _missing(self) -> str:
        there = self._there or {}
        lacks = [f"step-{step}" for step in steps_here(self._directory.path) if step not in steps_at(there)]
        others = dict.fromkeys(
            name.split("/")[0] for name, file in self._records() if there.get(name) != _sign_of(file)
        )
        return f"{self._directory.address} lacks {', '.join([*lacks, *others]) or 'nothing'}"

    def _work(self) -> None:
        pause = _LOOK_SECONDS
        while self._lost is None:
            with self._changed:
                if self._asked == self._done:
                    self._changed.wait(pause)
                else:
                    self._changed.wait(min(pause, _PAUSE_AT_END_SECONDS) if self._failure else 0)
                asked = self._asked
            try:
                self._pass(at_end=asked > self._done)
            except _OthersError as error:
                self._lost = str(error)
                told = f"{self.store.address}: {error}. Nothing more is uploaded"
                note(f"{told}; the run is in {self._directory}")
            except FileNotFoundError:
                pass  # replaced meanwhile: the next pass finds the new ones
            except StoreError as error:
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                self._failed(str(error))
            except Exception as error:  # of this disk, or what nobody has foreseen: the run goes on
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                self._failed(f"{type(error).__name__}: {error}")
            else:
                pause = _LOOK_SECONDS
                self._succeeded()
                with self._changed:
                    self._done = asked
                    self._changed.notify_all()

    def _failed(self, why: str) -> None:
        told, self._failure = self._failure is not None, why
        if not told:
            since = f"since {self._uploaded_at:%H:%M:%S}" if self._uploaded_at else "yet"
            note(
                f"{self.store.address}: nothing could be uploaded {since} ({why}). "
                + ("The run is" if self._asked else "The training goes on,")
                + f" in {self._directory}; what is missing is uploaded once the store answers"
            )

    def _succeeded(self) -> None:
        if self._failure is not None:
            note(f"{self.store.address} answers again: nothing is missing there")
        self._failure = None

    def _pass(self, *, at_end: bool) -> None:
        """Bring the address to the state of the folder."""
        if self._there is None:
            self._there = self._claim()
        steps = steps_here(self._directory.path)
        self._seen = self._seen.union(steps)
        for step in reversed(steps):  # the newest is what a resume needs
            if not self._is_there(step):
                self._upload(step)
        if at_end or time.monotonic() - self._records_at > _RECORDS_SECONDS:
            self._put_records()
        self._prune()

    def _claim(self) -> dict[str, _Sign | None]:
        """What is at the address, once it is this start's."""
        for left in self._directory.path.glob(f"{_LINKS}*"):
            shutil.rmtree(left, ignore_errors=True)
        there: dict[str, _Sign | None] = dict.fromkeys(self.store.files())
        theirs = mark_of(lambda: self.store.read(MARK)).get("run") if MARK in there else None
        if self._goes_on:
            if theirs not in (None, self._run):
                raise _OthersError("another run is there by now")
            self._put(MARK, self._directory.path / MARK)
            for step in set(steps_at(there)) & set(steps_here(self._directory.path)):
                self._take_as_uploaded(there, step)
            return there
        if steps_at(there) and not self._overwrite and theirs != self._run:
            raise _OthersError("another run is there by now")
        if are_no_runs(there):
            raise _OthersError("things with the names of a run's are there, and no run")
        ours = self._directory.names()  # the mark stays until the new one takes its place
        earlier = [name for name in there if name.split("/")[0] in ours and not _OF_OTHERS.match(name)]
        self._remove(earlier, there)
        self._put(MARK, self._directory.path / MARK)
        return there

    def _take_as_uploaded(self, there: dict[str, _Sign | None], step: int) -> None:
        """Spare what an earlier start has uploaded, whose checksums the manifest has."""
        folder = self._directory.checkpoints / f"step-{step}"
        with contextlib.suppress(FileNotFoundError):
            if self.store.read(f"checkpoints/{folder.name}/{MANIFEST}") == (folder / MANIFEST).read_bytes():
                files = {f"checkpoints/{folder.name}/{name}": file for name, file in _files_of(folder)}
                there.update({name: _sign_of(file) for name, file in files.items() if name in there})

    def _is_there(self, step: int) -> bool:
        assert self._there is not None
        name = f"checkpoints/step-{step}/{MANIFEST}"
        sign = _sign_of(self._directory.path / name)
        return sign is None or self._there.get(name) == sign

    def _upload(self, step: int) -> None:
        assert self._there is not None
        with self._held(self._directory.checkpoints / f"step-{step}") as folder:
            theirs = mark_of(lambda: self.store.read(MARK))
            if theirs.get("start") != self._start:
                raise _OthersError(
                    f"another start of the run uploads there, on {str(theirs.get('host'))[:64]!r}"
                )
            *files, (_, manifest) = _files_of(folder)
            top = f"checkpoints/step-{step}"
            if f"{top}/{MANIFEST}" in self._there:
                self._remove([f"{top}/{MANIFEST}"], self._there)
            for name, file in files:
                self._put_changed(f"{top}/{name}", file)
            self._put_records()  # metrics up to this step
            self._put_changed(f"{top}/{MANIFEST}", manifest)

    @contextlib.contextmanager
    def _held(self, checkpoint: Path) -> Iterator[Path]:
        """The checkpoint's files, which stay while they are uploaded: the run may have removed it by then."""
        links = self._directory.path / f"{_LINKS}{checkpoint.name}"
        try:
            links.mkdir()
            for name, file in _files_of(checkpoint):
                (links / name).parent.mkdir(parents=True, exist_ok=True)
                os.link(file, links / name)
            yield links
        except FileNotFoundError:
            raise
        except OSError:
            if links.is_dir() and any(links.rglob(MANIFEST)):
                raise
            yield checkpoint  # a file system without links
        finally:
            shutil.rmtree(links, ignore_errors=True)

    def _records(self) -> Iterator[tuple[str, Path]]:
        for path in self._directory.contents():
            if path.name in _NOT_COPIED:
                continue
            if path.is_dir():
                yield from ((f"{path.name}/{name}", file) for name, file in _files_of(path))
            else:
                yield path.name, path

    def _put_records(self) -> None:
        assert self._there is not None
        records = list(self._records())
        manifest = f"adapter/{MANIFEST}"
        if manifest in self._there and any(
            name == manifest and self._there[name] != _sign_of(file) for name, file in records
        ):
            self._remove([manifest], self._there)
        for name, file in records:
            self._put_changed(name, file)
        self._records_at = time.monotonic()

    def _put_changed(self, name: str, file: Path) -> None:
        assert self._there is not None
        sign = _sign_of(file)
        if sign != self._there.get(name):
            self._put(name, file)
            self._there[name] = sign

    def _put(self, name: str, file: Path) -> None:
        self.store.put(file, name)
        self._uploaded_at = datetime.datetime.now()

    def _prune(self) -> None:
        """Remove what the run no longer keeps, once its newest checkpoint is at the address."""
        assert self._there is not None
        here = steps_here(self._directory.path)
        if not here or not all(map(self._is_there, here)):
            return
        whole = steps_at(self._there)
        elsewhere = sorted(_steps_of(self._there) - set(here))  # of earlier starts, or removed here meanwhile
        spare = len(whole) - self._limit if self._limit else 0
        for step in elsewhere:
            replaced = step > here[-1] and here[-1] not in self._at_start
            if step in self._seen or step not in whole or replaced or spare > 0:
                top = f"checkpoints/step-{step}/"
                self._remove([name for name in self._there if name.startswith(top)], self._there)
                spare -= step in whole

    def _remove(self, names: list[str], there: dict[str, _Sign | None]) -> None:
        """Remove these, manifests first: what is left of a checkpoint is none."""
        manifests = [name for name in names if name.endswith(f"/{MANIFEST}")]
        for some in (manifests, [name for name in names if name not in manifests]):
            self.store.remove(some)
            for name in some:
                there.pop(name, None)


def _files_of(folder: Path) -> list[tuple[str, Path]]:
    """The files of a checkpoint or an adapter by name, its manifest last."""
    found = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    if not found:
        raise FileNotFoundError(folder)
    return [
        *((name, file) for name, file in found.items() if name != MANIFEST),
        (MANIFEST, folder / MANIFEST),
    ]


def _steps_of(names: Any) -> set[int]:
    numbers = (
        name.split("/")[1].removeprefix("step-") for name in names if name.startswith("checkpoints/step-")
    )
    return {int(number) for number in numbers if number.isdecimal()}


def _sign_of(file: Path) -> _Sign | None:
    """What changes with a file's content; None where there is no file."""
    try:
        about = file.stat()
    except FileNotFoundError:
        return None
    return about.st_size, about.st_mtime_ns
