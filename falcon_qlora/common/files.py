"""Atomic writes: a file or folder is complete or absent, whatever stops the process meanwhile."""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from falcon_qlora.common.errors import UserError, first_line

# Read once, here: the umask can only be read by setting it, which other threads would notice.
_UMASK = os.umask(0o077)
os.umask(_UMASK)
_HASHED_AT_ONCE = 2**22
# In the names of temporary folders: one that will replace another, and one that was replaced.
_PARTIAL, _REPLACED = "-partial-", "-replaced-"
_TEMPORARY = "falcon-qlora-"
# How an error of the system ends in one of Rust: "I/O error: File too large (os error 27)".
_OF_RUST = re.compile(r"\(os error (\d+)\)")
_own: list[Path] = []


CACHE = "FALCON_QLORA_CACHE"  # set by the launcher where the user's own cache cannot be written


def user_cache(name: str) -> Path:
    """The folder for this user's files of one kind, kept between runs; it need not exist.

    Raises:
        UserError: if the user has no home folder.
    """
    base = os.environ.get(CACHE) or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(base).expanduser() / "falcon_qlora" / name
    except RuntimeError:
        raise UserError("this user has no home folder for caches: set HOME, or XDG_CACHE_HOME") from None


def write_text(file: Path, text: str) -> None:
    """Write `file` whole or not at all."""
    with replaced(file) as temporary:
        # Bytes of a path that are not UTF-8 are written as escapes that JSON and YAML read back.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(file: Path, record: Mapping[str, Any]) -> None:
    """Write `file` as indented JSON, whole or not at all; non-finite numbers become null."""
    write_text(file, json.dumps(plain(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """Yield a path beside `file`, which replaces `file` at the end if anything was written to it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.stem}-{os.getpid()}{file.suffix}")
    try:
        with _named(file, temporary):
            yield temporary
            if temporary.exists():
                flush(temporary)
                os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _named(target: Path, temporary: Path) -> Iterator[None]:
    """Name `target` in a system's error that names no file; `temporary` becomes it, as do files in there."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            file = Path(str(error.filename or temporary))
            if file.is_relative_to(temporary):
                error.filename = str(target / file.relative_to(temporary))
        raise


@contextlib.contextmanager
def disk_errors(file: Path) -> Iterator[None]:
    """Have what libraries raise on a full or failing disk be an OSError that names the file.

    Args:
        file: what native code writes in the block, whose errors name none. What Python writes there besides
            is found by itself.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = _open_file(error)
        raise
    except Exception as error:
        from safetensors import SafetensorError

        # The tokenizers library has no error class of its own.
        if not isinstance(error, SafetensorError) and type(error) is not Exception:
            raise
        number = _OF_RUST.search(str(error))
        told = os.strerror(int(number[1])) if number else first_line(error)
        raise OSError(int(number[1]) if number else 0, told, str(file)) from error


def _open_file(error: OSError) -> str | None:
    """The file that was being written where an error arose: the innermost that a function holds open."""
    for frame, _ in reversed([*traceback.walk_tb(error.__traceback__)]):
        for held in frame.f_locals.values():
            if isinstance(held, io.TextIOWrapper | io.BufferedWriter):
                return str(held.name)
    return None


@contextlib.contextmanager
def replaced_folder(target: Path, *, first_wins: bool = False) -> Iterator[Path]:
    """Yield an empty folder, which replaces `target` when the block ends without an error.

    Args:
        first_wins: several processes write the same content at once: the first one's stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    with _held_folder(f".{target.name}{_PARTIAL}", target.parent) as temporary:
        temporary.chmod(0o755)
        with _named(target, temporary):
            yield temporary
        put_in_place(temporary, target, first_wins=first_wins)


@contextlib.contextmanager
def temporary_files() -> Iterator[None]:
    """Within the block, the temporary directory is a folder of its own, for started processes too.

    What libraries leave there goes with the block, or after a SIGKILL with the next such block. Compiled
    code, which torch keeps in the temporary directory, goes to the user's cache. A process that was started
    in such a block uses the block's.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, UserError):  # whatever needs these folders will say so
            if not re.fullmatch(rf"{_TEMPORARY}\w{{8}}", Path(tempfile.gettempdir()).name):
                stack.callback(_use_for_temporary_files, os.environ.get("TMPDIR"))
                folder = stack.enter_context(temporary_folder())
                _use_for_temporary_files(str(folder))
                _own.append(folder)
                stack.callback(_own.clear)
                compiled = user_cache("kernels") / "inductor"
                if os.access(nearest_existing(compiled), os.W_OK):
                    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled))
        yield


def remove_temporary_files() -> None:
    """Remove the folder of `temporary_files` before this process ends at once."""
    for folder in _own:
        shutil.rmtree(folder, ignore_errors=True)


def _use_for_temporary_files(folder: str | None) -> None:
    tempfile.tempdir = None  # to be looked up again
    if folder is None:
        os.environ.pop("TMPDIR", None)
    else:
        os.environ["TMPDIR"] = folder


@contextlib.contextmanager
def temporary_folder(parent: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder for temporary files, which the block's end removes.

    What processes that were killed left of theirs is removed before.

    Args:
        parent: where it is made; None: where the system has such folders.
    """
    parent = parent or Path(tempfile.gettempdir())
    for left in parent.glob(f"{_TEMPORARY}????????"):
        with contextlib.suppress(OSError), _held(left):  # a live process still holds its lock
            if left.lstat().st_uid == os.getuid():  # root could remove those of others, too
                shutil.rmtree(left, ignore_errors=True)
    with _held_folder(_TEMPORARY, parent) as folder:
        yield folder


def put_in_place(filled: Path, target: Path, *, first_wins: bool = False) -> None:
    """Rename a folder to `target` beside it, once its contents are flushed to disk.

    Args:
        first_wins: keep what another process has put there meanwhile.
    """
    for path in filled.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~_UMASK)  # safetensors lets nobody else read its files
        flush(path)
    if target.exists() and not first_wins:
        # A rename cannot replace a folder that is not empty: the old one is moved aside first.
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
    """Remove what a process killed in `replaced_folder` left beside `target`."""
    if not target.parent.is_dir():
        return
    ours = re.compile(rf"\.{re.escape(target.name)}({_PARTIAL}|{_REPLACED})\w{{8}}")
    for path in [path for path in target.parent.iterdir() if ours.fullmatch(path.name)]:
        with contextlib.suppress(OSError), _held(path):  # a live process still holds its lock
            if target.exists() or _PARTIAL in path.name:  # else it holds the only copy
                shutil.rmtree(path, ignore_errors=True)


def being_written(target: Path) -> tuple[Path, bool] | None:
    """The folder that another process fills in `replaced_folder` for it, if any, and whether a lock says so.

    Without one, a killed process may have left it: some network file systems cannot lock folders. Where they
    can, what killed ones left is removed here.
    """
    remove_leftovers(target)
    begins = f".{target.name}{_PARTIAL}"
    beside = [*target.parent.iterdir()] if target.parent.is_dir() else []
    for path in (path for path in beside if path.name.startswith(begins)):
        try:
            with _held(path):
                return path, False
        except FileNotFoundError:  # its process has ended meanwhile
            continue
        except OSError as error:
            return path, error.errno == errno.EWOULDBLOCK
    return None


def flush(path: Path) -> None:
    """Flush `path` to disk before anything points to it.

    Raises:
        OSError: if that fails for a file; for a folder it is ignored.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if path.is_file():  # some network file systems cannot flush folders; the rename is still ordered
            error.filename = str(path)
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def _held_folder(prefix: str, parent: Path) -> Iterator[Path]:
    """A new folder, locked until the block or this process ends; the block's end removes it if it exists."""
    with contextlib.ExitStack() as stack:
        while True:
            path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            with contextlib.suppress(OSError):  # some network file systems cannot lock folders
                stack.enter_context(_held(path, wait=True))
            if path.exists():  # else another process removed it as a leftover before it was locked
                break
        stack.callback(shutil.rmtree, path, ignore_errors=True)
        yield path


@contextlib.contextmanager
def _held(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Lock `folder`; the lock ends with the process. Without `wait`, an OSError if another holds it."""
    # Elsewhere's link would lead to another folder, and a pipe wait for a writer.
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def try_to_write(folder: Path) -> None:
    """Raise an OSError if `folder`, or the folder in which it would be made, is not writable."""
    with tempfile.TemporaryFile(dir=nearest_existing(folder)):
        pass


def free_bytes(folder: Path) -> int:
    """The free space on the disk of `folder`, or of the folder in which it would be made."""
    return shutil.disk_usage(nearest_existing(folder)).free


def nearest_existing(folder: Path) -> Path:
    """The folder itself, or the nearest one around it that exists."""
    return next(each for each in (folder, *folder.absolute().parents) if each.exists())


def check_writable(file: Path, flag: str, *, whole: bool = False) -> None:
    """Refuse an output file that cannot be written, before the work begins.

    Args:
        file: it need not exist, nor its folder.
        flag: the one that named it.
        whole: it is written as by `write_text`, which puts another in its place.

    Raises:
        UserError: naming both.
    """
    try:
        if file.is_dir():
            raise UserError(f"{flag} {file}: this is a folder; name a file")
        if whole and file.exists() and not file.is_file():
            raise UserError(f"{flag} {file}: this is no file that can be replaced; name another")
        if file.exists() and not whole:
            with file.open("ab"):
                pass
        else:
            try_to_write(file.parent)
    except OSError as error:
        raise UserError(f"{flag} {file}: cannot write there ({error.strerror}); name another file") from None


def quoted(word: str) -> str:
    """`word` quoted for a shell, on one line and in printable characters."""
    if word.isprintable():
        return shlex.quote(word)
    named = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "'": "\\'", "\\": "\\\\"}
    escaped = (
        named.get(sign)
        or (sign if sign.isprintable() else "".join(f"\\x{byte:02x}" for byte in os.fsencode(sign)))
        for sign in word
    )
    return f"$'{''.join(escaped)}'"


def sha256(file: Path, start: int = 0, length: int | None = None) -> str:
    """The hash of a file's content in hexadecimal, or of `length` bytes of it from `start`."""
    digest, left = hashlib.sha256(), length
    # Large pieces: between two of them it waits for Python's lock, which training holds most of the time.
    piece = memoryview(bytearray(min(_HASHED_AT_ONCE, max(file.stat().st_size, 1))))
    with file.open("rb", buffering=0) as opened:
        opened.seek(start)
        while left != 0 and (count := opened.readinto(piece if left is None else piece[:left])):
            digest.update(piece[:count])
            left = left if left is None else left - count
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """`value` converted to JSON's own types."""
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
