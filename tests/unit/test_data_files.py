"""Rows from files: what is read, and what is said where it cannot be."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from falcon_qlora.common.errors import UserError
from falcon_qlora.data import json_rows
from falcon_qlora.data.files import iterate_rows
from falcon_qlora.data.sources import HubSource, LocalSource, find_source

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
    for place, _ in iterate_rows(path):
        assert lines[int(place.rsplit(":", 1)[1]) - 1].strip() == "{"


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_json_array_is_read_in_pieces_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(json_rows, "_CHUNK", chunk)
    path = write(tmp_path / "rows.json", json.dumps(ROWS, indent=1))
    assert rows_of(path) == ROWS
    broken = write(tmp_path / "broken.json", json.dumps(ROWS, indent=1).replace('"n": 5', '"n" 5'))
    line = next(n for n, text in enumerate(broken.read_text().splitlines(), 1) if '"n" 5' in text)
    with pytest.raises(UserError, match=rf"broken.json:{line}: not valid JSON"):
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
        ("a.jsonl", '{"text": "x"}\n[1]\n', r"a.jsonl:2: expected a JSON object.* found list"),
        ("a.json", '[{"text": "x"},\n {"text": }]', r"a.json:2: not valid JSON"),
        ("a.json", '[{"text": "x"}\n {"text": "y"}]', r"a.json:2: not valid JSON: expected a comma"),
        ("a.json", '[{"text": "x"},\n]', r"a.json:2: not valid JSON"),
        ("a.json", '[{"text": "x"}\n', r"a.json:2: not valid JSON: the array's closing bracket is missing"),
        ("a.json", '[{"text": "x"}]\n{', r"a.json:2: not valid JSON: something follows"),
        ("a.json", '[{"text": "x"}, 3]', r"a.json:1: expected a JSON object.* found int"),
        ("a.csv", "text,b\nx,y\nz\n", r"a.csv:3: 1 fields, but the header has 2 columns"),
        ("a.csv", 'text\n"x\n', r"a.csv:\d+: not valid CSV"),
        ("a.parquet", "no parquet", r"a.parquet: not a valid Parquet file"),
        ("a.jsonl.gz", "no gzip", r"a.jsonl.gz: damaged gzip file"),
    ],
)
def test_malformed_files_are_told_with_their_line(tmp_path: Path, name: str, content: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        rows_of(write(tmp_path / name, content))


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    with pytest.raises(UserError, match=r"a.jsonl: not text in UTF-8"):
        rows_of(tmp_path / "a.jsonl")


def test_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", "")
    with pytest.raises(UserError, match=r"file not found: .*trian.jsonl \(did you mean train.jsonl\?\)"):
        find_source(str(tmp_path / "trian.jsonl"))
    with pytest.raises(UserError, match=r"file not found: .*nor is there a folder"):
        find_source(str(tmp_path / "nowhere" / "rows.json"))
    with pytest.raises(UserError, match=r"notes.txt: not a kind of file"):
        find_source(str(write(tmp_path / "notes.txt", "x")))


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
    with pytest.raises(
        UserError, match=r"split 'tests' \(did you mean test\?\); there are files for test, train"
    ):
        names("tests")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"the folder holds no .jsonl"):
        find_source(str(tmp_path / "empty"))


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
