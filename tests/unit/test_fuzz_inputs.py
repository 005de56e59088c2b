"""Files that a user names - settings, prompts, templates, rows, figures - changed at random."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from falcon_qlora.bench.tables import COLUMNS, append_csv, check_csv
from falcon_qlora.commands.generate import GenerateArguments, _prompts
from falcon_qlora.common import by_url
from falcon_qlora.config.configuration import parse
from falcon_qlora.config.parser import RECIPES
from falcon_qlora.data.corpus import prepare_corpora
from falcon_qlora.data.templates import Turn, get_template
from falcon_qlora.run_folder import lock
from tests.fuzzing import JSON, change, fresh_copy, fuzz, read_or_refused
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
    (folder / "tokens.txt").write_text("<|a|>\n<|b|>\n")
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "rows.jsonl").write_text(lines)
    (folder / "rows.ndjson").write_text(lines)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "rows.ndjson.bz2").write_bytes(bz2.compress(lines.encode()))
    (folder / "rows.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    (folder / "rows.jsonl.zst").write_bytes(pa.Codec("zstd").compress(lines.encode(), asbytes=True))
    (folder / "rows.json").write_text(json.dumps(ROWS, indent=1))
    (folder / "columns.json").write_text(json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}))
    (folder / "wrapped.json").write_text(json.dumps({"data": ROWS}))
    with (folder / "rows.csv").open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet")
    append_csv(folder / "bench.csv", [dict.fromkeys(COLUMNS, 1)])
    return folder


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


DATA = ["rows.ndjson.bz2", "rows.jsonl.xz", "rows.jsonl.zst", "columns.json"]
DATA += "rows.jsonl rows.ndjson rows.jsonl.gz rows.json wrapped.json rows.csv rows.parquet".split()
EXPRESSIONS = ["{{ 1 / 0 }}", "{{ messages + 1 }}", "{{ 'a' * 10 ** 15 }}", "{{ x.y.z }}"]
EXPRESSIONS += ["{% include '/etc/passwd' %}", "{{ ''.__class__.__mro__ }}", "{% for i in range(10 ** 9) %}"]
# Of this many, written out, no memory holds the last.
ALIASES = ["a0: &a0 [x, x]", *(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]" for n in range(60))]
TORN = bytearray(gzip.compress(json.dumps(ROWS).encode() * 9))
TORN[40:60] = bytes(20)
DEEP, LONG = "[" * 100_000, "9" * 5000


@fuzz(60)
@given(content=st.binary(max_size=1200) | JSON.map(json.dumps).map(str.encode))
def test_what_a_lock_tells_of_its_holder(scratch, content):
    """One short line whatever the file of a held lock holds."""
    file = scratch / "lock"
    file.write_bytes(content)
    with file.open("rb") as opened:
        told = lock._named(lock._read(opened.fileno()))
    assert told.isprintable()
    assert len(told) < 300


@fuzz(60)
@given(content=st.binary(max_size=99) | JSON.map(json.dumps) | JSON.map(lambda run: json.dumps({"run": run})))
@example(content='{"run": "../../x"}')
def test_what_a_mark_at_an_address_says(content):
    """Names of runs that can be in a folder's name."""
    run = by_url.mark_of(lambda: content).get("run", "none")
    assert Path("/runs/it").with_name(f"it-{run[:8]}").parent == Path("/runs")


def read_rows(file: Path) -> None:
    corpus, _ = prepare_corpora(
        dataset_name=[str(file)],
        max_length=32,
        tokenizer=small_tokenizer(),
        tokenizer_fingerprint="small",
        cache_dir=file.parent.parent / "cache",
    )
    assert corpus.lengths.sum() > 0


def read_settings(file: Path) -> None:
    parse(["--config" if file.name == "settings.yaml" else "--recipe", str(file)])


def read_prompts(file: Path) -> None:
    assert _prompts(GenerateArguments(prompt_file=str(file)))


def read_template(file: Path) -> None:
    template = get_template(str(file))
    turns = [Turn("user", "a"), Turn("assistant", "b")]
    assert all(segment.text or segment.end for segment in template.segments(turns))
    template.prompt(turns[:1])


def read_tokens(file: Path) -> None:
    assert parse(["--new_tokens", str(file)]).method.new_token_count


def read_figures(file: Path) -> None:
    check_csv(file)
    append_csv(file, [dict.fromkeys(COLUMNS, 1)])


READERS = {
    **dict.fromkeys(DATA, read_rows),
    "settings.yaml": read_settings,
    "recipe.yaml": read_settings,
    "prompts.json": read_prompts,
    "template.jinja": read_template,
    "bench.csv": read_figures,
    "tokens.txt": read_tokens,
}
# Which columns each format needs is told line by line.
LINES = 10


@fuzz(60)
@given(data=st.data(), name=st.sampled_from(sorted(READERS)))
def test_files_that_a_user_names(good, scratch, data, name):
    folder = fresh_copy(good, scratch)
    change(data.draw, folder / name, named_by_user=True)
    lines = LINES if name in DATA else 1
    read_or_refused(folder, lambda: READERS[name](folder / name), lines=lines, or_about=("--", "unknown"))


@pytest.mark.parametrize("name", READERS)
def test_what_is_good_is_read(good, tmp_path, name):
    READERS[name](fresh_copy(good, tmp_path) / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("template.jinja", expression) for expression in EXPRESSIONS),
        *((name, text) for name in ("rows.jsonl", "rows.json", "prompts.json") for text in (DEEP, LONG)),
        *(("rows.jsonl", f'{{"text": {text}}}') for text in (DEEP, LONG)),
        ("settings.yaml", DEEP),
        ("settings.yaml", "max_steps: 2001-99-99"),
        ("settings.yaml", f"lr_scheduler_kwargs: {{{', '.join(ALIASES)}}}"),
        ("settings.yaml", "lr_scheduler_kwargs: {a: &a [x], b: *a}"),
        ("rows.jsonl.gz", bytes(TORN)),
        ("settings.yaml", f"max_steps: {LONG}"),
    ],
)
def test_what_is_seldom_come_by(good, tmp_path, name, content):
    folder = fresh_copy(good, tmp_path)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    def read() -> bool:
        READERS[name](folder / name)
        return True

    assert read_or_refused(folder, read, or_about=("--", "max_steps")) is None
