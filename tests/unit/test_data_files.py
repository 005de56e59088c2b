"""Rows from files: what is read, and what is said where it cannot be."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets.data_files import SPLIT_KEYWORDS
from hypothesis import given
from hypothesis import strategies as st

from falcon_qlora.common.errors import UserError
from falcon_qlora.data import json_rows
from falcon_qlora.data.files import iterate_rows
from falcon_qlora.data.folders import files_of_folder
from falcon_qlora.data.sources import HubSource, LocalSource, find_source
from tests.fuzzing import fuzz

NAN_ROW = {"a": None, "b": [{"c": None}, None]}
NAN_TEXT, NA_TEXT = {"a": "nan", "b": "NaN"}, {"a": "NA", "b": None}
BY_INDEX = "read as rows by their index"
UNDER_DATA = "read as the rows under 'data'; not read: 'test'"
COLUMNS = "read as columns, not rows"
CHAT = '{"messages": [{"role": "user", "content": "x"}], "tools": [{"a": 1}]}'
PACKED = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
PACKED[".zst"] = lambda content: pa.Codec("zstd").compress(content, asbytes=True)
ROWS = [{"instruction": f"say {n}", "output": f"line\n{n} é 🦙", "n": n} for n in range(7)]


def write(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in iterate_rows(path)]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.ndjson"])
def test_json_lines_whatever_the_suffix(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, "\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS) + "\n")
    assert rows_of(path) == ROWS
    assert [place for place, _ in iterate_rows(path)][:2] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_array_whatever_the_suffix(tmp_path: Path, name: str, indent: int | None) -> None:
    assert rows_of(write(tmp_path / name, json.dumps(ROWS, indent=indent))) == ROWS


def test_json_array_gives_the_line_of_every_row(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", json.dumps(ROWS, indent=1, ensure_ascii=False))
    lines = path.read_text().splitlines()
    for number, (place, _) in enumerate(iterate_rows(path), start=1):
        line, row = place.removeprefix(f"{path}:").split(" ", 1)
        assert lines[int(line) - 1].strip() == "{"
        assert row == f"(row {number} of the list)"
    path = write(tmp_path / "wrapped.json", json.dumps({"data": ROWS}))
    assert [place for place, _ in iterate_rows(path)][1] == f"{path}:1 (row 2 of 'data')"


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_json_array_is_read_in_pieces_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(json_rows, "_CHUNK", chunk)
    path = write(tmp_path / "rows.json", json.dumps(ROWS, indent=1))
    assert rows_of(path) == ROWS
    broken = write(tmp_path / "broken.json", json.dumps(ROWS, indent=1).replace('"n": 5', '"n" 5'))
    line = next(n for n, text in enumerate(broken.read_text().splitlines(), 1) if '"n" 5' in text)
    with pytest.raises(UserError, match=rf"broken.json:{line} .row 6 of the list.: not valid JSON"):
        rows_of(broken)


def test_json_object_that_wraps_the_rows(tmp_path: Path) -> None:
    assert rows_of(write(tmp_path / "rows.json", json.dumps({"version": 1, "data": ROWS}, indent=1))) == ROWS


def test_gzip_csv_parquet(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in ROWS)
    assert rows_of(tmp_path / "rows.jsonl.gz") == ROWS
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert rows_of(tmp_path / "rows.parquet") == ROWS
    csv = write(tmp_path / "rows.csv", 'prompt,completion\n"a, b","NA"\n"two\nlines",007\n')
    # Everything in a CSV file is text: neither NA nor 007 means anything else.
    assert rows_of(csv) == [
        {"prompt": "a, b", "completion": "NA"},
        {"prompt": "two\nlines", "completion": "007"},
    ]
    assert [place for place, _ in iterate_rows(csv)] == [f"{csv}:2", f"{csv}:3"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": "y"\n', r"a.jsonl:2: not valid JSON"),
        ("a.jsonl", '{"text": "x"}\n[1]\n', r"a.jsonl:2: expected a JSON object.* found an array"),
        ("a.json", '[{"text": "x"},\n {"text": }]', r"a.json:2 .row 2 of the list.: not valid JSON"),
        ("a.json", '[{"text": "x"}\n {"text": "y"}]', r"a.json:2: not valid JSON: expected a comma"),
        ("a.json", '[{"text": "x"},\n]', r"a.json:2 .row 2 of the list.: not valid JSON"),
        ("a.json", '[{"text": "x"}\n', r"a.json:2: not valid JSON: the array's closing bracket is missing"),
        ("a.json", '[{"text": "x"}]\n{', r"a.json:2: not valid JSON: something follows"),
        (
            "a.json",
            '[{"text": "x"}, 3]',
            r"a.json:1 .row 2 of the list.: expected a JSON object.* found a number",
        ),
        ("a.csv", "text,b\nx,y\nz\n", r"a.csv:3: 1 fields, but the header has 2 columns"),
        ("a.csv", 'text\n"x\n', r"a.csv:2: not valid CSV.* at line 2\. A double quote .* is not closed"),
        # The row in which a quote is open, not the one before whose end it shows.
        ("a.csv", 'a,b\n1,"x\n2,y\n3,"z"\n', r"a.csv:2: not valid CSV: .* at line 4\."),
        (
            "a.jsonl",
            '[{"a": 1}]\n[{"a": 2}]\n',
            r"a.jsonl:2: .* closing bracket; write every row as an object",
        ),
        ("a.jsonl", '{\n "a": 1\n}\n{"a": 2}\n', r"a.jsonl:1: .*over several lines, name the file .json\)"),
        ("a.parquet", "no parquet", r"a.parquet: not a valid Parquet file"),
        ("a.jsonl.gz", "no gzip", r"a.jsonl.gz: no gzip file by its content; name it a.jsonl$"),
        ("a.csv.bz2", "no bzip2", r"a.csv.bz2: no bzip2 file"),
        ("a.json.xz", "no xz", r"a.json.xz: no xz file"),
        ("a.jsonl.zst", "no zstd", r"a.jsonl.zst: no zstd file .* name it a.jsonl$"),
        # In the words of JSON, not of Python's reader.
        (
            "a.jsonl",
            '{"a": 1}\n{"a": "x\ty"}',
            r"a.jsonl:2: not valid JSON: Invalid control character at character 9;",
        ),
        (
            "a.jsonl",
            '{"a": 1}\n{"a": "x',
            r"a.jsonl:2: not valid JSON: Unterminated string starting at character 7;",
        ),
        (
            "a.json",
            '[{"a": "x\ty"}]',
            r"a.json:1 .row 1 of the list.: not valid JSON: Invalid control character$",
        ),
        ("a.json", '[{"a": ' + "9" * 5000 + "}]", r"a.json:1 .*: not valid JSON: a number of 5,000 digits$"),
        ("a.json", "[" * 100_000, r"a.json:1 .*: not valid JSON: nested too deep$"),
        ("a.jsonl", '{"a": 1}\n"x"\n', r"a.jsonl:2: expected a JSON object.* found text"),
        ("a.jsonl", '{"a": 1}\nnull\n', r"a.jsonl:2: expected a JSON object.* found null"),
        # What Python reads and would train otherwise than it is meant.
        ("a.jsonl", '{"a": 1}\n{"a": Infinity}', r"a.jsonl:2: column a: .*infinite.*write null"),
        (
            "a.json",
            '[{"a": 1},\n {"a": {"b": [-Infinity]}}]',
            r"a.json:2 .row 2 of the list.: column a: .*infinite",
        ),
        (
            "a.json",
            '[{"a": 1},\n {"a": 1e999}]',
            r"a.json:2 .row 2 of the list.: column a: .*too large; write null",
        ),
        ("a.jsonl", '{"a": 1}\n{"b": 1, "m": [{"c": [1e999]}]}', r"a.jsonl:2: column m: .*too large"),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}', r"a.jsonl:2: .*the key 'a' stands twice"),
        ("a.json", '[{"a": 1},\n {"b": {"c": 1, "c": 1}}]', r"a.json:2 .*: .*the key 'c' stands twice"),
        ("a.csv", "a,b,a\n1,2,3\n", r"a.csv:1: several columns have the name 'a'"),
        ("a.tsv", "\na\ta\n1\t2\n", r"a.tsv:2: several columns have the name 'a'"),
        # Files that were joined, are of another kind, or come from Excel.
        ("a.csv", "a,b\n1,2\na,b\n3,4\n", r"a.csv:3: the header once more.*; take it out$"),
        ("a.tsv", "a\tb\n1\t2\n\ufeffa\tb\n", r"a.tsv:3: the header once more"),
        ("a.csv", '{"a": "x", "b": 1}\n', r"a.csv:1: by its content JSON; let .* end with .jsonl or .json$"),
        ("a.csv", "sep=;\na;b\n1;2\n", r"a.csv:1: a line of Excel that names the separator; take it out$"),
        ("a.csv", "a;b\n1;2;3\n", r"a.csv:2: 3 fields.*\(separated by ';'\)"),
        ("a.json", '{"a": [1, 2], "b": [1]}', r"a.json:1: .*unequal lengths \('a' 2, 'b' 1\).*records"),
        ("a.json", '{"a": {"0": 1}, "b": {"1": 1}}', r"a.json:1: .*unequal indexes.*orient=.records"),
        (
            "a.json",
            '{"Who?": "Marta.", "Where is it?": "Here.", "Say": "a"}',
            r"a.json:1: .* 3 pairs, not rows",
        ),
        (
            "a.jsonl",
            json.dumps({f"word {n}": "b" for n in range(30)}),
            r"of 30 pairs.*each as a row, such as",
        ),
        ("a.json", '\n{"columns": ["a"], "index": [0], "data": [[1]]}', r"a.json:2: .*split.*records"),
    ],
)
def test_malformed_files_are_told_with_their_line(tmp_path: Path, name: str, content: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        rows_of(write(tmp_path / name, content))


@pytest.mark.parametrize(
    ("name", "content", "rows", "remarks"),
    [
        # As Python and pandas write a number that is missing; a key that is absent stays absent.
        ("a.json", '[{"a": NaN, "b": [{"c": NaN}, null]}, {"b": "NaN"}]', [NAN_ROW, {"b": "NaN"}], []),
        ("a.jsonl", '{"a": NaN, "b": [{"c": NaN}, null]}\n', [NAN_ROW], []),
        # In a table of text all is text, and a field without any is missing.
        ("a.csv", 'a,b\nnan,NaN\nNA,\n"",NULL\n', [NAN_TEXT, NA_TEXT, {"a": None, "b": "NULL"}], []),
        # Columns, from pandas and by hand, in files of either kind.
        (
            "a.json",
            '{"a": ["x", "y"], "b": [1, NaN]}',
            [{"a": "x", "b": 1}, {"a": "y", "b": None}],
            [COLUMNS],
        ),
        ("a.jsonl", '{"a": ["x", "y"]}\n\n', [{"a": "x"}, {"a": "y"}], [COLUMNS]),
        ("a.json", '{"a": {"0": "x", "7": "y"}}', [{"a": "x"}, {"a": "y"}], [COLUMNS]),
        ("a.json", '{"0": {"a": "x"}, "1": {"a": "y"}}', [{"a": "x"}, {"a": "y"}], [BY_INDEX]),
        ("a.json", '[{"a": ["x", "y"]}]', [{"a": ["x", "y"]}], []),
        # One chat is one row, however much its lists look like columns.
        ("a.json", CHAT, [json.loads(CHAT)], []),
        ("a.jsonl", CHAT, [json.loads(CHAT)], []),
        ("a.json", '{"data": [{"a": 1}], "test": [{"a": 2}]}', [{"a": 1}], [UNDER_DATA]),
        # Separators are told from the header, outside of its quotes.
        ("a.csv", '"a,,,";b\n"1;2";3,5\n', [{"a,,,": "1;2", "b": "3,5"}], ["read as separated by ';'"]),
        ("a.csv", "a\tb\n1,0\t2\n", [{"a": "1,0", "b": "2"}], ["read as separated by tabs"]),
        ("a.csv", "\r\na|b\r\n1|2\r\n", [{"a": "1", "b": "2"}], ["read as separated by '|'"]),
        ("a.csv", "a\n1;2\n", [{"a": "1;2"}], []),
        ("a.csv", '"a\nb;;",c\n1;,2\n', [{"a\nb;;": "1;", "c": "2"}], []),
        ("a.tsv", "a\tb\n1,0\t2\n", [{"a": "1,0", "b": "2"}], []),
        ("a.tsv", "a\n1, 2\n", [{"a": "1, 2"}], []),
        ("a.tsv", "a,b\n1,2\n", [{"a": "1", "b": "2"}], ["read as separated by ','"]),
        # Byte order marks between files that were joined.
        ("a.jsonl", '{"a": 1}\n\ufeff{"a": "\ufeff"}\n', [{"a": 1}, {"a": "\ufeff"}], []),
        ("a.json", '{"a": 1}\n\ufeff{\n"a": 2}\n', [{"a": 1}, {"a": 2}], []),
        ("a.csv", 'a,b\n1,2\n\ufeff"3,",4\n', [{"a": "1", "b": "2"}, {"a": "3,", "b": "4"}], []),
    ],
)
def test_what_is_written_in_another_way(
    tmp_path: Path, name: str, content: str, rows: list[Any], remarks: list[str]
) -> None:
    path = write(tmp_path / name, content)
    assert rows_of(path) == rows
    assert find_source(str(path)).notes() == [f"{path}: {remark}" for remark in remarks]
    for skip in range(len(rows) + 1):
        assert [row for _, row in iterate_rows(path, skip=skip)] == rows[skip:]
    # The same in UTF-16, as Excel writes it.
    path.write_bytes(content.encode("utf-16"))
    assert rows_of(path) == rows
    assert find_source(str(path)).notes() == [f"{path}: {each}" for each in ["read as UTF-16", *remarks]]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_files_are_read_or_refused_by_name(tmp_path: Path, suffix: str) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS * 200)
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(PACKED[suffix](lines.encode()))
    assert rows_of(path) == ROWS * 200
    assert find_source(str(path)).notes() == []
    # As archives that are appended to have it.
    path.write_bytes(path.read_bytes() * 2)
    assert rows_of(path) == ROWS * 400
    whole = PACKED[suffix](lines.encode())
    for cut in (20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=rf"rows.jsonl{suffix}: damaged"):
            rows_of(path)


def test_values_of_parquet(tmp_path: Path) -> None:
    nan = float("nan")
    table = pa.table(
        {
            "text": pa.array([b"caf\xc3\xa9", b"\xff"]),
            "number": pa.array([nan, 1.5]),
            "nested": pa.array([{"list": [nan, 1.0], "half": None}, None]),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == [
        {"text": "café", "number": None, "nested": {"list": [None, 1.0], "half": None}},
        {"text": b"\xff", "number": 1.5, "nested": None},  # refused where it is trained
    ]
    pyarrow.parquet.write_table(pa.table({"a": [[1.0], [float("-inf")]]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet row 2: column a: the number is infinite or too large"):
        rows_of(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pa.table([[1], [2]], names=["a", "a"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: several columns have the name 'a'"):
        rows_of(tmp_path / "a.parquet")
    twice = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["k", "k"])
    nested = pa.ListArray.from_arrays(pa.array([0, 1]), twice)
    pyarrow.parquet.write_table(pa.table({"a": nested}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: within a: .*several columns have the name 'k'"):
        rows_of(tmp_path / "a.parquet")


@pytest.mark.parametrize("feature", ["Image", "Audio", "Video", "Pdf"])
def test_media_of_the_hub_are_read_past_without_their_libraries(
    feature: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    media = getattr(datasets.features, feature)()
    stored = {"bytes": b"\xff", "path": "a.bin"}
    table = pa.table({"text": ["a"], "one": [stored], "more": [[stored]]})
    rows = datasets.Dataset(
        table.cast(
            datasets.Features(
                {"text": datasets.Value("string"), "one": media, "more": datasets.List(media)}
            ).arrow_schema
        )
    )
    rows.info.features = datasets.Features(
        {"text": datasets.Value("string"), "one": media, "more": datasets.List(media)}
    )

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = find_source(f"hub/{feature.lower()}")
    wanted = [{"text": "a", "one": stored, "more": [stored]}]
    assert [row for _, row in source.rows(None)] == [row for _, row in source.read()] == wanted


def test_missing_values_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"a": [float("nan"), 1.0], "b": [[{"c": float("nan")}], []]})

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = find_source("hub/missing-values")
    wanted = [{"a": None, "b": [{"c": None}]}, {"a": 1.0, "b": []}]
    assert [row for _, row in source.rows(None)] == [row for _, row in source.read()] == wanted
    rows = datasets.Dataset.from_dict({"a": [float("inf")]})
    with pytest.raises(UserError, match="hub/infinite row 1: column a: the number is infinite"):
        list(find_source("hub/infinite").rows(None))


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        # Saved by Excel, and by an editor.
        (
            "a.csv",
            "text\n" + "word\n" * 29_999 + "caf\xe9 \u20ac5 \u201cyes\u201d\n",
            "30001: .*UTF-8.*'caf\xe9 \u20ac5 \u201cyes\u201d'",
        ),
        ("a.jsonl", '{"text": "a"}\n\n{"text": "caf\xe9"}\n', '3: .*UTF-8.*\'{"text": "caf\xe9"}\''),
        (
            "a.json",
            '[{"text": "a"},\n{"text": "' + "a" * 500 + '\xe9t\xe9"}]',
            "2: .*UTF-8.*'a{20}\xe9t\xe9\"}]'",
        ),
        ("a.csv", "text\ncaf\xe9", "2: .*UTF-8.*'caf\xe9'"),
    ],
)
def test_text_that_is_not_utf8(tmp_path: Path, name: str, content: str, said: str, suffix: str) -> None:
    path = tmp_path / (name + suffix)
    path.write_bytes(PACKED[suffix](content.encode("cp1252")))
    with pytest.raises(UserError, match=rf"{path}:{said}.*iconv -f WINDOWS-1252 -t UTF-8"):
        rows_of(path)
    # The cure works.
    path.write_bytes(PACKED[suffix](content.encode("cp1252").decode("cp1252").encode()))
    assert rows_of(path)


@pytest.mark.parametrize(
    ("beginning", "said"),
    [(b"PK\x03\x04\x14\0", "a workbook of Excel or a zip"), (b"PAR1\x15", "Parquet; .*end with .parquet")],
)
def test_files_that_are_named_as_text_are_known_by_their_content(
    tmp_path: Path, beginning: bytes, said: str
) -> None:
    (path := tmp_path / "rows.csv").write_bytes(beginning + b"\xe9\xff")
    with pytest.raises(UserError, match=rf"rows.csv: by its content {said}"):
        rows_of(path)


def test_text_in_two_bytes_a_character(tmp_path: Path) -> None:
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    for encoding in ("utf-16-le", "utf-16-be"):  # without a mark, which Python's "utf-16" writes
        (path := tmp_path / "a.jsonl").write_bytes(content.encode(encoding))
        assert rows_of(path) == ROWS
        assert find_source(str(path)).notes() == [f"{path}: read as {encoding.upper()}"]
    path.write_bytes((content * 2000).encode("utf-16") + b"\x00\xd8a\x00")
    with pytest.raises(
        UserError, match=rf"a.jsonl:{2000 * len(ROWS) + 1}: not text in UTF-16.*iconv -f ENCODING"
    ):
        rows_of(path)
    path.write_bytes(b"text\n\x81\xff\n".replace(b"text", b'{"text": 1}'))  # not of Windows either
    with pytest.raises(UserError, match=r"a.jsonl:2: not text in UTF-8.*iconv -f ENCODING"):
        rows_of(path)


def test_text_of_windows_is_told_with_the_command_that_converts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("of windows.csv")
    path.write_bytes("text\nWürde\n".encode("cp1252"))
    with pytest.raises(UserError, match="as Windows-1252 it reads 'Würde'") as told:
        rows_of(path)
    subprocess.run(str(told.value).rpartition(": ")[2], shell=True, check=True)
    assert rows_of(Path("utf8-of windows.csv")) == [{"text": "Würde"}]


def test_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", "")
    told = rf"file not found: .*trian.jsonl \(did you mean {tmp_path}/train.jsonl\?\)"
    with pytest.raises(UserError, match=told):
        find_source(str(tmp_path / "trian.jsonl"))
    with pytest.raises(UserError, match=r"file not found: .*nor is there a folder"):
        find_source(str(tmp_path / "nowhere" / "rows.json"))
    with pytest.raises(UserError, match=r"file not found: .*book.xlsx"):
        find_source("book.xlsx")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.txt", r'plain text has no rows; write each document as a line {"text": "…"} of a .jsonl file'),
        ("a.xlsx", "a workbook of Excel; save its sheet as CSV"),
        ("a.docx", "a Word document has no rows"),
        ("a.txt.gz", "plain text has no rows"),
        ("a.parquet.gz", "Parquet is compressed in itself; unpack the file"),
        ("a.jsonl.lz4", "compressed in a way that is not read here; unpack it"),
        ("a.7z", "an archive; unpack it, and name the folder"),
        ("a.bin", "not a kind of file that holds rows"),
    ],
)
def test_files_without_rows_are_refused_by_what_they_are(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(UserError, match=rf"{name}: {said}"):
        find_source(str(write(tmp_path / name, "x")))
    with pytest.raises(UserError) as error:
        find_source(str(tmp_path))
    assert f"not read, of no kind that holds rows: {name}" in str(error.value)


def test_hub_ids_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert isinstance(find_source("owner/name"), HubSource)
    assert isinstance(find_source("squad"), HubSource)
    for path in ("./name", "/a/b", "a/b/c", "~/x", "rows.json", "rows.jsonl.gz", "my rows"):
        with pytest.raises(UserError, match="file not found"):
            find_source(path)


def test_folders_are_read_by_split_and_without_metadata(tmp_path: Path) -> None:
    for name in (
        "train-0.jsonl",
        "train-1.jsonl",
        "test.jsonl",
        "data/valid.jsonl",
        "more.csv",
        ".hidden.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, "")
    write(tmp_path / "dataset_info.json", "{}")
    write(tmp_path / "README.md", "")

    def names(split: str) -> list[str]:
        source = find_source(str(tmp_path), split=split)
        assert isinstance(source, LocalSource)
        return [path.name for path in source.files]

    assert names("train") == ["more.csv", "train-0.jsonl", "train-1.jsonl"]
    assert names("test") == ["test.jsonl"]
    assert names("validation") == ["valid.jsonl"]
    assert find_source(str(tmp_path)).notes() == [
        f"{tmp_path}: not read, a description of a data set: dataset_info.json",
        f"{tmp_path}: not read, hidden: .hidden.json",
        f"{tmp_path}: not read, of no kind that holds rows: README.md",
        f"{tmp_path}: not read, of split test by the name: test.jsonl",
        f"{tmp_path}: not read, of split validation by the name: data/valid.jsonl",
        ", ".join(str(tmp_path / name) for name in ("more.csv", "train-0.jsonl", "train-1.jsonl"))
        + ": holds no row",
    ]
    with pytest.raises(
        UserError, match=r"split 'tests' \(did you mean test\?\); there are files for test, train"
    ):
        names("tests")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"the folder holds no .jsonl"):
        find_source(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("driving_test_questions.jsonl", "train"),
        ("web_dev_answers.csv", "train"),
        ("contest.jsonl", "train"),
        ("test-00000-of-00001.parquet", "test"),
        ("data/test/x.jsonl.zst", "test"),
        ("rows.dev.json.gz", "validation"),
        ("x_test_v2.jsonl", "test"),
        ("train/test_questions.jsonl", "train"),
        ("held_out.jsonl", "test"),
        ("hold-out/x.csv", "test"),
        ("my_holdout.jsonl.gz", "test"),
        ("testset.csv", "test"),
        ("x-valdata.jsonl", "validation"),
        # As the datasets library has them.
        *((f"{word}.jsonl", str(split)) for split, words in SPLIT_KEYWORDS.items() for word in words),
    ],
)
def test_a_split_is_a_names_first_or_last_word(tmp_path: Path, name: str, split: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    files, notes = files_of_folder(tmp_path, "data", split)
    assert files == [path]
    own = [f"{word}.jsonl" for word in SPLIT_KEYWORDS["train"]]
    told = f"data: of split train, though a word in the name is for another: {name}"
    assert notes == ([told] if split == "train" and name not in ("contest.jsonl", *own) else [])


def test_columns_in_names_of_folders_are_named(tmp_path: Path) -> None:
    for name in ("lang=en/year=2020/a.jsonl", "lang=fr/b.jsonl", "x/c=d.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, '{"text": "a"}\n')
    files, notes = files_of_folder(tmp_path, "d", "train")
    assert len(files) == 3
    assert notes == ["d: not read, columns in the names of folders: lang=en, lang=fr, year=2020"]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for path in (folder / "z" / "a.jsonl", elsewhere / "in" / "b.jsonl", elsewhere / "c.jsonl"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, '{"text": "x"}\n')
    links = {"a": "z", "inner": elsewhere / "in", "outer": elsewhere, "self": ".", "up": "..", "gone": "x"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    (elsewhere / "back").symlink_to(folder)
    (elsewhere / "round").symlink_to(elsewhere)
    source = find_source(str(folder))
    assert source.parts() == [str(folder / each) for each in ("inner/b.jsonl", "outer/c.jsonl", "z/a.jsonl")]
    assert source.notes() == [
        f"{folder}: not read, a broken link: gone",
        f"{folder}: not read, a folder that is read by another name: a, outer/in",
        f"{folder}: not read, a link to a folder that it lies in: self, up, outer/back, outer/round",
    ]


def test_files_with_other_columns_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"instruction": "x", "output": "y"}\n')
    write(tmp_path / "b.jsonl", '{"text": "x"}\n')
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    told = f"{tmp_path}: the files' columns differ: {a}: instruction, output; {b}: text"
    assert find_source(str(tmp_path)).notes() == [told]


KINDS = [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".bin", ""]
FATES = ["whole"] * 8 + ["cut", "empty", "link", "broken", "linked folder"]


@fuzz(80)
@given(
    files=st.lists(
        st.tuples(
            st.sampled_from(["", "sub", "sub/deep", "val", ".hidden", "up"]),
            st.sampled_from(["a", "train", "test-", "driving_test_x", "x_dev", ".h", "é $b$", "\x1b[31m"]),
            st.sampled_from(KINDS),
            st.sampled_from(["", "", *PACKED]),
            st.sampled_from(FATES),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_every_file_of_a_folder_is_read_or_named_or_refused(files):
    with tempfile.TemporaryDirectory() as top:
        folder, elsewhere = Path(top, "data"), Path(top, "elsewhere")
        elsewhere.mkdir()
        written = {}
        for number, (place, stem, kind, packing, fate) in enumerate(files):
            path = folder / place / f"{stem}{number}{kind}{packing}"
            path.parent.mkdir(parents=True, exist_ok=True)
            content = PACKED[packing](content_of(kind, f"row {number}"))
            if fate == "linked folder":
                path, target = path.parent / f"folder{number}" / path.name, elsewhere / str(number)
                target.mkdir()
                path.parent.symlink_to(target)
            elif fate in ("link", "broken"):
                path.symlink_to(elsewhere / path.name)
            if fate != "broken":
                path.write_bytes({"cut": content[: len(content) // 2], "empty": b""}.get(fate, content))
            written[f"row {number}"] = path
        read, told, refused = set(), "", False
        try:
            source = find_source(str(folder))
            read = {row["text"] for _, row in source.read()}
            told = "\n".join(source.notes())
        except UserError as error:
            told, refused = str(error), True
        named = []
        for text, path in written.items():
            inside = path.relative_to(folder)
            named.append(text in read or str(".hidden" if inside.parts[0] == ".hidden" else inside) in told)
        # What is refused is one of the files, or all of them where none is of the split.
        assert any(named) or "there are files for" in told if refused else all(named)


def content_of(kind: str, text: str) -> bytes:
    if kind == ".parquet":
        sink = pa.BufferOutputStream()
        pyarrow.parquet.write_table(pa.table({"text": [text]}), sink)
        return sink.getvalue().to_pybytes()
    tables = {".csv": f"text;b\n{text};\n", ".tsv": f"text\tb\n{text}\t\n"}
    return tables.get(kind, json.dumps({"text": text})).encode()


def test_identity_is_of_the_content(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", "1"), write(tmp_path / "b.jsonl", "1")
    assert find_source(str(first)).identity() == find_source(str(second)).identity()
    write(second, "2")
    assert find_source(str(first)).identity() != find_source(str(second)).identity()


def test_hub_that_cannot_be_reached_says_how_to_run_offline() -> None:
    with pytest.raises(UserError) as error:
        find_source("owner/name").columns()
    message = str(error.value)
    assert "owner/name: the hub cannot be reached" in message
    assert "falcon-qlora prepare" in message
    assert "HF_HUB_OFFLINE=1" in message


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (ValueError("Unknown split \"trian\". Should be one of ['train'].\nmore"), "Unknown split"),
        (FileNotFoundError("no data files"), "no data files"),
        (TimeoutError("slow"), "cannot be reached"),
    ],
)
def test_what_the_hub_library_raises_becomes_one_line(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, said: str
) -> None:
    import datasets

    def fail(*args: Any, **kwargs: Any) -> None:
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=said):
        find_source("owner/other", split="trian").columns()


def test_what_is_not_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*args: Any, **kwargs: Any) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"a/b: no such data set on the hub, nor a file or folder"):
        find_source("a/b").columns()


def test_the_packaged_rows_have_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from falcon_qlora.data import sample_data

    monkeypatch.chdir(tmp_path)
    rows = write(tmp_path / "packaged.jsonl", '{"text": "x"}\n')
    monkeypatch.setattr(sample_data, "path", lambda: rows)
    source = find_source("sample")
    assert isinstance(source, LocalSource)
    assert source.files == (rows,)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_streams_one_after_another_are_read_and_damage_in_a_later_one_is_told(
    suffix: str, tmp_path: Path
) -> None:
    first, second = (PACKED[suffix](json.dumps({"text": text}).encode() + b"\n") for text in "ab")
    file = tmp_path / f"rows.jsonl{suffix}"
    padding = bytes(200_000 * (suffix == ".xz"))
    file.write_bytes(first + padding + second + padding)
    assert [row for _, row in iterate_rows(file)] == [{"text": "a"}, {"text": "b"}]
    for damaged in (b"\1" + second[1:], b"garbage", second[:-9]):
        file.write_bytes(first + damaged)
        with pytest.raises(UserError, match=r"rows.jsonl.*: damaged \w+ file"):
            list(iterate_rows(file))
    plain = tmp_path / "rows.jsonl"
    plain.write_bytes(first)
    with pytest.raises(UserError, match=rf"rows.jsonl: compressed; name it rows.jsonl{suffix}"):
        list(iterate_rows(plain))


def test_a_file_that_is_linked_beside_itself_is_read_once(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"text": "a"}\n')
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    files, notes = files_of_folder(tmp_path, "rows", "train")
    assert [file.name for file in files] == ["a.jsonl"]
    assert notes == ["rows: not read, a link to a file that lies here too: link.jsonl"]


def test_numbers_of_classes_are_told(tmp_path: Path) -> None:
    import datasets

    rows = {"prompt": ["Is it good?"], "completion": [1]}
    classes = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"prompt": datasets.Value("string"), "completion": classes})
    path = tmp_path / "classes.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    (told,) = find_source(str(path)).notes()
    assert "column completion holds numbers of classes" in told
    assert "['no', 'yes']" in told
    for metadata in (b"[]", b"{", b'{"info": 1}', b'{"info": {"features": {"prompt": "x"}}}'):
        table = pa.table({"prompt": ["a"]}).replace_schema_metadata({b"huggingface": metadata})
        pyarrow.parquet.write_table(table, path)
        assert find_source(str(path)).notes() == []
