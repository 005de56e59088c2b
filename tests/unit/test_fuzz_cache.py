"""Tokenized rows in the cache, changed at random: they are made again, never trained on as they are."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falcon_qlora.data.corpus import prepare_corpora
from tests.fuzzing import change, fresh_copy, fuzz, read_or_refused, with_bytes_changed
from tests.small_tokenizer import small_tokenizer

FILES = ["documents.arrow", "meta.json"]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    rows = [{"instruction": f"Say {number}.", "output": f"It is {number}."} for number in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokens_of(folder)
    (entry,) = (folder / "cache").iterdir()
    assert sorted(file.name for file in entry.iterdir()) == FILES
    return folder


def tokens_of(folder: Path) -> tuple[str, Any, list[str]]:
    """The fingerprint and the tokens that training gets, and what was said."""
    said: list[str] = []
    corpus, _ = prepare_corpora(
        dataset_name=[str(folder / "rows.jsonl")],
        max_length=64,
        tokenizer=small_tokenizer(),
        tokenizer_fingerprint="small",
        cache_dir=folder / "cache",
        progress=said.append,
    )
    statistics = asdict(corpus.statistics)
    return corpus.fingerprint, (corpus.dataset.to_dict(), corpus.lengths.tolist(), statistics), said


@fuzz(10)
@given(data=st.data(), name=st.sampled_from(FILES), anywhere=st.booleans())
def test_no_damage_of_the_cache_changes_the_tokens(good, tmp_path_factory, data, name, anywhere):
    folder = fresh_copy(good, tmp_path_factory.getbasetemp() / "cache")
    (entry,) = (folder / "cache").iterdir()
    before = (entry / name).read_bytes()
    (with_bytes_changed if anywhere else change)(data.draw, entry / name)
    is_file = (entry / name).is_file() and (entry / name).stat().st_size < 2**30
    altered = not is_file or (entry / name).read_bytes() != before
    found = read_or_refused(folder, lambda: tokens_of(folder))
    if found is None:
        return
    fingerprint, tokens, said = found
    assert (fingerprint, tokens) == tokens_of(good)[:2]
    assert name != "documents.arrow" or altered == any("tokenized again" in line for line in said)
    # And then it is whole.
    assert tokens_of(folder)[2] == []


def test_entries_of_before_are_made_again(good, tmp_path):
    folder = fresh_copy(good, tmp_path)
    (entry,) = (folder / "cache").iterdir()
    meta = json.loads((entry / "meta.json").read_text())
    (entry / "meta.json").write_text(json.dumps({name: meta[name] for name in ("content", "source")}))
    fingerprint, tokens, said = tokens_of(folder)
    assert (fingerprint, tokens) == tokens_of(good)[:2]
    assert any("is tokenized again" in line for line in said)
    assert len(os.listdir(folder / "cache")) == 1
