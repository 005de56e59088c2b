"""Streams: the same documents as a corpus has, in an order that a seed decides, never held as a whole."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from falcon_qlora.common.errors import UserError
from falcon_qlora.data import json_rows, sources
from falcon_qlora.data import stream as streams
from falcon_qlora.data.account import Account
from falcon_qlora.data.corpus import prepare_corpora
from falcon_qlora.data.sources import find_source
from falcon_qlora.data.stream import stream_documents
from tests.small_tokenizer import small_tokenizer


def write(path: Path, name: str, count: int) -> str:
    rows = [{"prompt": f"{name} {n}", "completion": f" {n}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def stream(*names: str, **changes: Any) -> list[str]:
    chosen = {"dataset_name": list(names), "max_length": 64, "tokenizer": small_tokenizer()}
    documents = stream_documents(**(chosen | changes))
    return [str(small_tokenizer().decode(document["input_ids"])) for document in documents]


def test_a_stream_has_the_documents_of_the_corpus(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "a", 200)
    common = {"dataset_name": [path], "max_length": 9, "tokenizer": small_tokenizer()}
    corpus, _ = prepare_corpora(**common, tokenizer_fingerprint="small", cache_dir=tmp_path / "cache")
    wanted = sorted((tuple(row["input_ids"]), tuple(row["mask"])) for row in corpus.dataset)
    streamed = list(stream_documents(**common, shuffle_buffer=16))
    assert sorted((tuple(d["input_ids"].tolist()), tuple(d["mask"].tolist())) for d in streamed) == wanted
    assert streamed[0]["input_ids"].dtype == np.int32
    assert len(datasets.Dataset.from_list(streamed)) == len(wanted)


def test_order_is_decided_by_seed_and_epoch(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "a", 100)
    first = stream(path, seed=1, shuffle_buffer=20)
    assert first == stream(path, seed=1, shuffle_buffer=20)
    assert first != stream(path, seed=2, shuffle_buffer=20)
    assert first != stream(path, seed=1, epoch=1, shuffle_buffer=20)
    assert sorted(first) == sorted(stream(path, seed=1, epoch=1, shuffle_buffer=20))
    assert stream(path, shuffle_buffer=1)[0].startswith("a 0")


def test_only_the_buffer_is_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", "a", 2000)
    read = itertools.count()
    iterate = sources.iterate_rows

    def counted(file: Path, **how: Any) -> Iterator[Any]:
        for row in iterate(file, **how):
            next(read)
            yield row

    monkeypatch.setattr(sources, "iterate_rows", counted)
    documents = stream_documents(
        dataset_name=[path], max_length=64, tokenizer=small_tokenizer(), shuffle_buffer=100
    )
    next(documents)
    assert next(read) <= 100 + 64 + 100


def test_weights_and_turns(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", "a", 20), write(tmp_path / "b.jsonl", "b", 200)
    turns = stream(first, second, shuffle_buffer=1)
    assert [text[0] for text in turns[:40]] == ["a", "b"] * 20
    assert len(turns) == 220
    drawn = Counter(text[0] for text in stream(first, second, dataset_weights=[3.0, 1.0]))
    # Rows of a repetition are not counted again.
    gap = tmp_path / "gap.jsonl"
    gap.write_text('{"prompt": "a", "completion": ""}\n{"prompt": "a", "completion": "b", "id": 1}\n')
    account = Account()
    stream(str(gap), second, dataset_weights=[3.0, 1.0], account=account)
    assert (account.counts["rows_rendered"], account.counts["rows_read"]) == (202, 202)
    assert (account.dropped, account.columns) == ({"empty answer": 1}, {"id": 1})
    # The second has 200 rows and is read once; the first starts again until then.
    assert drawn["b"] == 200
    assert 400 < drawn["a"] < 800


def test_rows_are_limited_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a b c"}\n{"text": ""}\n' * 10)
    account = Account()
    assert len(stream(str(path), max_rows=6, account=account, shuffle_buffer=1)) == 3
    assert account.counts == {"rows_rendered": 6, "rows_read": 6}
    assert account.dropped == {"empty answer": 3}
    assert account.first["empty answer"] == f"{path}:2"
    path.write_text('{"text": "a b c d e f g h"}\n')
    for overlong, counted in (("truncate", "rows_truncated"), ("split", "rows_split")):
        account = Account()
        stream(str(path), account=account, max_length=6, overlong=overlong)
        assert +account.counts == {"rows_rendered": 1, "rows_read": 1, counted: 1}
    with pytest.raises(UserError, match=r"--max_rows 1: must be at least 2, one for each data set"):
        stream(str(path), str(path), max_rows=1)


def test_the_format_is_that_of_the_first_file_whichever_is_read_first(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "a", 120)
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n' * 120)
    for epoch in range(6):
        account = Account()
        texts = stream(str(tmp_path), epoch=epoch, account=account)
        assert {text[0] for text in texts} == {"a"}, epoch
        assert [(why[:25], rows) for why, rows in account.dropped.items()] == [
            ("of another format, text: ", 120)
        ]


def test_hub_streams_are_read_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_dict({"text": [f"text {n}" for n in range(30)]})

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        assert streaming
        return rows.to_iterable_dataset(num_shards=3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    texts = stream("hub/texts-streamed", shuffle_buffer=1)
    assert len(set(texts)) == 30


def test_bad_streams_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(UserError, match="the data is empty"):
        stream(str(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_text('{"text": "x y"}\n{"text": \n')
    with pytest.raises(UserError, match=r"b.jsonl:2: not valid JSON"):
        stream(str(tmp_path / "b.jsonl"))
    with pytest.raises(UserError, match="--dataset_weights has 1 numbers"):
        stream("a/b", "c/d", dataset_weights=[1.0])


def plain(documents: Iterator[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
    return [(each["input_ids"].tolist(), each["mask"].tolist()) for each in documents]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shuffle_buffer": 1, "overlong": "split", "max_length": 5},
        {"shuffle_buffer": 90},  # more than is made into documents at once
        {"dataset_weights": [3.0, 1.0, 1.0]},
        {"dataset_weights": [1.0, 3.0, 1.0], "shuffle_buffer": 1},
        {"max_rows": 130, "overlong": "drop", "max_length": 9},
    ],
    ids=str,
)
def test_a_stream_goes_on_from_any_state_of_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Three data sets, of them a folder with a file of each kind; the state as it comes out of JSON."""
    rows = [{"prompt": f"m {n}", "completion": f" {'m ' * (n % 5)}{n}"} for n in range(90)]
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows[:20])))
    (folder / "b.json").write_text(json.dumps(rows[20:40], indent=1))
    with gzip.open(folder / "c.csv.gz", "wt") as handle:
        handle.write(
            "prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in rows[40:60])
        )
    pq.write_table(pa.Table.from_pylist(rows[60:]), folder / "d.parquet", row_group_size=7)
    common: dict[str, Any] = {
        "dataset_name": [
            str(folder),
            write(tmp_path / "x.jsonl", "x", 30),
            write(tmp_path / "y.jsonl", "y", 110),
        ],
        "max_length": 64,
        "tokenizer": small_tokenizer(),
        "shuffle_buffer": 16,
        "epoch": 1,
    }
    whole = plain(stream_documents(**common | changes))
    assert len(whole) > 60
    stream = stream_documents(**common | changes)
    for given in range(len(whole) + 1):
        if given % 11 == 0 or given > len(whole) - 3:
            state = json.loads(json.dumps(stream.state()()))
            again = stream_documents(**common | changes, state=state)
            assert plain(itertools.islice(again, 40)) == whole[given : given + 40], given
        next(stream, None)


def test_what_lies_behind_a_state_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", "a", 3000)
    common: dict[str, Any] = {
        "dataset_name": [path],
        "max_length": 64,
        "tokenizer": small_tokenizer(),
        "shuffle_buffer": 50,
    }
    stream = stream_documents(**common)
    for _ in range(2900):
        next(stream)
    state = stream.state()()
    rest = plain(stream)
    parsed: list[Any] = []
    real = json_rows.parse_json
    monkeypatch.setattr(json_rows, "parse_json", lambda *line: (parsed.append(line), real(*line))[1])
    assert plain(stream_documents(**common, state=state)) == rest
    # What was buffered, or made into documents, comes out of the state.
    assert len(parsed) < len(rest) == 100


# Each reader of Parquet files that datasets closes sleeps for a while.
@pytest.mark.parametrize("kind", ["memory", pytest.param("parquet", marks=pytest.mark.slow)])
def test_hub_streams_go_on_where_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    rows = datasets.Dataset.from_dict({"text": [f"text {n} of it" for n in range(300)]})
    paths = []
    for shard in range(4):
        paths.append(str(tmp_path / f"{shard}.parquet"))
        rows.shard(4, shard).to_parquet(paths[-1], batch_size=10)

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        if kind == "memory":
            return rows.to_iterable_dataset(num_shards=3)
        return datasets.IterableDataset.from_parquet(paths)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    common: dict[str, Any] = {
        "dataset_name": [f"hub/texts-{kind}"],
        "max_length": 64,
        "tokenizer": small_tokenizer(),
        "shuffle_buffer": 8,
    }
    whole = plain(stream_documents(**common))
    assert len(whole) == 300
    stream = stream_documents(**common)
    for given in range(301):
        if given % (37 if kind == "memory" else 130) == 0 or given == 300:
            state = json.loads(json.dumps(stream.state()()))
            assert plain(stream_documents(**common, state=state)) == whole[given:], given
        next(stream, None)


class TestDescription:
    def test_a_small_source_is_hashed_whole_and_a_large_one_at_its_ends(self, tmp_path, monkeypatch):
        file = tmp_path / "rows.jsonl"
        file.write_bytes(b"a" * 10 + b"b" * 10 + b"c" * 10)
        small = find_source(str(file)).describe()
        whole = hashlib.sha256(file.read_bytes()).hexdigest()
        assert small["files"] == [{"file": str(file), "bytes": 30, "sha256": whole}]
        monkeypatch.setattr(sources, "_HASHED_WHOLE_BYTES", 30)
        monkeypatch.setattr(sources, "_HASHED_END_BYTES", 10)
        os.utime(file, (0, 86400))
        before = [find_source(str(file)).describe()]
        ends = hashlib.sha256(b"a" * 10 + b"c" * 10).hexdigest()
        about = {"modified": "1970-01-02T00:00:00+00:00", "sha256_of_ends": ends}
        assert before[0]["files"] == [{"file": str(file), "bytes": 30, **about}]
        for content, when, told in (
            (b"a" * 10 + b"B" * 10 + b"c" * 10, 86400, None),  # what it cannot see
            (b"a" * 30, 86400, "checksum of its ends differs"),
            (b"a" * 10 + b"b" * 10 + b"c" * 10, 86401, "was modified 1970-01-02T00:00:01+00:00 instead of"),
        ):
            file.write_bytes(content)
            os.utime(file, (0, when))
            found = streams.changed_source(before, [find_source(str(file)).describe()])
            assert found is None if told is None else told in found

    def test_a_data_set_of_the_hub_is_known_by_its_commit(self, monkeypatch):
        def at(commit: str) -> list[Any]:
            builder = SimpleNamespace(hash=commit)
            monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, config: builder)
            return [find_source("some/data").describe()]

        assert at("c0ffee") == [{"name": "some/data", "commit": "c0ffee"}]
        assert streams.changed_source(at("c0ffee"), at("c0ffee")) is None
        told = "some/data at commit beef instead of some/data at c0ffee"
        assert streams.changed_source(at("c0ffee"), at("beef")) == told
        local = [{"name": "rows.jsonl", "files": []}]
        assert streams.changed_source(local, at("beef")) == "some/data instead of rows.jsonl"
