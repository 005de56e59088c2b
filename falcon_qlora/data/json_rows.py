"""Rows from JSON: one a line, values one after another, an array of them, or one object that holds all."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from falcon_qlora.common.errors import UserError
from falcon_qlora.data.text_files import LONGEST, TOO_LONG, lines, open_text

Row = dict[str, Any]

_CHUNK = 1 << 20
_WRAPPERS = ("data", "rows", "examples", "train")
_OF_A_MESSAGE = {"role", "from", "content", "value"}
_COLUMNS = "read as columns, not rows"
_AS_RECORDS = 'write it as rows, for example with pandas: to_json(FILE, orient="records", lines=True)'


class _RefusedError(ValueError):
    """JSON that Python reads, and that would not be trained as it is meant."""


def _object(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _RefusedError(f"the key {twice!r} stands twice in one object; leave one of them out")
    return found


def _constant(name: str) -> None:
    """NaN is how pandas and Python write what is missing."""
    if name != "NaN":
        raise _RefusedError(f"{name} is no value of JSON; write null for what is missing, or a text")


def _number(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise _RefusedError(f"the number {text} is too large; write it as a text")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_number)


def iterate_json(path: Path, skip: int, *, by_line: bool) -> Iterator[tuple[str, Row]]:
    """Yield ``(place, row)``, after `skip` rows.

    Args:
        by_line: a file that does not begin with an array has one row a line, with as many lines left out
            without a look into them.
    """
    with open_text(path) as handle:
        array = _first_character(handle) == "["
    with open_text(path) as handle:
        if by_line and not array:
            yield from _of_lines(path, handle, skip)
        else:
            yield from itertools.islice(_of_values(path, handle, array=array), skip, None)


def json_remarks(path: Path) -> list[str]:
    """How the file is read where it is one object that holds the rows, not rows."""
    with open_text(path) as handle:
        if _first_character(handle) != "{":
            return []
    with open_text(path) as handle:
        head = list(itertools.islice(_Values(path, handle).read(), 2))
    return _spread(path, *head[0]).remarks if len(head) == 1 else []


def _of_values(path: Path, handle: TextIO, *, array: bool) -> Iterator[tuple[str, Row]]:
    values = _Values(path, handle).read()
    # One object that holds the rows is told from objects one after another.
    head = list(itertools.islice(values, 2))
    if len(head) == 1 and not array:
        yield from _spread(path, *head[0]).rows
        return
    for line, value in itertools.chain(head, values):
        yield f"{path}:{line}", _row(value, f"{path}:{line}")


def _of_lines(path: Path, handle: TextIO, skip: int) -> Iterator[tuple[str, Row]]:
    rows = ((number, line) for number, line in enumerate(lines(path, handle), start=1) if line.strip())
    head = list(itertools.islice(rows, 2))
    if len(head) == 1:
        yield from itertools.islice(_spread(path, head[0][0], _parsed(path, *head[0])).rows, skip, None)
        return
    for number, line in itertools.islice(itertools.chain(head, rows), skip, None):
        place = f"{path}:{number}"
        yield place, _row(_parsed(path, number, line), place)


def _parsed(path: Path, number: int, line: str) -> Any:
    try:
        return _DECODER.decode(line.strip())
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{number}: not valid JSON: {error.msg} at column {error.colno}; "
            "a .jsonl file has one whole object on every line"
        ) from None
    except (ValueError, RecursionError) as error:  # also of a number too long, or lists too deep
        raise UserError(f"{path}:{number}: not valid JSON: {error}") from None


class _Spread(NamedTuple):
    """The rows that a file's only value stands for, and what is said of them."""

    rows: list[tuple[str, Row]]
    remarks: list[str]


def _spread(path: Path, line: int, value: Any) -> _Spread:
    place = f"{path}:{line}"
    row = _row(value, place)
    lists = {name: each for name, each in row.items() if isinstance(each, list)}
    if "columns" in lists and _all_are(list, lists.get("data", [])):
        raise UserError(
            f'{place}: the names of columns are apart from the data (orient="split"); {_AS_RECORDS}'
        )
    chats = {name for name, each in lists.items() if any(map(_is_message, each))}  # of one row
    wrappers = [name for name in _WRAPPERS if _all_are(dict, lists.get(name, []))]
    if len(wrappers) == 1 and chats <= set(wrappers):
        others = ", ".join(repr(name) for name in row if name != wrappers[0])
        remarks = [f"read as the rows under {wrappers[0]!r}; not read: {others}"] if others else []
        return _Spread([(place, _row(each, place)) for each in row[wrappers[0]]], remarks)
    if lists and len(lists) == len(row) and not chats:
        if len(set(map(len, lists.values()))) > 1:
            told = ", ".join(f"{name!r} {len(each):,}" for name, each in lists.items())
            raise UserError(
                f"{place}: the file holds columns, not rows, of unequal lengths ({told}); {_AS_RECORDS}"
            )
        cells = zip(*lists.values(), strict=True)
        return _numbered(path, [dict(zip(lists, each, strict=True)) for each in cells], _COLUMNS)
    if _all_are(dict, row.values()) and all(map(_is_index, row.values())):
        first = next(iter(row.values())).keys()
        if any(each.keys() != first for each in row.values()):
            raise UserError(f"{place}: the file holds columns, not rows, of unequal indexes; {_AS_RECORDS}")
        return _numbered(path, [{name: row[name][index] for name in row} for index in first], _COLUMNS)
    if _all_are(dict, row.values()) and _is_index(row):  # orient="index"
        return _numbered(path, list(row.values()), "read as rows by their index")
    return _Spread([(place, row)], [])


def _numbered(path: Path, rows: list[Row], remark: str) -> _Spread:
    return _Spread([(f"{path} row {number}", row) for number, row in enumerate(rows, start=1)], [remark])


def _all_are(kind: type, values: Collection[Any]) -> bool:
    return bool(values) and all(isinstance(each, kind) for each in values)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and bool(_OF_A_MESSAGE & value.keys())


def _is_index(value: Row) -> bool:
    return bool(value) and all(key.removeprefix("-").isdecimal() for key in value)


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
        while True:
            try:
                value, self._position = _DECODER.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                # A value that the window cuts off fails at its end, or where its last string begins.
                cut_off = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - 16
                if self._ended or not cut_off:
                    self._fail(error.msg, error.pos)
                self._more()
            except (ValueError, RecursionError) as error:  # also of a number too long, or lists too deep
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
        if len(self._text) > LONGEST:
            raise UserError(f"{self._path}:{self._line}: {TOO_LONG}")
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


def _row(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{place}: expected a JSON object with named columns, found {type(value).__name__}")
    return value


def _first_character(handle: TextIO) -> str:
    while piece := handle.read(4096):
        if piece.strip():
            return piece.lstrip()[0]
    return ""
