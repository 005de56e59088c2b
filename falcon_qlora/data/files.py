"""Read rows from local files one by one, each with its place in the file.

Libraries that read whole tables guess a type for every column and fail far from the row that broke the
guess. Here each row is an object of its own, and an error in it is reported with file and line.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from falcon_qlora.common.errors import UserError, one_line
from falcon_qlora.data.json_rows import Row, iterate_json, json_remarks, table_row
from falcon_qlora.data.text_files import COMPRESSED, encoding_of, lines, open_text, told_with_file

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")

_SEPARATORS = ",;\t|"
_LINES_OF_A_HEADER = 20
# Types of Parquet whose values may need `table_row`, by their names.
_UNTIDY = re.compile("float|double|binary|struct")


def data_suffix(path: Path) -> str | None:
    """The suffix that says what rows `path` holds, ignoring that of compression; None if it is not data."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSED
    if compressed:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    if last not in SUFFIXES or (compressed and last == ".parquet"):
        return None
    return last


def iterate_rows(path: Path, *, skip: int = 0) -> Iterator[tuple[str, Row]]:
    """Yield ``(place, row)`` for every row of a file; a place is ``path:line`` or ``path row number``.

    A missing value is None, however the file writes it: null, NaN or, in CSV, an empty field. All other
    fields of CSV are text. An infinite number is an error.

    Args:
        skip: leave out this many rows at the beginning, without parsing them if the kind of file allows it.

    Raises:
        UserError: at a row that cannot be read.
    """
    suffix = data_suffix(path)
    with told_with_file(path):
        if suffix == ".parquet":
            yield from _parquet_rows(path, skip)
        elif suffix in (".csv", ".tsv"):
            yield from itertools.islice(_csv_rows(path), skip, None)
        else:
            yield from iterate_json(path, skip, by_line=suffix != ".json")


def remarks(path: Path) -> list[str]:
    """What is unusual in how a file is read, judged by its beginning."""
    suffix = data_suffix(path)
    told: list[str] = []
    if suffix == ".parquet":
        return _parquet_remarks(path)
    with told_with_file(path):
        if (encoding := encoding_of(path)) != "utf-8-sig":
            told.append(f"read as {encoding.upper()}")
        told += _csv_remarks(path) if suffix in (".csv", ".tsv") else json_remarks(path)
    return told


def _parquet_remarks(path: Path) -> list[str]:
    """That columns hold numbers for names, where `datasets` wrote so into a Parquet file."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        written = (file.schema_arrow.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(written or b"{}").get("info", {}).get("features") or {}
        classes = [name for name, each in features.items() if each["_type"] == "ClassLabel"]
    except (ValueError, TypeError, AttributeError, LookupError):
        return []  # not as `datasets` writes it
    return [
        f"column {name} holds numbers of classes, which are read as numbers and not as the names they stand "
        f"for ({one_line(features[name].get('names'), limit=80)})"
        for name in classes
    ]


def _csv_rows(path: Path) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    separator = _separator(path)
    line = 1
    with open_text(path, newline="") as handle:
        reader = csv.reader(lines(path, handle), delimiter=separator, strict=True)
        try:
            header = next(filter(None, reader), [])
            _check_header(header, f"{path}:{reader.line_num}")
            line = reader.line_num + 1
            for fields in reader:
                if fields:
                    if len(fields) != len(header):
                        raise UserError(
                            f"{path}:{line}: {len(fields)} fields, but the header has {len(header)} columns "
                            f"({_separated(separator)}); put double quotes around fields that hold this or "
                            "line breaks"
                        )
                    if fields == header:
                        raise UserError(
                            f"{path}:{line}: the header once more, as in files that were joined; take it out"
                        )
                    values = (field or None for field in fields)
                    yield f"{path}:{line}", dict(zip(header, values, strict=True))
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"{path}:{line}: not valid CSV: {error} at line {reader.line_num}. A double quote in the row "
                "that begins here is not closed, or stands alone: put fields that hold double quotes between "
                'double quotes, and write each of their own twice ("")'
            ) from None


def _csv_remarks(path: Path) -> list[str]:
    separator = _separator(path)
    return [f"read as {_separated(separator)}"] if separator != _usual_separator(path) else []


def _separator(path: Path) -> str:
    """The separator of the columns: the one that the header has most often outside quotes."""
    with open_text(path, newline="") as handle:
        header = "".join(itertools.islice(lines(path, handle), _LINES_OF_A_HEADER)).lstrip("\r\n")
    counts, quoted = dict.fromkeys(_SEPARATORS, 0.0), False
    for character in header:
        if character == '"':
            quoted = not quoted
        elif character in "\r\n" and not quoted:
            break
        elif character in counts and not quoted:
            counts[character] += 1
    counts[_usual_separator(path)] += 0.5  # the usual one wins a tie, also of none
    return max(counts, key=counts.__getitem__)


def _usual_separator(path: Path) -> str:
    return "\t" if data_suffix(path) == ".tsv" else ","


def _separated(separator: str) -> str:
    return "separated by tabs" if separator == "\t" else f"separated by {separator!r}"


def _check_header(header: Sequence[str], place: str) -> None:
    first = "".join(header[:1])
    if first.lstrip()[:1] in ("{", "["):
        raise UserError(f"{place}: by its content JSON; let the file's name end with .jsonl or .json")
    if first.lower().startswith("sep="):
        raise UserError(f"{place}: a line of Excel that names the separator; take it out")
    _check_names(header, place)


def _check_names(names: Sequence[str], place: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{place}: several columns have the name {twice[0]!r}; rename or remove all but one")


def _check_fields(fields: Iterable[Any], place: str) -> None:
    """Refuse fields of Arrow's that share a name, also within columns."""
    fields = list(fields)
    _check_names([field.name for field in fields], place)
    for field in fields:
        inner = [field.type.field(index) for index in range(field.type.num_fields)]
        _check_fields(inner, f"{place}: within {field.name}")


def _shortest(batch: Any) -> Any:
    """`batch` with its columns of float32 in float64, by their shortest spelling: 0.1, not 0.10000000149."""
    import pyarrow as pa

    for index, field in enumerate(batch.schema):
        if pa.types.is_float32(field.type) or pa.types.is_float16(field.type):
            column = batch.column(index).cast(pa.string()).cast(pa.float64())
            batch = batch.set_column(index, field.name, column)
    return batch


def _parquet_rows(path: Path, skip: int) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            _check_fields(file.schema_arrow, str(path))
            untidy = [field.name for field in file.schema_arrow if _UNTIDY.search(str(field.type))]
            for group in range(file.num_row_groups):
                if number + (rows := file.metadata.row_group(group).num_rows) <= skip:
                    number += rows
                    continue
                for batch in map(_shortest, file.iter_batches(batch_size=1000, row_groups=[group])):
                    left_out = min(max(skip - number, 0), len(batch))
                    number += left_out
                    for row in batch.slice(left_out).to_pylist():
                        number += 1
                        place = f"{path} row {number}"
                        yield place, row | table_row({name: row[name] for name in untidy}, place)
    except (pa.ArrowException, OverflowError, ValueError) as error:
        raise UserError(f"{path}: not a valid Parquet file: {one_line(error)}") from None
