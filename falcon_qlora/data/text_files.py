"""Text files as they come: compressed or not, in UTF-8 or with the mark of another encoding."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import itertools
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from falcon_qlora.common.errors import UserError, one_line, reason_of

LONGEST = 1 << 26
TOO_LONG = f"a line or value of more than {LONGEST:,} characters: this is no row"

# In the order in which they are tried: UTF-32's mark begins with UTF-16's.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def _zstd(path: Path) -> Any:
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))


_Opener = Callable[[Path], Any]  # of bytes, with `peek`
_OPENERS: dict[str, tuple[str, _Opener]] = {
    ".gz": ("gzip", gzip.open),
    ".bz2": ("bzip2", bz2.open),
    ".xz": ("xz", lzma.open),
    ".zst": ("zstd", _zstd),
}
COMPRESSED = tuple(_OPENERS)


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """Open `path` for reading, with its compression and its byte order mark taken off."""
    _, opener = _opener_of(path)
    handle = opener(path)
    try:
        return io.TextIOWrapper(handle, encoding=_encoding(handle), newline=newline)
    except BaseException:
        handle.close()
        raise


def encoding_of(path: Path) -> str:
    """``utf-8-sig`` or what the file's byte order mark says."""
    with open_text(path) as handle:
        return handle.encoding


@contextlib.contextmanager
def told_with_file(path: Path) -> Iterator[None]:
    """What reading `path` raises becomes an error of the user's, which names the file."""
    compression, _ = _opener_of(path)
    try:
        yield
    except UnicodeDecodeError as error:
        encoding = error.encoding.upper()
        raise UserError(
            f"{path}: not text in {encoding} ({error.reason}); convert it, for example with iconv"
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: damaged {compression} file: {error}") from None
    except OSError as error:
        if compression and error.errno is None:  # not of the system, but of what decompresses
            raise UserError(f"{path}: damaged {compression} file: {one_line(error)}") from None
        raise UserError(f"{path}: cannot be read: {reason_of(error)}") from None


def lines(path: Path, handle: TextIO) -> Iterator[str]:
    """The lines of a file, which is no text where one has no end."""
    for number in itertools.count(1):
        line = handle.readline(LONGEST)
        if len(line) == LONGEST:
            raise UserError(f"{path}:{number}: {TOO_LONG}")
        if not line:
            return
        yield line


def _opener_of(path: Path) -> tuple[str, _Opener]:
    return _OPENERS.get(path.suffix.lower(), ("", lambda path: path.open("rb")))


def _encoding(handle: Any) -> str:
    start = handle.peek(4)[:4]
    return next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8-sig")
