"""Read text files, compressed or not, in UTF-8 or with the byte order mark of another encoding."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import itertools
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from falcon_qlora.common.errors import UserError, one_line, reason_of
from falcon_qlora.common.files import quoted

BYTE_ORDER_MARK = "\ufeff"
LONGEST = 1 << 26
_CHUNK_BYTES = 1 << 16
_EXCERPT = 20
TOO_LONG = f"line or value too large (limit {LONGEST:,} characters); not a valid row"

# Tried in this order, as UTF-32's mark begins with UTF-16's.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def _zstd(path: Path) -> Any:
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))


class _Streams(io.RawIOBase):
    """Decompresses concatenated streams. Python's own readers ignore damage after the first stream.

    Args:
        path: of the file.
        decompressor: makes a decompressor for one stream.
        padding: bytes that may stand between streams.
    """

    def __init__(self, path: Path, decompressor: Callable[[], Any], padding: bytes = b""):
        self._file = path.open("rb")
        self._new, self._padding = decompressor, padding
        self._one = decompressor()

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            given = b""
            if self._one.eof:
                given = self._one.unused_data.lstrip(self._padding)
                while not given:
                    if not (chunk := self._file.read(_CHUNK_BYTES)):
                        return 0
                    given = chunk.lstrip(self._padding)
                self._one = self._new()
            elif self._one.needs_input and not (given := self._file.read(_CHUNK_BYTES)):
                raise EOFError("it ends before its end is marked")
            data = self._one.decompress(given, len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _bzip2(path: Path) -> Any:
    return io.BufferedReader(_Streams(path, bz2.BZ2Decompressor))


def _xz(path: Path) -> Any:
    return io.BufferedReader(_Streams(path, lzma.LZMADecompressor, padding=b"\0"))


_Opener = Callable[[Path], Any]  # opens a stream of bytes that has `peek`
_OPENERS: dict[str, tuple[str, _Opener]] = {
    ".gz": ("gzip", gzip.open),
    ".bz2": ("bzip2", _bzip2),
    ".xz": ("xz", _xz),
    ".zst": ("zstd", _zstd),
}
_BEGINNINGS = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\0", ".zst": b"\x28\xb5\x2f\xfd"}
COMPRESSED = tuple(_OPENERS)
# Files of other kinds, by their beginnings, which are often named as if they held rows of text.
_OTHER_KINDS = {
    "a workbook of Excel or a zip archive; save its sheet as CSV in UTF-8, or unpack it": b"PK\x03\x04",
    "Parquet; let its name end with .parquet": b"PAR1",
}


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """Open `path` for reading, decompressed and without its byte order mark."""
    _, opener = _opener_of(path)
    handle = opener(path)
    try:
        return io.TextIOWrapper(handle, encoding=_encoding(handle), newline=newline)
    except BaseException:
        handle.close()
        raise


def encoding_of(path: Path) -> str:
    """The file's encoding: ``utf-8-sig``, or what its first bytes say."""
    with open_text(path) as handle:
        return handle.encoding


@contextlib.contextmanager
def told_with_file(path: Path) -> Iterator[None]:
    """Turn what reading `path` raises into a `UserError` that names the file."""
    compression, _ = _opener_of(path)
    try:
        yield
    except UnicodeDecodeError:
        if not compression and (suffix := _meant(path, _BEGINNINGS)) is not None:
            raise UserError(f"{path}: compressed; name it {path.name}{suffix}") from None
        if (other := _meant(path, _OTHER_KINDS)) is not None:
            raise UserError(f"{path}: by its content {other}") from None
        raise _not_text(path) from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        # Without an errno, the error comes from the decompressor, not from the system.
        if not isinstance(error, OSError) or (compression and error.errno is None):
            raise _damaged(path, compression, error) from None
        raise UserError(f"{path}: cannot be read: {reason_of(error)}") from None


def lines(path: Path, handle: TextIO) -> Iterator[str]:
    """Yield the lines of a file; a line of `LONGEST` characters is an error.

    A byte order mark at a line's beginning, as in the middle of files that were joined, is left out.
    """
    for number in itertools.count(1):
        line = handle.readline(LONGEST)
        if len(line) == LONGEST:
            raise UserError(f"{path}:{number}: {TOO_LONG}")
        if not line:
            return
        yield line.removeprefix(BYTE_ORDER_MARK)


def _meant(path: Path, beginnings: Mapping[str, bytes]) -> str | None:
    """The kind of file whose first bytes this one has; None if none of them."""
    with path.open("rb") as handle:
        start = handle.read(6)
    return next((kind for kind, mark in beginnings.items() if start.startswith(mark)), None)


def _damaged(path: Path, compression: str, error: Exception) -> UserError:
    """The error for a compressed file that cannot be read: it is of another kind, or damaged."""
    suffix, meant = path.suffix.lower(), _meant(path, _BEGINNINGS)
    if meant != suffix:
        return UserError(f"{path}: no {compression} file by its content; name it {path.stem}{meant or ''}")
    return UserError(
        f"{path}: damaged {compression} file: {one_line(error)}; copy or download it again, or compress its "
        "content anew"
    )


def _not_text(path: Path) -> UserError:
    """The error for a file that is not in its encoding: where it fails, and which encoding it may be in."""
    compression, opener = _opener_of(path)
    line, before = 1, ""
    told, encoding = "convert it from the encoding that it was saved in", "ENCODING"
    with opener(path) as handle:
        decoder = codecs.getincrementaldecoder(_encoding(handle))()
        try:
            while chunk := handle.read(_CHUNK_BYTES):
                before = decoder.decode(chunk)
                line += before.count("\n")
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            name, same_chunk = error.encoding.upper(), error.object[: error.start].decode(error.encoding)
            line, before = line + same_chunk.count("\n"), before + same_chunk
            after = (error.object[error.start :] + handle.read(_EXCERPT)).splitlines()[0][:_EXCERPT]
    with contextlib.suppress(UnicodeDecodeError):
        # Text that is not UTF-8 is mostly in this encoding; the excerpt lets the user check.
        shown = before.rpartition("\n")[2][-_EXCERPT:] + after.decode("cp1252")
        if name == "UTF-8":
            told, encoding = (
                f"as Windows-1252 it reads {shown!r}. If that is right, convert it",
                "WINDOWS-1252",
            )
    files = f"{quoted(str(path))} > {quoted(f'utf8-{path.name}')}"
    if compression:
        told, files = f"unpack it; {told}", "FILE > NEW"
    return UserError(f"{path}:{line}: not text in {name}; {told}: iconv -f {encoding} -t UTF-8 {files}")


def _opener_of(path: Path) -> tuple[str, _Opener]:
    return _OPENERS.get(path.suffix.lower(), ("", lambda path: path.open("rb")))


def _encoding(handle: Any) -> str:
    start = handle.peek(4)[:4]
    if start[:1] != start[1:2] and b"\0" in start[:2]:  # an ASCII letter in UTF-16 without a byte order mark
        return "utf-16-be" if start[:1] == b"\0" else "utf-16-le"
    return next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8-sig")
