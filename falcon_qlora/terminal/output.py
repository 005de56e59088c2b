"""What a command prints: its first line, and how a run that cannot be told of goes on."""

from __future__ import annotations

import io
import os
import sys
from typing import Any, TextIO


def say_loading(*, aside: bool = False) -> None:
    """Say at once that libraries are loaded now, which takes seconds.

    Args:
        aside: on standard error, where a command's answers go to standard output.
    """
    print("loading libraries …", file=sys.stderr if aside else sys.stdout, flush=True)


class _Lossy(io.FileIO):
    """A file that drops what it cannot take: on a full disk, or in a pipe that nobody reads any more."""

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        return memoryview(data).nbytes if written is None else written


def drop_what_cannot_be_written() -> None:
    """Have this process's standard output and error drop what cannot be written, for as long as it cannot.

    Streams that someone has put in their place are left alone.
    """
    if sys.stdout is sys.__stdout__:
        sys.stdout = _lossy(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _lossy(sys.stderr, 2)


def write_every_character() -> None:
    """Have standard output write what its encoding has no character for as an escape, not as an error."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _lossy(stream: TextIO | None, descriptor: int) -> TextIO:
    if stream is None:  # closed before Python began
        return open(os.devnull, "w", encoding="utf-8")  # for as long as the process lives
    assert isinstance(stream, io.TextIOWrapper)
    return io.TextIOWrapper(
        io.BufferedWriter(_Lossy(descriptor, "w", closefd=False)),
        encoding=stream.encoding,
        # A path may hold what the terminal's encoding has no signs for.
        errors="backslashreplace" if stream.errors == "strict" else stream.errors,
        line_buffering=stream.line_buffering or stream.write_through,
    )
