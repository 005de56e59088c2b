"""The report on what the model will see, by itself and through the command line."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from falcon_qlora.__main__ import main
from falcon_qlora.checkpoint.manifest import write_manifest
from falcon_qlora.common.errors import UserError
from falcon_qlora.config import parse
from falcon_qlora.data import report
from falcon_qlora.data.corpus import prepare_corpora
from falcon_qlora.data.cursor import check_cursor
from falcon_qlora.data.packing import Plan, fill
from falcon_qlora.methods.adapter_folder import write_record
from falcon_qlora.models.fingerprint import tokenizer_fingerprint as fingerprint_of
from falcon_qlora.models.tiny import tiny_path
from falcon_qlora.training.rows import TrainingData, told_at_end, training_data
from falcon_qlora.training.same_run import check_data
from tests.small_tokenizer import END, small_tokenizer

LONG_TAIL = [*range(1, 60)] * 9 + [2000, 100_000]


def printed(what: object) -> str:
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        console.print(what)
    return capture.get()


def test_the_trained_part_is_set_off() -> None:
    tokenizer = small_tokenizer()
    ids = [*tokenizer("what is it? yes é")["input_ids"], tokenizer.eos_token_id]
    answer = len(tokenizer("what is it?")["input_ids"])
    mask = [0] * answer + [1] * (len(ids) - answer)
    assert str(report.document_text(ids, mask, tokenizer, color=False)) == f"what is it?⟦ yes é{END}⟧"
    colored = report.document_text(ids, mask, tokenizer)
    assert str(colored) == f"what is it? yes é{END}"
    assert [str(colored)[span.start : span.end] for span in colored.spans if "green" in str(span.style)] == [
        f" yes é{END}"
    ]
    order = report.document_text(tokenizer("\x1b[31m\ta\n")["input_ids"], [0] * 99, tokenizer, color=False)
    assert str(order) == "\\x1b[31m\ta\n"
    # Nothing predicts the first token, whatever the mask says of it.
    everything = report.document_text(ids, [1] * len(ids), tokenizer, color=False)
    assert not str(everything).startswith("⟦")


def test_long_documents_show_beginning_and_end() -> None:
    ids = small_tokenizer()(" ".join(map(str, range(2000))))["input_ids"]
    text = str(report.document_text(ids, [0] * len(ids), small_tokenizer()))
    assert text.startswith("0 1 2")
    assert text.endswith("1998 1999")
    assert f"{len(ids) - 600:,} tokens more" in text


@pytest.mark.parametrize("lengths", [[1], [777], [5, 5, 5], list(range(1, 2049)), [100_000, 3], LONG_TAIL])
def test_histogram_counts_every_document_once(lengths: list[int]) -> None:
    bins = report.histogram(np.array(lengths))
    assert sum(count for _, _, count in bins) == len(lengths)
    assert len(bins) <= 18
    assert bins[0][2] > 0
    assert bins[-1][2] > 0
    for first, last, count in bins:
        assert count == sum(first <= length <= last for length in lengths)
    assert printed(report.histogram_text(np.array(lengths)))


def test_a_long_tail_leaves_the_others_told_apart() -> None:
    bins = report.histogram(np.array(LONG_TAIL))
    assert max(count for _, _, count in bins) < len(LONG_TAIL) * 0.6


# Of a file that is named so, matplotlib would read a formula, and a terminal an order.
@pytest.mark.parametrize("title", ["a$b_$.jsonl", "$\\frac{$", "\x1b[1m\x00\ud800", "数据" * 99, "x y " * 99])
@pytest.mark.filterwarnings("error")
def test_pictures_of_any_name(tmp_path: Path, title: str) -> None:
    for lengths in ([1], LONG_TAIL):
        report.draw_histogram(np.array(lengths), 2048, tmp_path / "a.png", title=title)
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_fill_is_tokens_over_positions() -> None:
    lengths = np.array([10, 20, 30, 40])

    def plan(packed: bool) -> Plan:
        return Plan(
            lengths=lengths, fingerprint="ab" * 8, seed=0, global_batch=2, max_length=50, packed=packed
        )

    assert fill(plan(True), micro_batch=2, padding=None) == 1.0
    assert fill(plan(False), micro_batch=2, padding="max_length") == 0.5
    longest = fill(plan(False), micro_batch=2, padding="longest")
    assert longest in {100 / (2 * 20 + 2 * 40), 100 / (2 * 30 + 2 * 40), 100 / (2 * 40 + 2 * 30)}


def test_summary_tells_what_became_of_the_rows(tmp_path: Path) -> None:
    rows = [{"text": "one two"}, {"text": "one two"}, {"text": ""}, {"text": "x" * 50}]
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "\x1b[31m.bin").touch()
    for _ in ("tokenized", "from the cache"):
        corpus, _ = prepare_corpora(
            dataset_name=[str(folder)],
            max_length=20,
            tokenizer=small_tokenizer(),
            tokenizer_fingerprint="small",
            cache_dir=tmp_path / "cache",
        )
        assert corpus.sources[0].notes == (f"{folder}: not read, of no kind that holds rows: \x1b[31m.bin",)
    told = " ".join(printed(report.summary(corpus, title="training", efficiency=0.5)).split())
    for said in (
        "4 rows: format text, template none",
        f"dropped 1 (empty answer; first: {folder}/a.jsonl:3)",
        "split 1",
        "truncated none",
        "duplicates 1 (kept)",
        "50.0% of a step's positions are real tokens",
        r"of no kind that holds rows: \x1b[31m.bin",
    ):
        assert said in told


def test_95_percent_have_as_many_tokens_as_is_said() -> None:
    assert "median 48, 95% up to 76, longest 76" in report._quantiles(np.array([48, 48, 76]))


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small_tokenizer().save_pretrained(tmp_path / "tokenizer")
    rows = [{"question": f"say {n}", "answer": f"it is {n}"} for n in range(30)]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows" / "more.csv").write_text("question;answer\nsay 30;it is 30\n")
    (tmp_path / "rows" / "test.jsonl").touch()
    notes = ["of split test by the name: test.jsonl", "more.csv: read as separated by ';'"]
    flags = ["data", "-m", "tiny", "--tokenizer_name_or_path", str(tmp_path / "tokenizer")]
    flags += ["--dataset_name", "rows", "--cache_dir", str(tmp_path / "cache"), "--max_length", "128"]
    assert main(flags) == 2
    assert "the columns fit no format" in capsys.readouterr().err
    flags += ["--instruction_column", "question", "--output_column", "answer"]
    assert main([*flags, "--eval_split", "0.2", "--png", "lengths.png"]) == 0
    told = capsys.readouterr().out
    assert f"### Response:⟦it is 0{END}⟧" in told or "### Response:⟦it is 1" in told
    assert "format alpaca (question as instruction, answer as output)" in " ".join(told.split())
    assert "held out" in told
    assert all(note in told for note in notes)
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert main([*flags, "--streaming", "--max_steps", "3", "--show", "1"]) == 0
    told = capsys.readouterr().out
    assert "the stream's first 31 documents" in told
    assert "format alpaca (question as instruction, answer as output), template" in " ".join(told.split())
    assert all(note in told for note in notes)
    assert list((tmp_path / "runs" / "data").glob("*.png"))
    assert "positions" not in told
    assert main([*flags, "--max_length", "4096"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "note: --max_length 4,096 is beyond the 2,048 positions that the model was made for" in told
    assert main([*flags, "--show", "-1"]) == 2


def chat(*said: str, **more: Any) -> dict[str, Any]:
    """A conversation of a user and an assistant in turns; `more` is of the last message."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
    return {"messages": [*turns[:-1], turns[-1] | more]}


SHOUTS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize(
    ("rows", "flags", "told"),
    [
        (
            [chat("a", "b"), chat("a", "b", weight=0), chat("a", "b", "c", "d", train=False)],
            "--train_on all",
            "not to be trained: weight (1 message), train (1 message); --train_on all trains them all",
        ),
        (
            [chat("a", "b"), chat("a", "b", loss=False)],
            "",
            "1 (only answers that are marked as not to be trained, or of the prompt; first: rows.jsonl:2)",
        ),
        (
            [chat("a", "b", masked=True) | {"loss_mask": 0}],
            "",
            "loss_mask, masked: not read; these rows and messages are trained whatever it says there. Give",
        ),
        (
            [chat("a", "b"), {"text": "c d"}, {"instruction": "e", "output": "f"}, {"text": "g h"}],
            "",
            "and name all files with --dataset_name; first: rows.jsonl:2); 1 (of another format, alpaca: put",
        ),
        (
            [{"text": "### Human: a### Assistant: b"}, {"text": "### User: a"}],
            "--template guanaco",
            "1 (no marker ### Assistant: in the text, by which guanaco finds answers; first: rows.jsonl:2)",
        ),
        (
            [{"text": "a b"}, {"text": "c\0d"}],
            "",
            "1 row holds control characters, such as NUL or escape; they are trained as they are",
        ),
        ([chat("a", "b")], "--template shouts.jinja", "shouts.jinja rewrites: other characters than white"),
        ([chat("a\n\nb ", "c")], "", "1 row has text whose white space template falcon-instruct changes"),
    ],
)
@pytest.mark.parametrize("streaming", ["", "--streaming --max_steps 1"])
def test_what_is_done_with_rows_is_told(
    rows: list[Any],
    flags: str,
    told: str,
    streaming: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "draw_histogram", lambda *a, **k: None)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "shouts.jinja").write_text(SHOUTS)
    words = f"data -m tiny --dataset_name rows.jsonl --cache_dir cache {flags} {streaming}"
    assert main(words.split()) == 0
    out = capsys.readouterr().out
    assert "".join(told.split()) in "".join(out.split())  # a long path is broken anywhere


def test_the_command_reads_missing_files_as_the_user_s_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small_tokenizer().save_pretrained(tmp_path / "tokenizer")
    flags = ["data", "-m", "tiny", "--tokenizer_name_or_path", "tokenizer", "--dataset_name", "nowhere.jsonl"]
    assert main(flags) == 2
    assert "error: file not found: nowhere.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_run_and_its_record_name_what_is_not_read(tmp_path: Path, streaming: str) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.csv").write_text("prompt;completion\nx; y\n")
    (folder / "\x1b[31m.bin").touch()
    flags = ["--dataset_name", str(folder), "--cache_dir", str(tmp_path / "cache")]
    configuration = parse([*flags, "--max_steps", "1", "--streaming", streaming])
    data = training_data(configuration.data, configuration.run, small_tokenizer())
    told = [
        f"{folder}: not read, of no kind that holds rows: \x1b[31m.bin",
        f"{folder / 'a.csv'}: read as separated by ';'",
    ]
    assert list(data.record["sources"][0]["notes"]) == told
    assert data.notes[-2:] == [told[0].replace("\x1b", r"\x1b"), told[1]]


def test_a_run_tells_what_is_drawn_dropped_and_held_out(tmp_path: Path) -> None:
    for name, count in (("a", 17), ("b", 3), ("c", 2)):
        rows = [{"text": f"{name} row {n}"} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(f"{json.dumps(row)}\n" for row in [*rows, {"text": ""}])
        )
    a, b, c = (str(tmp_path / f"{name}.jsonl") for name in "abc")
    flags = ["--cache_dir", str(tmp_path / "cache"), "--max_steps", "1", "--eval_split", c]

    def notes(*more: str) -> tuple[list[str], dict[str, Any]]:
        configuration = parse([*flags, *more])
        data = training_data(configuration.data, configuration.run, small_tokenizer())
        return data.notes, data.record

    told, _ = notes("--dataset_name", a, b, "--dataset_weights", "1", "1")
    assert told[0] == f"dropped: 2 (empty answer; first: {a}:18)"
    assert {f"{a}: 10 drawn each epoch", f"{b}: 10 drawn each epoch"} <= set(told)
    assert f"held out: dropped: 1 (empty answer; first: {c}:3)" in told
    told, record = notes("--dataset_name", a, "--streaming", "true")
    assert f"of all 18 rows: dropped: 1 (empty answer; first: {a}:18)" in told
    assert f"held out: dropped: 1 (empty answer; first: {c}:3)" in told
    assert record["account"]["of_first_rows"] == 18
    assert record["account"]["counts"] == {"rows_rendered": 18, "rows_read": 18}
    assert record["account"]["dropped"] == {"empty answer": 1}


def test_a_stream_tells_at_its_end_what_became_of_all_its_rows(tmp_path: Path) -> None:
    rows = [{"text": f"row {n}"} | ({"note": 1} if n == 1200 else {}) for n in range(1300)]
    rows[1250] = {"text": " "}
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + "".join(f"{json.dumps(row)}\n" for row in rows))
    flags = ["--dataset_name", str(path), "--streaming", "true", "--max_steps", "400", "-b", "8"]
    configuration = parse([*flags, "--packing", "false"])
    data = training_data(configuration.data, configuration.run, small_tokenizer())
    assert data.notes[-1] == "what becomes of rows after the first 1,000 is told at the end"
    # Twice through the data, which counts once; and with a state of it that was written and read.
    shares = list(data.steps)
    told = [
        f"of the 1,300 rows used: dropped: 1 (empty answer; first: {path}:1252)",
        "of the 1,300 rows read: columns not read: note (1 row)",
    ]
    assert shares[-1].epoch >= 2
    assert told_at_end(data, shares[-1].account, "answers") == told
    for step in (300, 20):  # in the second pass, and in the first
        cursor = json.loads(json.dumps(shares[step].cursor()))
        check_cursor(cursor, step=step + 1, vocabulary=len(small_tokenizer()))
        data.steps.go_on(cursor)
        assert told_at_end(data, list(data.steps)[-1].account, "answers") == told
    # Of what lies in the buffer some is known.
    early = told_at_end(data, shares[20].account, "answers")
    used = shares[20].account["counts"]["rows_read"]
    assert 21 * 8 <= used < 1300
    waiting = f"{1300 - used:,} of them wait in the shuffle buffer"
    assert early[-1] == f"of the 1,300 rows read ({waiting}): columns not read: note (1 row)"
    for release in ({}, {"account": None}):
        data.steps.go_on({name: each for name, each in cursor.items() if name != "account"} | release)
        told = told_at_end(data, list(data.steps)[-1].account, "answers")
        assert told == ["an earlier release began this run: what became of the stream's rows was not counted"]


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_the_text_of_a_chat_template_is_recorded_and_told_where_a_run_goes_on_with_another(
    tmp_path: Path, streaming: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    text += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    (tmp_path / "chat.jinja").write_text(text)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    tokenizer = copy.deepcopy(small_tokenizer())

    def data(template: str, own: str) -> TrainingData:
        tokenizer.chat_template = own
        flags = ["--dataset_name", str(tmp_path / "a.jsonl"), "--cache_dir", str(tmp_path / "cache")]
        flags += ["--max_steps", "1", "--streaming", streaming, "--template", template]
        configuration = parse(flags)
        return training_data(configuration.data, configuration.run, tokenizer)

    of_file, began = data(str(tmp_path / "chat.jinja"), text), data("auto", text)
    for each in (of_file, began):
        assert each.record["template_fingerprint"] == hashlib.sha256(text.encode()).hexdigest()

    checkpoint = tmp_path / "step-1"
    checkpoint.mkdir()
    known = {"template_fingerprint": began.record["template_fingerprint"]}
    write_record(
        checkpoint, {"method": "full", **known, "tokenizer_fingerprint": fingerprint_of(str(tiny_path()))}
    )
    stream = began.record if streaming == "true" else None
    write_manifest(checkpoint, {"data_fingerprint": began.record.get("fingerprint"), "stream": stream})
    check_data(began, str(checkpoint), str(tiny_path()))
    assert capsys.readouterr().out == ""
    write_record(checkpoint, {"method": "full", **known, "tokenizer_fingerprint": "0" * 64})
    check_data(began, str(checkpoint), str(tiny_path()))
    assert "tiny has changed since the run began; the rows' tokens are the same" in capsys.readouterr().out
    other = data("auto", text.replace(": '", "; '"))
    with pytest.raises(UserError, match="not what the run began with"):
        check_data(other, str(checkpoint), str(tiny_path()))
    assert "note: the text of template tokenizer has changed since the run began" in capsys.readouterr().out
