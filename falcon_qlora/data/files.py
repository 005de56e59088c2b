"""Reading rows from local files one by one, each with the place it stands at.

Libraries that read whole tables guess a type for every column and fail far from the row that broke the
guess. Here a row is an object of its own, and what is wrong with it is said with file and line.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from falcon_qlora.common.errors import UserError, one_line, reason_of

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")

Row = dict[str, Any]

_CHUNK = 1 << 20
_LONGEST = 1 << 26
_TOO_LONG = f"a line or value of more than {_LONGEST:,} characters: this is no row"
_WRAPPERS = ("data", "rows", "examples", "train")


def data_suffix(path: Path) -> str | None:
    """The suffix that says what `path` holds, without ``.gz``; None for what is not data."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = suffixes[-1:] == [".gz"]
    if compressed:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    if last not in SUFFIXES or (compressed and last == ".parquet"):
        return None
    return last


def iterate_rows(path: Path, *, skip: int = 0) -> Iterator[tuple[str, Row]]:
    """Yield ``(place, row)`` for every row of a file; a place is ``path:line``.

    Args:
        skip: leave out so many rows at the beginning, without a look into them where the kind of file allows.

    Raises:
        UserError: at the row that cannot be read.
    """
    suffix = data_suffix(path)
    try:
        if suffix == ".parquet":
            yield from _parquet_rows(path, skip)
        elif suffix == ".csv":
            yield from itertools.islice(_csv_rows(path), skip, None)
        else:
            yield from _json_rows(path, skip, lines=suffix != ".json")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not text in UTF-8 ({error.reason}); convert it, for example with iconv"
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip file: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {reason_of(error)}") from None


def _open(path: Path, newline: str | None = None) -> TextIO:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
    return path.open(encoding="utf-8-sig", newline=newline)


def _json_rows(path: Path, skip: int, *, lines: bool) -> Iterator[tuple[str, Row]]:
    with _open(path) as handle:
        first = _first_character(handle)
    if lines and first != "[":
        yield from _json_lines(path, skip)
    else:
        yield from itertools.islice(_json_values(path), skip, None)


def _json_values(path: Path) -> Iterator[tuple[str, Row]]:
    with _open(path) as handle:
        values = _Values(path, handle).read()
        # One object that wraps the rows is told from a file of one row, and from objects one after another.
        head = list(itertools.islice(values, 2))
        if len(head) == 1:
            line, only = head[0]
            wrapped = [
                only[key] for key in _WRAPPERS if isinstance(only, dict) and isinstance(only.get(key), list)
            ]
            if len(wrapped) == 1:
                head = [(line, value) for value in wrapped[0]]
        for line, value in head:
            yield f"{path}:{line}", _row(value, f"{path}:{line}")
        for line, value in values:
            yield f"{path}:{line}", _row(value, f"{path}:{line}")


def _json_lines(path: Path, skip: int) -> Iterator[tuple[str, Row]]:
    with _open(path) as handle:
        lines = enumerate(_lines(path, handle), start=1)
        rows = ((number, line) for number, line in lines if line.strip())
        for number, line in itertools.islice(rows, skip, None):
            place = f"{path}:{number}"
            try:
                value = json.loads(line.strip())
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{place}: not valid JSON: {error.msg} at column {error.colno}; "
                    "a .jsonl file has one whole object on every line"
                ) from None
            except (ValueError, RecursionError) as error:  # of a number too long, or lists too deep
                raise UserError(f"{place}: not valid JSON: {error}") from None
            yield place, _row(value, place)


def _lines(path: Path, handle: TextIO) -> Iterator[str]:
    """The lines of a file, which is no text where one has no end."""
    for number in itertools.count(1):
        line = handle.readline(_LONGEST)
        if len(line) == _LONGEST:
            raise UserError(f"{path}:{number}: {_TOO_LONG}")
        if not line:
            return
        yield line


class _Values:
    """The JSON values of a file, an array's elements or values one after another, without holding the file.

    Args:
        path: for messages.
        handle: open at the beginning.
    """

    def __init__(self, path: Path, handle: TextIO):
        self._path = path
        self._handle = handle
        self._text = ""
        self._position = 0
        self._line = 1  # at `_counted`, up to which line breaks have been counted
        self._counted = 0
        self._ended = False

    def read(self) -> Iterator[tuple[int, Any]]:
        """Yield ``(line, value)``."""
        array = self._next() == "["
        if array:
            self._position += 1
        expect_value = not array
        while character := self._next():
            if array and character == "]" and not expect_value:
                self._position += 1
                if self._next():
                    self._fail("something follows the array's closing bracket")
                return
            line = self._line_here()
            value = self._decode()
            yield line, value
            expect_value = False
            if array:
                following = self._next()
                if following == ",":
                    self._position += 1
                    expect_value = True
                elif following and following != "]":
                    self._fail("expected a comma or the array's closing bracket")
        if array:
            self._fail("the array's closing bracket is missing")

    def _decode(self) -> Any:
        decoder = json.JSONDecoder()
        while True:
            try:
                value, self._position = decoder.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                # A value that the window cuts off fails at its end, or where its last string begins.
                cut_off = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - 16
                if self._ended or not cut_off:
                    self._fail(error.msg, error.pos)
                self._more()
            except (ValueError, RecursionError) as error:  # of a number too long, or lists too deep
                self._fail(str(error))
            else:
                return value

    def _next(self) -> str:
        """The next character that is not white space, left unread; empty at the end."""
        while True:
            while self._position < len(self._text) and self._text[self._position] in " \t\r\n":
                self._position += 1
            if self._position < len(self._text):
                return self._text[self._position]
            if self._ended:
                return ""
            self._more()

    def _more(self) -> None:
        self._line_here()
        self._text = self._text[self._position :]
        if len(self._text) > _LONGEST:
            raise UserError(f"{self._path}:{self._line}: {_TOO_LONG}")
        self._position = self._counted = 0
        # Doubling, so that one large value is not decoded again for every small piece of it.
        piece = self._handle.read(max(_CHUNK, len(self._text)))
        self._ended = not piece
        self._text += piece

    def _line_here(self) -> int:
        self._line += self._text.count("\n", self._counted, self._position)
        self._counted = self._position
        return self._line

    def _fail(self, message: str, position: int | None = None) -> None:
        at = self._position if position is None else position
        line = self._line_here() + self._text.count("\n", self._position, at)
        raise UserError(f"{self._path}:{line}: not valid JSON: {message}")


def _csv_rows(path: Path) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with _open(path, newline="") as handle:
        reader = csv.reader(_lines(path, handle), strict=True)
        try:
            header = next(reader, [])
            line = reader.line_num + 1
            for fields in reader:
                if fields:
                    if len(fields) != len(header):
                        raise UserError(
                            f"{path}:{line}: {len(fields)} fields, but the header has {len(header)} columns; "
                            "put double quotes around fields with commas or line breaks"
                        )
                    yield f"{path}:{line}", dict(zip(header, fields, strict=True))
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None


def _parquet_rows(path: Path, skip: int) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                if number + (rows := file.metadata.row_group(group).num_rows) <= skip:
                    number += rows
                    continue
                for batch in file.iter_batches(batch_size=1000, row_groups=[group]):
                    left_out = min(max(skip - number, 0), len(batch))
                    number += left_out
                    for row in batch.slice(left_out).to_pylist():
                        number += 1
                        yield f"{path} row {number}", row
    except (pa.ArrowException, OverflowError) as error:
        raise UserError(f"{path}: not a valid Parquet file: {one_line(error)}") from None


def _row(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{place}: expected a JSON object with named columns, found {type(value).__name__}")
    return value


def _first_character(handle: TextIO) -> str:
    while piece := handle.read(4096):
        if piece.strip():
            return piece.lstrip()[0]
    return ""
