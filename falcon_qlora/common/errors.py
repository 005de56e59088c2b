"""Errors that a user can fix, as opposed to bugs, and the one-line messages for them."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
import threading
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

EXIT_USER_ERROR = 2
EXIT_BUG = 1
# Of a rank that has reported which rank hangs: the launcher then does not report the ranks it kills.
EXIT_HANGING = 3
# Of a rank that another one's death has ended: the launcher reports that one.
EXIT_BEREFT = 4
# Of a launcher whose run was asked to stop and has saved: start it again (EX_TEMPFAIL of sysexits.h).
EXIT_STOPPED = 75

_OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_URL = re.compile(r"://\S+")
# A longer line is cut: it shows a value from a file, of any length.
_LINE_LETTERS = 4000
_JOINERS = "\u200c\u200d"
_SECRET_IN_QUERY = re.compile(
    r"([?&][^=&]*(?:token|key|secret|signature|credential|password)[^=&]*=)[^&#'\"]*", re.I
)


class UserError(Exception):
    """Something the user can fix: the message says what is wrong, where, and what to do.

    A command prints only the message, once for all ranks, and exits with status 2. Passwords and keys are
    removed from URLs in it, as messages end up in logs. Of a value of any length its ends are shown. A line
    stays one line: what a file's name or a value in it has of line breaks is shown as its escape.

    Args:
        lines: of the message; mostly one.
    """

    def __init__(self, *lines: str):
        super().__init__(*(_cut(printable(without_credentials(line), keep="\t")) for line in lines))

    @property
    def lines(self) -> list[str]:
        return list(self.args)

    def __str__(self) -> str:
        return "\n".join(self.args)


class PanicError(Exception):
    """Native code of a library has panicked."""


@dataclass(frozen=True, eq=False)
class NativeWork:
    """A piece of work that others' native code does.

    Attributes:
        what: it does, and on which file.
    """

    what: str


# Thread → the work that it waits for.
_native: dict[int, NativeWork] = {}


@contextlib.contextmanager
def panics_as_errors(work: str = "") -> Iterator[None]:
    """Raise a `PanicError` for a panic of a Rust library, which is not an `Exception`.

    Args:
        work: what native code does in the block, and on which file: for this error, and for `native_work`.
    """
    thread = threading.get_ident()
    if work:
        _native[thread] = NativeWork(printable(work))
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # each library has its own, which cannot be imported
            raise
        where = f", {work}" if work else ""
        raise PanicError(f"native code of a library panicked{where}: {first_line(error)}") from error
    finally:
        if work:
            _native.pop(thread, None)


def native_work() -> list[NativeWork]:
    """What others' native code is doing, on any thread, as far as that is known."""
    return list(_native.copy().values())


@contextlib.contextmanager
def told_in_one_line() -> Iterator[None]:
    """Have a notebook show one line, without a traceback, for errors that `message_of` knows."""
    try:
        with panics_as_errors():
            yield
    except Exception as error:
        if told := message_of(error):
            error._render_traceback_ = lambda: [printable(told, keep="\n\t")]  # type: ignore[attr-defined]  # IPython calls it
        raise


@contextlib.contextmanager
def memory_advice(told: str) -> Iterator[None]:
    """Have `message_of` say what else to do where a GPU's memory runs out in the block."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            error.add_note(told)
        raise


def without_credentials(text: str) -> str:
    """`text` without the user names, passwords and keys in its URLs."""
    return _URL.sub(
        lambda url: _SECRET_IN_QUERY.sub(r"\1removed", re.sub(r"://[^/@]*@", "://", url[0])), text
    )


def _cut(line: str) -> str:
    half = _LINE_LETTERS // 2
    return line if len(line) <= _LINE_LETTERS else f"{line[:half]} … {line[-half:]}"


def message_of(error: Exception) -> str | None:
    """One line for an error of the user, a disk, a file, a GPU or native code; None for any other."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's: recognised by name, without importing torch
        asked = ". ".join(str(error).split(". ")[:2]).rstrip(".")
        advice = "".join(f", or {told}" for told in getattr(error, "__notes__", ()))
        return (
            f"error: {asked}: a GPU's memory ran out where the work cannot be done in smaller pieces. Free "
            f"memory on it{advice}"
        )
    if isinstance(error, UserError | PanicError):
        return f"error: {error}"
    if not isinstance(error, OSError) or not error.errno:
        return None
    if isinstance(error.filename, str | bytes):
        return f"error: {printable(os.fsdecode(error.filename))}: {error.strerror}"
    # The error of a failed write may not name its file; without any, ENOENT is of temporary folders.
    return f"error: {error.strerror}" if error.errno in (*_OF_A_DISK, errno.ENOENT) else None


def one_line(error: object, *, limit: int = 300) -> str:
    """The text of `error` on one line of at most `limit` characters; its class's name if it has no text."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def printable(text: str, *, keep: str = "") -> str:
    """`text` with every character that a reader cannot see, or that steers a terminal, written as its escape.

    Those are control characters, lone surrogates, line separators, and what is invisible or turns the
    direction of writing. Spaces of any kind and the joiners that scripts and emoji need stay.

    Args:
        keep: control characters that stay too.
    """
    if text.isprintable():
        return text
    return "".join(ascii(sign)[1:-1] if _is_hidden(sign) and sign not in keep else sign for sign in text)


def _is_hidden(sign: str) -> bool:
    return (
        not sign.isprintable()
        and sign not in _JOINERS
        and unicodedata.category(sign) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    )


def first_line(error: object, *, limit: int = 300) -> str:
    """The first line of the text of `error`, for errors whose other lines are advice to programmers.

    Where that line ends in a colon it says nothing alone, and the others follow it.
    """
    line, _, rest = str(error).strip().partition("\n")
    told = f"{line} {rest}" if line.rstrip().endswith(":") else line
    return one_line(told or type(error).__name__, limit=limit)


def reason_of(error: Exception, folder: Path | None = None) -> str:
    """Why something failed; for an OSError the system's message, such as ``No space left on device``.

    Args:
        folder: that was to be written: an error of a file in it is told with the file's name before.
    """
    why = getattr(error, "strerror", None) or one_line(error)
    file = getattr(error, "filename", None)
    if folder is not None and isinstance(file, str) and Path(file).parent == folder:
        return f"{Path(file).name}: {why}"
    return why


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean X?)"`` for the known name closest to `name`, or an empty string."""
    return _did_you_mean(_closest(name, known))


def nearest_path(path: Path) -> str:
    """As `nearest`, the path of what lies beside `path` with a name close to its own."""
    # By their stems, as names that share no more than .jsonl are not alike.
    names = [each.name for each in path.parent.glob("*") if _closest(path.stem, [each.stem])]
    close = _closest(path.name, names)
    return _did_you_mean([path.with_name(name) for name in close])


def _closest(name: str, known: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)


def _did_you_mean(close: Sequence[object]) -> str:
    return f" (did you mean {close[0]}?)" if close else ""
