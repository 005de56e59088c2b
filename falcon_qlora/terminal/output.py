"""Standard output and error: a command's first line, and what its streams do with what they are given.

Foreign text (rows, file names, keys, others' errors) may hold escape sequences, and characters that an
encoding lacks; a disk may be full, and a pipe closed. The streams see to all of it, so that no message must.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

from falcon_qlora.common.errors import printable

# What `tqdm` writes to move its bar, a write of its own each.
_BAR = re.compile(r"\r[^\x00-\x1f\x7f-\x9f]*|(\n|\x1b\[A)+")


def say_loading(*, aside: bool = False) -> None:
    """Print at once that libraries are being loaded, which takes seconds.

    Args:
        aside: print on standard error, for a command whose results go to standard output.
    """
    print("loading libraries …", file=sys.stderr if aside else sys.stdout, flush=True)


# How a stream may treat characters that its encoding lacks so that it raises; the second in a C locale.
_MAY_FAIL = ("strict", "surrogateescape")


class _Shown:
    """A stream that writes what steers a terminal, or is hidden there, as escapes.

    Rich, whose own sequences must pass, writes to the stream below: it looks for this attribute.
    """

    def __init__(self, stream: TextIO):
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        below = self.rich_proxied_file
        below.write(text if _BAR.fullmatch(text) else printable(text, keep="\n\t"))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


@contextlib.contextmanager
def shown_as_text() -> Iterator[None]:
    """Within the block, standard output and error write every text, whatever it holds, as text.

    An error of standard output names it, and standard error drops what cannot be written.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _standard_output(drops=False), _standard_error()
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = before


def below(stream: TextIO) -> TextIO:
    """The stream that `stream` writes to, past what escapes or redirects."""
    while (proxied := getattr(stream, "rich_proxied_file", None)) is not None:
        stream = proxied
    return stream


def _shown(stream: TextIO) -> TextIO:
    if isinstance(stream, io.TextIOWrapper) and stream.errors in _MAY_FAIL:
        stream.reconfigure(errors="backslashreplace")
    return cast(TextIO, _Shown(stream))


class _Named(io.FileIO):
    """Standard output, by whose name its errors go: of a full disk, it is not the run's."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename, error.strerror = "standard output", f"cannot be written ({error.strerror})"
            raise


class _Lossy(io.FileIO):
    """A file that drops what cannot be written: on a full disk, or to a pipe without a reader."""

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        return memoryview(data).nbytes if written is None else written


class _Standard(io.TextIOWrapper):
    """Standard output or error, written to by one of the above."""


def drop_what_cannot_be_written() -> None:
    """Have this process's standard output and error drop what cannot be written, instead of raising.

    They write what they are given as `shown_as_text` has it. Streams that replace them are left alone.
    """
    sys.stdout, sys.stderr = _standard_output(drops=True), _standard_error()


def _standard_output(*, drops: bool) -> TextIO:
    return _shown(_over(below(sys.stdout), sys.__stdout__, 1, _Lossy if drops else _Named))


def _standard_error() -> TextIO:
    return _shown(_over(below(sys.stderr), sys.__stderr__, 2, _Lossy))


def _over(stream: TextIO, own: TextIO | None, descriptor: int, kind: type[io.FileIO]) -> TextIO:
    """What writes to `descriptor` in place of `stream`, if that is the process's `own` or of here."""
    if stream is None:  # closed before Python began
        return open(os.devnull, "w", encoding="utf-8")  # for as long as the process lives
    if not isinstance(stream, io.TextIOWrapper) or not (stream is own or isinstance(stream, _Standard)):
        return stream
    return _Standard(
        io.BufferedWriter(kind(descriptor, "w", closefd=False)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering or stream.write_through,
    )


def write_every_character() -> None:
    """Have standard output write characters that its encoding lacks as escapes, instead of raising."""
    _shown(sys.stdout)


def write_answer(text: str) -> None:
    """Write a piece of an answer: as text on a terminal; into a file or a pipe exactly as it is."""
    stream = sys.stdout if sys.stdout.isatty() else below(sys.stdout)
    stream.write(text)
    stream.flush()
