"""Read rows from JSON: one per line, values one after another, an array, or one object that holds all."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.quantities import counted
from falcon_qlora.data.text_files import BYTE_ORDER_MARK, LONGEST, TOO_LONG, lines, open_text

Row = dict[str, Any]

_CHUNK = 1 << 20
_WRAPPERS = ("data", "rows", "examples", "train")
_OF_A_MESSAGE = {"role", "from", "content", "value"}
_COLUMNS = "read as columns, not rows"
_BETWEEN_VALUES = " \t\r\n" + BYTE_ORDER_MARK
_ONE_A_LINE = "; a .jsonl file has one whole object on every line"
_CUT_OFF = " (where objects go over several lines, name the file .json)"
_EXAMPLE = 'write every row as an object, such as {"text": "…"} or {"messages": […]}'
_AS_PAIRS = 'write each as a row, such as {"instruction": "Who?", "output": "Marta."}'
_MOST_COLUMNS = 20  # of texts alone
_AS_RECORDS = 'write it as rows, for example with pandas: to_json(FILE, orient="records", lines=True)'


def _object(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object; leave one of them out")
    return found


class Number(float):
    """A number of JSON that becomes text as the file spells it, such as ``12.50``."""

    def __new__(cls, text: str) -> Number:
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str

    def __str__(self) -> str:
        return self.text


def numbers_in(value: Any) -> Iterator[Number]:
    """The numbers anywhere in a value."""
    if isinstance(value, Number):
        yield value
    elif isinstance(value, Mapping | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from numbers_in(each)


def _integer(text: str) -> int | Number:
    try:
        return Number(text) if text == "-0" else int(text)
    except ValueError:
        raise ValueError(f"a number of {len(text):,} digits") from None


# Infinite numbers met so far, as spelled. Rows are searched for them only once there is one.
_INFINITE: set[str] = set()


def _number(text: str) -> float | None:
    """The number, or None for NaN, with which pandas and Python write missing values."""
    number = Number(text)
    if math.isinf(number):
        _INFINITE.add(text)
    return None if math.isnan(number) else number


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_number, parse_constant=_number
)


def parse_json(text: str, place: str, hint: str = "") -> Any:
    """The value that `text` spells.

    Args:
        text: of one value.
        place: names it in messages.
        hint: ends these messages.

    Raises:
        UserError: if it is not valid JSON, nested too deep, or has a repeated key or too long a number.
    """
    try:
        return _DECODER.decode(text.strip())
    except (ValueError, RecursionError) as error:
        at = ""
        if isinstance(error, json.JSONDecodeError):
            at = f" at character {error.pos + 1}"
            if hint == _ONE_A_LINE and error.pos >= len(text.strip()):
                hint += _CUT_OFF
        raise UserError(f"{place}: not valid JSON: {_said(error)}{at}{hint}") from None


def _said(error: Exception) -> str:
    """The message of Python's JSON reader, without the position."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg.removesuffix(" at")
    return "nested too deep" if isinstance(error, RecursionError) else str(error)


def iterate_json(path: Path, skip: int, *, by_line: bool) -> Iterator[tuple[str, Row]]:
    """Yield ``(place, row)``, after `skip` rows.

    Args:
        by_line: unless the file begins with an array, it has one row per line, and skipped lines are not
            parsed.
    """
    with open_text(path) as handle:
        array = _first_character(handle) == "["
    with open_text(path) as handle:
        if by_line and not array:
            yield from _of_lines(path, handle, skip)
        else:
            yield from itertools.islice(_of_values(path, handle, array=array), skip, None)


def json_remarks(path: Path) -> list[str]:
    """How the file is read, if it is one object that holds the rows."""
    with open_text(path) as handle:
        if _first_character(handle) != "{":
            return []
    with open_text(path) as handle:
        head = list(itertools.islice(_Values(path, handle).read(), 2))
    return _spread(path, *head[0]).remarks if len(head) == 1 else []


def _of_values(path: Path, handle: TextIO, *, array: bool) -> Iterator[tuple[str, Row]]:
    values = _Values(path, handle).read()
    # A file's only object may hold all the rows; of several, each is a row.
    head = list(itertools.islice(values, 2))
    if len(head) == 1 and not array:
        yield from _spread(path, *head[0]).rows
        return
    for number, (line, value) in enumerate(itertools.chain(head, values), start=1):
        place = f"{path}:{line}{_of_list(number) if array else ''}"
        yield place, _row(value, place)


def _of_lines(path: Path, handle: TextIO, skip: int) -> Iterator[tuple[str, Row]]:
    rows = ((number, line) for number, line in enumerate(lines(path, handle), start=1) if line.strip())
    head = list(itertools.islice(rows, 2))
    if len(head) == 1:
        number, line = head[0]
        value = parse_json(line, f"{path}:{number}", _ONE_A_LINE)
        yield from itertools.islice(_spread(path, number, value).rows, skip, None)
        return
    for number, line in itertools.islice(itertools.chain(head, rows), skip, None):
        place = f"{path}:{number}"
        yield place, _row(parse_json(line, place, _ONE_A_LINE), place)


class _Spread(NamedTuple):
    """The rows that a file's only value holds, and remarks on how it is read."""

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
    # A list of messages is a column of one row.
    chats = {name for name, each in lists.items() if any(map(_is_message, each))}
    wrappers = [name for name in _WRAPPERS if _all_are(dict, lists.get(name, []))]
    if len(wrappers) == 1 and chats <= set(wrappers):
        others = ", ".join(repr(name) for name in row if name != wrappers[0])
        remarks = [f"read as the rows under {wrappers[0]!r}; not read: {others}"] if others else []
        return _numbered(f"{place} (row {{}} of {wrappers[0]!r})", row[wrappers[0]], remarks)
    if any(lists.values()) and len(lists) == len(row) and not chats:
        if len(set(map(len, lists.values()))) > 1:
            told = ", ".join(f"{name!r} {len(each):,}" for name, each in lists.items())
            raise UserError(
                f"{place}: the file holds columns, not rows, of unequal lengths ({told}); {_AS_RECORDS}"
            )
        cells = zip(*lists.values(), strict=True)
        rows = [dict(zip(lists, each, strict=True)) for each in cells]
        return _numbered(f"{path} row {{}}", rows, [_COLUMNS])
    if _all_are(dict, row.values()) and all(map(_is_index, row.values())):
        first = next(iter(row.values())).keys()
        if any(each.keys() != first for each in row.values()):
            raise UserError(f"{place}: the file holds columns, not rows, of unequal indexes; {_AS_RECORDS}")
        rows = [{name: row[name][index] for name in row} for index in first]
        return _numbered(f"{path} row {{}}", rows, [_COLUMNS])
    if _all_are(dict, row.values()) and _is_index(row):  # orient="index"
        return _numbered(f"{path} row {{}}", list(row.values()), ["read as rows by their index"])
    sentences = [key for key in row if key.rstrip()[-1:] in tuple(".?!")]
    if _all_are(str, row.values()) and (len(sentences) > len(row) / 2 or len(row) > _MOST_COLUMNS):
        raise UserError(f"{place}: one object of {counted(len(row), 'pair')}, not rows; {_AS_PAIRS}")
    return _Spread([(place, row)], [])


def _of_list(number: int) -> str:
    """A row's number in an array, as one line may hold many of its rows."""
    return f" (row {number:,} of the list)"


def _numbered(place: str, rows: list[Row], remarks: list[str]) -> _Spread:
    """Rows with their places, in which the row's number replaces ``{}``."""
    return _Spread([(place.format(number), row) for number, row in enumerate(rows, start=1)], remarks)


def _all_are(kind: type, values: Collection[Any]) -> bool:
    return bool(values) and all(isinstance(each, kind) for each in values)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and bool(_OF_A_MESSAGE & value.keys())


def _is_index(value: Row) -> bool:
    return bool(value) and all(key.removeprefix("-").isdecimal() for key in value)


class _Values:
    """Reads an array's elements, or JSON values one after another, without holding the whole file.

    Args:
        path: for messages.
        handle: open at the beginning.
    """

    def __init__(self, path: Path, handle: TextIO):
        self._path = path
        self._handle = handle
        self._text = ""
        self._position = 0
        self._line = 1  # the line at `_counted`, up to which line breaks have been counted
        self._counted = 0
        self._row = ""  # in an array, names the row being read
        self._ended = False

    def read(self) -> Iterator[tuple[int, Any]]:
        """Yield ``(line, value)``."""
        array = self._next() == "["
        if array:
            self._position += 1
        expect_value = not array
        number = 0
        while character := self._next():
            if array and character == "]" and not expect_value:
                self._position += 1
                if self._next():
                    self._fail(f"something follows the array's closing bracket; {_EXAMPLE}")
                return
            line = self._line_here()
            if array:
                number += 1
                self._row = _of_list(number)
            value = self._decode()
            self._row = ""
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
                # A value that the window cuts off fails at the window's end, or where its last string begins.
                cut_off = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - 16
                if self._ended or not cut_off:
                    self._fail(_said(error), error.pos)
                self._more()
            except (ValueError, RecursionError) as error:  # also too long a number, or nested too deep
                self._fail(_said(error))
            else:
                return value

    def _next(self) -> str:
        """The next character that is not white space, left unread; empty at the end."""
        while True:
            while self._position < len(self._text) and self._text[self._position] in _BETWEEN_VALUES:
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
        raise UserError(f"{self._path}:{line}{self._row}: not valid JSON: {message}")


def _row(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        found = kind(value)
        raise UserError(f"{place}: expected a JSON object with named columns, found {found}; {_EXAMPLE}")
    return tidied_row(value, place) if _INFINITE else value


def columns_of(rows: Iterable[Row]) -> dict[str, bool]:
    """Every column that any row has → whether it holds arrays or objects; rows may lack others' columns."""
    found: dict[str, bool] = {}
    for row in rows:
        for name, value in row.items():
            found[name] = found.get(name, False) or isinstance(value, list | dict)
    return found


def tidied_row(row: Row, place: str) -> Row:
    """As `tidied`, for every column."""
    return {name: tidied(value, f"{place}: column {name}") for name, value in row.items()}


def table_row(row: Row, place: str) -> Row:
    """As `tidied_row`, of a table of Arrow's, which gives each object the keys that others have, as null.

    Those of tools and calls go, as TRL does. A message's own stay: they say that it lacks its text.
    """
    return {name: _unpadded(each, name == "tools") for name, each in tidied_row(row, place).items()}


def _unpadded(value: Any, nested: bool) -> Any:
    if isinstance(value, dict):
        return {key: _unpadded(each, True) for key, each in value.items() if each is not None or not nested}
    return [_unpadded(each, nested) for each in value] if isinstance(value, list) else value


def tidied(value: Any, place: str) -> Any:
    """A value in the same form from any library: NaN becomes None, and bytes in UTF-8 become text.

    Raises:
        UserError: for an infinite number.
    """
    if isinstance(value, float):
        if math.isinf(value):
            raise UserError(
                f"{place}: the number is infinite or too large; write null for what is missing, or a text"
            )
        return None if math.isnan(value) else value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value  # refused later if it would be trained
    if isinstance(value, dict):
        return {key: tidied(each, place) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [tidied(each, place) for each in value]
    return value


def kind(value: Any) -> str:
    """The kind of `value`, for a message."""
    if isinstance(value, Mapping):
        return f"an object with {listed([str(key) for key in value])}"
    kinds = {
        bytes: "bytes that are no text in UTF-8",
        list: "an array",
        bool: "true or false",
        str: "text",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else kinds.get(type(value), f"{type(value).__name__}")


def spelled(name: str) -> str:
    """The name of a column or key, for a message; quoted as in code if it would not show as a name."""
    is_plain = name.isprintable() and name.strip() == name != "" and name.rstrip(",;.?!") == name
    return name if is_plain else repr(name)


def listed(names: Collection[str]) -> str:
    """Names of columns or keys, for a message; cut if they are many."""
    if not names:
        return "no columns"
    shown = [spelled(name) for name in sorted(names)]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")


def _first_character(handle: TextIO) -> str:
    while piece := handle.read(4096):
        if piece.strip():
            return piece.lstrip()[0]
    return ""
