"""A lock on the run directory, so that two trainings never write into one.

The kernel releases it however the process ends. It is a record lock: children do not inherit it, and it is
lost when its process closes any descriptor of the file. So a process that has the lock opens the file once.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.untrusted import read_json

LOCK = ".lock"
_LOOK_SECONDS = 0.05
_TOLD_BYTES = 1000


class RunLock:
    """Taken by a run's main process, released at the end of the block.

    Args:
        say: prints a line to the user.
        patience_seconds: how long to wait for a process that is exiting.
    """

    def __init__(self, say: Callable[[str], None], *, patience_seconds: float = 0.5):
        self._say = say
        self._patience_seconds = patience_seconds
        self._file: Path | None = None
        self._handle: int | None = None

    def take(self, folder: Path) -> None:
        """Lock `folder`, which must exist; does nothing if it is locked by this object already.

        If the file system has no locks, this prints a warning and the run goes on.

        Raises:
            UserError: if another process trains there, naming it.
        """
        file = folder.resolve() / LOCK
        if self._handle is not None and self._file == file:
            return
        self.release()
        deadline = time.monotonic() + self._patience_seconds
        while not self._try(file):
            if time.monotonic() > deadline:
                told = "another process"
                with contextlib.suppress(UserError):
                    told = _named(read_json(file, limit_bytes=_TOLD_BYTES))
                raise UserError(
                    f"{folder}: {told} is training there. Wait for it to end, or stop it (SIGTERM "
                    "has it save first), or name another folder with --output_dir"
                )
            time.sleep(_LOOK_SECONDS)

    def _try(self, file: Path) -> bool:
        """Whether this process has the lock now, or goes on without."""
        handle = None
        try:
            # A run's folder may come from anywhere: the file is emptied below, so it must not be a link.
            handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous holder may have removed the file between open and lock.
            ours = file.exists() and os.path.samestat(os.fstat(handle), file.stat())
        except OSError as error:
            if handle is not None:
                os.close(handle)
            if handle is not None and error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            self._say(
                f"{file.parent} cannot be locked ({error.strerror}): make sure yourself that no other "
                "process trains there"
            )
            return True
        if not ours:
            os.close(handle)
            return False
        self._file, self._handle = file, handle
        left = _read(handle)
        if str(left.get("host", socket.gethostname())) != socket.gethostname():
            self._say(
                f"{file.parent}: took over the lock that {_named(left)} left; if it still trains there, on a "
                "file system without locks between hosts, stop one of the two"
            )
        now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        about = {"host": socket.gethostname(), "process": os.getpid(), "since": now}
        with contextlib.suppress(OSError):  # a full disk; the lock holds anyway
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(about).encode(), 0)
        return True

    def release(self) -> None:
        """Let others train there."""
        if self._handle is None or self._file is None:
            return
        with contextlib.suppress(OSError):  # the folder may have turned read-only
            self._file.unlink()  # before the lock is released, so that no other's is removed
        os.close(self._handle)
        self._file = self._handle = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def _read(handle: int) -> dict[str, Any]:
    """What the file says of its holder: anybody's content."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        told = json.loads(os.pread(handle, _TOLD_BYTES, 0))
        return told if isinstance(told, dict) else {}
    return {}


def _named(told: Mapping[str, Any]) -> str:
    """The process that the file tells of; other content of the file is kept short."""
    values = (str(told.get(name))[:64] for name in ("process", "host", "since"))
    process, host, since = ("".join(filter(str.isprintable, value)) for value in values)
    return f"process {process} on {host} (since {since})"
