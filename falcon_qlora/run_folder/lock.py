"""A lock on the run directory, so that two trainings never write into one.

The kernel gives it back however the process ends. It is a record lock: children do not inherit it, and it is
lost when any descriptor of its file is closed in the process that has it. So the file is opened once, and
nothing else here opens it.
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
from collections.abc import Callable
from pathlib import Path

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.untrusted import read_json

LOCK = ".lock"
_LOOK_SECONDS = 0.05
_TOLD_BYTES = 1000


class RunLock:
    """Taken by the main process of a training, given back at the end of the block.

    Args:
        say: prints a line to the user.
        patience_seconds: wait so long for a process that is on its way out.
    """

    def __init__(self, say: Callable[[str], None], *, patience_seconds: float = 0.5):
        self._say = say
        self._patience_seconds = patience_seconds
        self._file: Path | None = None
        self._handle: int | None = None

    def take(self, folder: Path) -> None:
        """Have `folder`, which is there, to ourselves; again for the same one does nothing.

        Where the file system has no locks the user is told so, and the run goes on.

        Raises:
            UserError: if another process trains there, saying which.
        """
        file = folder.resolve() / LOCK
        if self._handle is not None and self._file == file:
            return
        self.release()
        deadline = time.monotonic() + self._patience_seconds
        while not self._try(file):
            if time.monotonic() > deadline:
                raise UserError(
                    f"{folder}: {_holder(file)} is training there. Wait for it to end, or stop it (SIGTERM "
                    "has it save first), or name another folder with --output_dir"
                )
            time.sleep(_LOOK_SECONDS)

    def _try(self, file: Path) -> bool:
        """Whether we have the lock now, or go on without."""
        handle = None
        try:
            # A run's folder may come from anywhere: a link in it leads to no file that is emptied below.
            handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who had it may have removed the file between the two.
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
        now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        about = {"host": socket.gethostname(), "process": os.getpid(), "since": now}
        with contextlib.suppress(OSError):  # of a full disk; the lock holds all the same
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(about).encode(), 0)
        return True

    def release(self) -> None:
        """Let others train there."""
        if self._handle is None or self._file is None:
            return
        with contextlib.suppress(OSError):  # the folder may have turned read-only
            self._file.unlink()  # before the lock goes, so that never another's is removed
        os.close(self._handle)
        self._file = self._handle = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def _holder(file: Path) -> str:
    """The process that has the lock, as it told; what else may stand in the file is kept short."""
    try:
        told = read_json(file, limit_bytes=_TOLD_BYTES)
    except UserError:
        return "another process"
    values = (str(told.get(name))[:64] for name in ("process", "host", "since"))
    process, host, since = ("".join(filter(str.isprintable, value)) for value in values)
    return f"process {process} on {host} (since {since})"
