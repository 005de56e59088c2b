"""Standard output and error: a command's first line, and streams that outlive a full disk or closed pipe."""

from __future__ import annotations

import io
import os
import sys
from typing import Any, TextIO


def say_loading(*, aside: bool = False) -> None:
    """Print at once that libraries are being loaded, which takes seconds.

    Args:
        aside: print on standard error, for a command whose results go to standard output.
    """
    print("loading libraries …", file=sys.stderr if aside else sys.stdout, flush=True)


class _Lossy(io.FileIO):
    """A file that drops what cannot be written: on a full disk, or to a pipe without a reader."""

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        return memoryview(data).nbytes if written is None else written


def drop_what_cannot_be_written() -> None:
    """Have this process's standard output and error drop what cannot be written, instead of raising.

    Streams that replace them are left alone.
    """
    if sys.stdout is sys.__stdout__:
        sys.stdout = _lossy(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _lossy(sys.stderr, 2)


def write_every_character() -> None:
    """Have standard output write characters that its encoding lacks as escapes, instead of raising."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _lossy(stream: TextIO | None, descriptor: int) -> TextIO:
    if stream is None:  # closed before Python began
        return open(os.devnull, "w", encoding="utf-8")  # for as long as the process lives
    assert isinstance(stream, io.TextIOWrapper)
    return io.TextIOWrapper(
        io.BufferedWriter(_Lossy(descriptor, "w", closefd=False)),
        encoding=stream.encoding,
        # A path may have characters that the terminal's encoding lacks.
        errors="backslashreplace" if stream.errors == "strict" else stream.errors,
        line_buffering=stream.line_buffering or stream.write_through,
    )
