"""Writing files that are whole or not there, whatever stops the process meanwhile."""

from __future__ import annotations

import contextlib
import enum
import fcntl
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from falcon_qlora.common.errors import UserError

# What this user's new files keep from others; to ask for it is to set it, which other threads would notice.
_UMASK = os.umask(0o077)
os.umask(_UMASK)
# In the names of folders that are on their way to another's place, or out of it.
_PARTIAL, _REPLACED = "-partial-", "-replaced-"


def user_cache(name: str) -> Path:
    """Where this user's files of a kind are kept between runs; the folder need not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "falcon_qlora" / name


def write_text(file: Path, text: str) -> None:
    """Write `file` whole or not at all."""
    with replaced(file) as temporary:
        # Bytes of a path that are no UTF-8 become what JSON and YAML read back as them.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(file: Path, record: Mapping[str, Any]) -> None:
    """Write `file` as indented JSON, whole or not at all; numbers that are not finite become null."""
    write_text(file, json.dumps(plain(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """Yield a path beside `file` that takes its place at the end, if anything was written there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.stem}-{os.getpid()}{file.suffix}")
    try:
        yield temporary
        if temporary.exists():
            flush(temporary)
            os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_folder(target: Path, *, first_wins: bool = False) -> Iterator[Path]:
    """Yield an empty folder that takes `target`'s place when the block ends without an error.

    Args:
        first_wins: several processes do so at once, each with the same: what one has put there stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    with _held_folder(f".{target.name}{_PARTIAL}", target.parent) as temporary:
        temporary.chmod(0o755)
        yield temporary
        put_in_place(temporary, target, first_wins=first_wins)


def put_in_place(filled: Path, target: Path, *, first_wins: bool = False) -> None:
    """Have a folder take `target`'s place beside it, once the disk holds all that is in it.

    Args:
        first_wins: leave what another process has put there meanwhile.
    """
    for path in filled.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~_UMASK)  # safetensors keeps its files from everybody else
        flush(path)
    if target.exists() and not first_wins:
        # A folder cannot replace a full one in one move: the old one steps aside first.
        with _held_folder(f".{target.name}{_REPLACED}", target.parent) as aside:
            try:
                os.replace(target, aside / target.name)
                os.replace(filled, target)
            except BaseException:
                if not target.exists():
                    os.replace(aside / target.name, target)
                raise
    else:
        try:
            os.replace(filled, target)
        except OSError:
            if not (first_wins and target.is_dir()):
                raise
    flush(target.parent)


def remove_leftovers(target: Path) -> None:
    """Remove what a process that was killed in `replaced_folder` has left beside `target`."""
    if not target.parent.is_dir():
        return
    ours = re.compile(rf"\.{re.escape(target.name)}({_PARTIAL}|{_REPLACED})\w{{8}}")
    for path in [path for path in target.parent.iterdir() if ours.fullmatch(path.name)]:
        with contextlib.suppress(OSError), _held(path):  # who lives still holds it
            if target.exists() or _PARTIAL in path.name:  # else it holds the only one there is
                shutil.rmtree(path, ignore_errors=True)


def flush(path: Path) -> None:
    """Have the disk hold `path`'s bytes before anything points to them.

    Raises:
        OSError: if the disk cannot, of a file.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if path.is_file():  # some network file systems refuse for folders; the rename is still ordered
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def _held_folder(prefix: str, parent: Path) -> Iterator[Path]:
    """A new folder, locked as long as this process lives, and removed at the end if it is still there."""
    with contextlib.ExitStack() as stack:
        while True:
            path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            with contextlib.suppress(OSError):  # some network file systems lock no folders
                stack.enter_context(_held(path, wait=True))
            if path.exists():  # else another process took it for a leftover before it was locked
                break
        stack.callback(shutil.rmtree, path, ignore_errors=True)
        yield path


@contextlib.contextmanager
def _held(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """A lock on `folder`, which ends with the process; an OSError where another has it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def try_to_write(folder: Path) -> None:
    """Raise an OSError if `folder`, or where it would be made, cannot be written."""
    with tempfile.TemporaryFile(dir=_nearest_existing(folder)):
        pass


def free_bytes(folder: Path) -> int:
    """What is free on the disk of `folder`, or of where it would be made."""
    return shutil.disk_usage(_nearest_existing(folder)).free


def _nearest_existing(folder: Path) -> Path:
    return next(each for each in (folder, *folder.absolute().parents) if each.exists())


def check_writable(file: Path, flag: str) -> None:
    """Refuse a file that cannot be written, before the work begins whose results it is for.

    Args:
        file: Which need not exist, nor its folder.
        flag: That named it.

    Raises:
        UserError: naming both.
    """
    try:
        if file.is_dir():
            raise UserError(f"{flag} {file}: this is a folder; name a file")
        if file.exists():
            with file.open("ab"):
                pass
        else:
            try_to_write(file.parent)
    except OSError as error:
        raise UserError(f"{flag} {file}: cannot write there ({error.strerror})") from None


def quoted(word: str) -> str:
    """`word` for a shell, on one line and in plain characters whatever it holds."""
    if word.isprintable():
        return shlex.quote(word)
    named = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "'": "\\'", "\\": "\\\\"}
    escaped = (
        named.get(sign)
        or (sign if sign.isprintable() else "".join(f"\\x{byte:02x}" for byte in os.fsencode(sign)))
        for sign in word
    )
    return f"$'{''.join(escaped)}'"


def sha256(file: Path) -> str:
    """The hash of a file's content, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def plain(value: Any) -> Any:
    """`value` in JSON's own types."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, bool | None):
        return value
    if isinstance(value, int | str):
        return int(value) if isinstance(value, int) else str(value)  # subclasses become the plain type
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # an array, a tensor, or a scalar of one
        return plain(value.tolist())
    return str(value)
