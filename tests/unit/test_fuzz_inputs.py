"""Files that a user names - settings, prompts, templates, rows, figures - changed at random."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falcon_qlora.bench.records import COLUMNS, append_csv, check_csv
from falcon_qlora.commands.generate import GenerateArguments, _prompts
from falcon_qlora.config.configuration import parse
from falcon_qlora.config.parser import RECIPES
from falcon_qlora.data.templates import Turn, get_template
from falcon_qlora.data.tokenize import prepare_corpora
from tests.fuzzing import change, fresh_copy, fuzz, read_or_refused
from tests.small_tokenizer import small_tokenizer

ROWS = [{"instruction": f"Say {n}.", "input": "", "output": f'It is {n}, "so".'} for n in range(5)]
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}Q: {{ message['content'] }}\n"
    "{% else %}A: {% generation %}{{ message['content'] }}{% endgeneration %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    settings = (
        "model_name_or_path: tiny\nlearning_rate: 1e-4\nlora_target_modules: [dense]\nrecipe: default\n"
    )
    settings += "lr_scheduler_kwargs: {a: 1}\ndataset_name: [sample]\nlora_r: 8\npacking: true\n"
    (folder / "settings.yaml").write_text(settings)
    (folder / "recipe.yaml").write_text((RECIPES / "default.yaml").read_text())
    (folder / "prompts.json").write_text(json.dumps(["Who?", "What?"]))
    (folder / "template.jinja").write_text(TEMPLATE)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "rows.jsonl").write_text(lines)
    (folder / "rows.ndjson").write_text(lines)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "rows.json").write_text(json.dumps(ROWS, indent=1))
    (folder / "wrapped.json").write_text(json.dumps({"data": ROWS}))
    with (folder / "rows.csv").open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet")
    append_csv(folder / "bench.csv", [dict.fromkeys(COLUMNS, 1)])
    return folder


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return small_tokenizer()


DATA = ["rows.jsonl", "rows.ndjson", "rows.jsonl.gz", "rows.json", "wrapped.json", "rows.csv", "rows.parquet"]


@fuzz(100)
@given(data=st.data(), name=st.sampled_from(DATA))
def test_rows(good, scratch, tokenizer, data, name):
    folder = fresh_copy(good, scratch)
    change(data.draw, folder / name, named_by_user=True)

    def read() -> None:
        corpus, _ = prepare_corpora(
            dataset_name=[str(folder / name)],
            max_length=32,
            tokenizer=tokenizer,
            tokenizer_fingerprint="x",
            cache_dir=scratch / "cache",
        )
        assert corpus.lengths.sum() > 0

    read_or_refused(folder, read, lines=9)  # which columns each format needs


@fuzz(60)
@given(data=st.data(), name=st.sampled_from(["settings.yaml", "recipe.yaml"]))
def test_settings(good, scratch, data, name):
    folder = fresh_copy(good, scratch)
    change(data.draw, folder / name, named_by_user=True)
    flag = "--config" if name == "settings.yaml" else "--recipe"
    read_or_refused(folder, lambda: parse([flag, str(folder / name)]))


@fuzz(30)
@given(data=st.data())
def test_prompts(good, scratch, data):
    folder = fresh_copy(good, scratch)
    change(data.draw, folder / "prompts.json", named_by_user=True)
    read_or_refused(folder, lambda: _prompts(GenerateArguments(prompt_file=str(folder / "prompts.json"))))


@fuzz(60)
@given(data=st.data())
def test_templates(good, scratch, data):
    folder = fresh_copy(good, scratch)
    change(data.draw, folder / "template.jinja", named_by_user=True)
    turns = [Turn("user", "a"), Turn("assistant", "b")]

    def read() -> None:
        template = get_template(str(folder / "template.jinja"))
        template.segments(turns)
        template.prompt(turns[:1])

    read_or_refused(folder, read)


@fuzz(30)
@given(data=st.data())
def test_bench_csv(good, scratch, data):
    folder = fresh_copy(good, scratch)
    change(data.draw, folder / "bench.csv", named_by_user=True)

    def read() -> None:
        check_csv(folder / "bench.csv")
        append_csv(folder / "bench.csv", [dict.fromkeys(COLUMNS, 1)])

    read_or_refused(folder, read)
