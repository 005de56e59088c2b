"""From rows to documents: exact tokens, exact masks, nothing lost uncounted."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from falcon_qlora.commands.first_look import look_at_rows
from falcon_qlora.common.errors import UserError
from falcon_qlora.config import parse
from falcon_qlora.data.corpus import Corpus, prepare_corpora, prepare_held_out
from falcon_qlora.data.templates import Segment
from falcon_qlora.data.tokens import Document, Encoder, Status
from falcon_qlora.training.held_out import held_out_text, rows_of
from tests.small_tokenizer import END, small_tokenizer

_ABOVE = [folder / "shared" / "data" for folder in Path(__file__).resolve().parents]
SHARED = next((folder for folder in _ABOVE if folder.is_dir()), _ABOVE[0])


def encoder(**changes: Any) -> Encoder:
    chosen = {
        "tokenizer": small_tokenizer(),
        "train_on": "answers",
        "append_end_token": True,
        "overlong": "split",
        "max_length": 1000,
    }
    return Encoder(**(chosen | changes))


def one(row: list[Segment], **changes: Any) -> Document:
    (documents,) = encoder(**changes).documents([row])
    (document,) = documents
    return document


def trained_text(document: Document) -> str:
    ids = [i for i, target in zip(document.input_ids, document.mask, strict=True) if target]
    return str(small_tokenizer().decode(ids))


def prompt_and_answer(prompt: str, answer: str) -> list[Segment]:
    return [Segment(prompt, train=False), Segment(answer, train=True, end=True)]


@given(st.text(max_size=30), st.text(min_size=1, max_size=30), st.text(max_size=10))
@settings(max_examples=80, deadline=None)
def test_tokens_are_those_of_the_whole_text(prompt: str, answer: str, more: str) -> None:
    """Whatever the segments, an answer's tokens are those that start in it, and the end token follows."""
    tokenizer = small_tokenizer()
    row = [*prompt_and_answer(prompt, answer), Segment(more, train=False)]
    ids, mask = encoder()._assemble(encoder()._pieces(row), encoder()._tokenize([prompt + answer, more]))
    first = tokenizer(prompt + answer)["input_ids"]
    assert ids[: len(first)].tolist() == first
    if not answer.rstrip().endswith(END):
        assert ids[len(first)] == tokenizer.eos_token_id
        assert mask[len(first)] == 1
    expected = [
        start >= len(prompt)
        for start, _ in tokenizer(prompt + answer, return_offsets_mapping=True)["offset_mapping"]
    ]
    assert mask[: len(first)].tolist() == expected
    assert not mask[len(first) + 1 :].any()


def test_no_token_spans_a_prompt_and_its_answer() -> None:
    tokenizer = small_tokenizer()
    assert len(tokenizer(" the")["input_ids"]) == 1, "the test needs a token that could span the boundary"
    document = one(prompt_and_answer("what is ", "the answer"))
    # As when the model is asked: the prompt is tokenized alone, and the answer is learned from its beginning.
    prompt, answer = tokenizer("what is ")["input_ids"], tokenizer("the answer")["input_ids"]
    assert document.input_ids[:-1].tolist() == prompt + answer
    assert trained_text(document) == "the answer" + END
    assert trained_text(one(prompt_and_answer("what is", " the answer"))) == " the answer" + END


def test_offsets_without_the_space_give_the_same_mask() -> None:
    for prompt, answer in (
        ("what is ", "the answer"),
        ("what is", " the answer"),
        ("a  \n ", " b\n\n  c 🦙"),
    ):
        plain = one(prompt_and_answer(prompt, answer))
        trimmed = one(prompt_and_answer(prompt, answer), tokenizer=small_tokenizer(trim_offsets=True))
        assert trimmed.mask.tolist() == plain.mask.tolist()


def test_every_assistant_turn_ends_with_a_trained_end_token() -> None:
    row = [*prompt_and_answer("User: a", " one"), *prompt_and_answer("User: b", " two")]
    document = one(row)
    end = small_tokenizer().eos_token_id
    assert (document.input_ids == end).sum() == 2
    assert document.mask[document.input_ids == end].tolist() == [1, 1]
    assert trained_text(document) == f" one{END} two{END}"
    assert small_tokenizer().decode(document.input_ids) == f"User: a one{END}User: b two{END}"


def test_a_conversation_that_ends_with_the_user_ends_untrained() -> None:
    document = one([*prompt_and_answer("a", " one"), Segment("User: bye", train=False)])
    assert document.input_ids[-1] == small_tokenizer().eos_token_id
    assert trained_text(document) == f" one{END}"


def test_train_on_all_trains_everything_and_without_end_token_there_is_none() -> None:
    row = prompt_and_answer("a question", " an answer")
    assert one(row, train_on="all").mask.tolist() == [1] * len(one(row).mask)
    assert small_tokenizer().eos_token_id not in one(row, append_end_token=False).input_ids
    assert len(one(row, append_end_token=False).input_ids) == len(one(row).input_ids) - 1


def test_an_end_token_that_the_text_spells_out_is_not_doubled() -> None:
    document = one(prompt_and_answer("a", f" one{END}"))
    assert (document.input_ids == small_tokenizer().eos_token_id).sum() == 1
    assert document.mask[-1] == 1


def test_overlong_rows_are_split_truncated_or_dropped() -> None:
    row = prompt_and_answer("a question ", "x" * 50)
    whole = one(row)
    (pieces,) = encoder(max_length=20).documents([row])
    assert [len(piece.input_ids) for piece in pieces][:-1] == [20] * (len(pieces) - 1)
    assert np.concatenate([piece.input_ids for piece in pieces]).tolist() == whole.input_ids.tolist()
    assert np.concatenate([piece.mask for piece in pieces]).tolist() == whole.mask.tolist()
    cut = one(row, max_length=20, overlong="truncate")
    assert cut.input_ids.tolist() == whole.input_ids[:20].tolist()
    assert cut.status == Status.KEPT
    assert one(row, max_length=20, overlong="drop").status == Status.OVERLONG
    exactly = len(whole.input_ids)
    for overlong in ("split", "truncate", "drop"):
        fitting = one(row, max_length=exactly, overlong=overlong)
        assert fitting.input_ids.tolist() == whole.input_ids.tolist()


def test_pieces_and_rows_without_a_target_are_dropped() -> None:
    row = prompt_and_answer("q" * 50, "an answer")
    (pieces,) = encoder(max_length=10).documents([row])
    assert pieces[0].status == Status.MASKED_PIECE
    assert pieces[-1].status == Status.KEPT
    assert one(row, max_length=10, overlong="truncate").status == Status.CUT
    assert one([Segment("only a prompt", train=False)]).status == Status.MASKED
    # The only target is the first token, which nothing predicts.
    assert one([Segment("x", train=True)], append_end_token=False).status == Status.MASKED
    assert one([]).status == Status.EMPTY


def test_settings_that_cannot_work() -> None:
    with pytest.raises(UserError, match="--max_length 1"):
        encoder(max_length=1)


# Corpora


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def alpaca(count: int, name: str = "") -> list[dict[str, Any]]:
    return [{"instruction": f"say {name}{n}", "output": f"{name} {n} " * (n % 5 + 1)} for n in range(count)]


def a_chat() -> list[dict[str, str]]:
    return [{"role": "user", "content": "say b"}, {"role": "assistant", "content": "b"}]


def prepare_settings(folder: Path, *names: str, **changes: Any) -> dict[str, Any]:
    return {
        "dataset_name": list(names),
        "max_length": 400,
        "tokenizer": small_tokenizer(),
        "tokenizer_fingerprint": "small",
        "cache_dir": folder / "cache",
        **changes,
    }


def prepare(folder: Path, *names: str, **changes: Any) -> tuple[Corpus, Corpus | None]:
    return prepare_corpora(**prepare_settings(folder, *names, **changes))


def texts(corpus: Corpus) -> list[str]:
    return [str(small_tokenizer().decode(row["input_ids"])) for row in corpus.dataset]


def test_a_corpus_has_every_row_in_order(tmp_path: Path) -> None:
    rows = alpaca(12)
    corpus, held_out = prepare(tmp_path, write(tmp_path / "a.jsonl", rows))
    assert held_out is None
    assert [text.split("### Response:")[1] for text in texts(corpus)] == [row["output"] + END for row in rows]
    assert corpus.dataset["row"][:] == list(range(12))
    assert corpus.lengths.tolist() == [len(row["input_ids"]) for row in corpus.dataset]
    assert corpus.target_counts.tolist() == [sum(row["mask"][1:]) for row in corpus.dataset]
    assert corpus.statistics.tokens == corpus.lengths.sum()
    assert corpus.statistics.target_tokens == corpus.target_counts.sum()
    assert corpus.statistics.rows_read == corpus.statistics.documents == 12
    assert corpus.sources[0].format == "alpaca"
    assert corpus.dataset.features["input_ids"] == datasets.List(datasets.Value("int32"))


def test_what_is_not_read_or_lacking_is_counted_and_told_from_the_cache_too(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Name a colour.", "output": "Blue.", "id": 1},
        {"question": "Name a planet.", "answer": "Mars."},
        {"prompt": "Name a tree.", "output": "Oak."},
        {"instruction": f"What is {END}?", "input": None, "output": "An end.", "id": 0},
        {"instruction": "Say nothing.", "output": ""},
    ]
    # The second time from the cache, where the same file has come to be called otherwise.
    for name in ("a.jsonl", "b.jsonl"):
        path = write(tmp_path / name, rows)
        corpus, _ = prepare(tmp_path, path)
        assert (corpus.statistics.rows_dropped_missing, corpus.statistics.rows_dropped_empty) == (2, 1)
        assert corpus.statistics.documents == 2
        assert corpus.sources[0].account["columns"] == {"id": 2, "question": 1, "answer": 1, "prompt": 1}
        assert corpus.sources[0].told() == [
            "columns not read: id (2 rows), question (1 row), answer (1 row), prompt (1 row)",
            f"1 row holds text that looks like special tokens; it stays text (first: {path}:4)",
        ]
        assert corpus.dropped() == [
            f"1 (lacks instruction, output; first: {path}:2)",
            f"1 (lacks instruction; first: {path}:3)",
            f"1 (empty answer; first: {path}:5)",
        ]
    assert len(list((tmp_path / "cache").iterdir())) == 1
    told = r"(?s)nothing is left.*: 1\n  dropped: 1 \(lacks instruction, output; first: .*b.jsonl:1\)$"
    with pytest.raises(UserError, match=told):
        prepare(tmp_path, write(tmp_path / "b.jsonl", [{"instruction": None, "output": None}]))


def test_held_out_rows_of_which_none_is_left_are_told_by_their_name(tmp_path: Path) -> None:
    good = write(tmp_path / "a.jsonl", [{"prompt": f"a{each}", "completion": "b"} for each in range(3)])
    empty = write(tmp_path / "held.jsonl", [{"prompt": "a", "completion": ""}] * 2)
    dropped = rf"nothing is left to evaluate on\. Rows read .*: 2\n  dropped: 2 .empty.*{empty}:1"
    with pytest.raises(UserError, match=f"(?s)^--eval_split {empty}: {dropped}"):
        prepare(tmp_path, good, eval_split=empty)
    folder = tmp_path / "rows"
    folder.mkdir()
    for name, source in {"train": good, "test": empty}.items():
        (folder / f"{name}.jsonl").write_text(Path(source).read_text())
    with pytest.raises(UserError, match=f"^--eval_split split:test of {folder}: nothing is left to evaluate"):
        prepare(tmp_path, str(folder), eval_split="split:test")
    with pytest.raises(UserError, match=r"needs at least 2 different rows, found 0\n  dropped: 2 .empty"):
        prepare(tmp_path, empty, eval_split="0.5")
    asked = parse(["-m", "tiny", "--dataset_name", empty, "--cache_dir", str(tmp_path / "cache")])
    with pytest.raises(UserError, match=f"^{empty}: nothing is left to evaluate on"):
        rows_of(asked, small_tokenizer())


def test_the_first_token_of_a_document_counts_as_no_target(tmp_path: Path) -> None:
    corpus, _ = prepare(
        tmp_path, write(tmp_path / "a.jsonl", [{"text": "one two"}, {"text": "x" * 50}]), max_length=20
    )
    assert all(all(row["mask"]) for row in corpus.dataset)
    assert corpus.target_counts.tolist() == (corpus.lengths - 1).tolist()


def test_the_second_call_tokenizes_nothing_and_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", alpaca(12))
    told: list[str] = []
    first, _ = prepare(tmp_path, path, progress=told.append)
    assert any("tokenizing 12 rows" in line for line in told)
    assert len(list((tmp_path / "cache").iterdir())) == 1

    def fail(*args: Any) -> None:
        raise AssertionError("tokenized again")

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "documents", fail)
        again, _ = prepare(tmp_path, path)
        # The same rows under another name, another seed and a held-out part need no tokens either.
        copied = tmp_path / "b.jsonl"
        copied.write_bytes(Path(path).read_bytes())
        other, _ = prepare(tmp_path, str(copied), seed=3, eval_split="0.2")
    assert again.fingerprint == first.fingerprint != other.fingerprint
    assert again.dataset[:] == first.dataset[:]


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 60},
        {"train_on": "all"},
        {"template": "guanaco"},
        {"append_end_token": False},
        {"tokenizer": small_tokenizer(trim_offsets=True), "tokenizer_fingerprint": "trimmed"},
    ],
)
def test_the_cache_knows_what_decides_the_tokens(tmp_path: Path, change: dict[str, Any]) -> None:
    path = write(tmp_path / "a.jsonl", alpaca(3))
    prepare(tmp_path, path)
    prepare(tmp_path, path, **change)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_edited_rows_are_tokenized_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", alpaca(3))
    before, _ = prepare(tmp_path, path)
    write(tmp_path / "a.jsonl", alpaca(3, "new"))
    after, _ = prepare(tmp_path, path)
    assert before.fingerprint != after.fingerprint
    assert "new" in texts(after)[0]


def test_threads_give_what_one_gives_and_are_off_again_where_a_loader_forks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.jsonl", [*alpaca(600), {"instruction": "x", "output": ""}])
    heard: list[str | None] = []
    real = Encoder.documents

    def documents(self: Encoder, rows: Any, *more: Any) -> Any:
        heard.append(os.environ.get("TOKENIZERS_PARALLELISM"))
        return real(self, rows, *more)

    monkeypatch.setattr(Encoder, "documents", documents)
    alone, _ = prepare(tmp_path, path, num_proc=1, cache_dir=tmp_path / "one")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    threads, _ = prepare(tmp_path, path, cache_dir=tmp_path / "all")
    assert heard == ["false"] * 3 + ["true"] * 3
    assert threads.fingerprint == alone.fingerprint
    assert threads.statistics == alone.statistics
    assert texts(threads) == texts(alone)
    child = os.fork()
    if child == 0:
        small_tokenizer()(["a b"] * 99)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert capfd.readouterr().err == ""


def test_a_row_that_cannot_be_read_is_named_and_leaves_no_entry(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [*alpaca(9), {"instruction": ["x"], "output": "y"}]
    with pytest.raises(UserError, match=r"a.jsonl:10: column instruction: expected text, found an array"):
        prepare(tmp_path, write(tmp_path / "a.jsonl", rows))
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_happened_to_the_rows_is_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": " "},
        {"prompt": "a", "completion": ""},
        {"prompt": "Q" * 100, "completion": "Z"},
        {"prompt": "Q", "completion": "Z" * 100},
    ]
    path = write(tmp_path / "a.jsonl", rows)

    def counts(overlong: str) -> dict[str, int]:
        corpus, _ = prepare(tmp_path, path, max_length=30, overlong=overlong)
        assert corpus.statistics.documents == len(corpus.dataset)
        return asdict(corpus.statistics)

    common = {"rows_read": 6, "rows_dropped_empty": 2, "rows_duplicate": 1}
    split = counts("split")
    assert split.items() >= {**common, "rows_split": 2, "rows_truncated": 0, "rows_dropped_masked": 0}.items()
    assert split["documents_dropped_masked"] == 3
    assert split["longest"] == 30
    truncated = counts("truncate")
    assert truncated.items() >= {**common, "rows_truncated": 1, "rows_dropped_cut": 1, "documents": 3}.items()
    dropped = counts("drop")
    assert dropped.items() >= {**common, "rows_dropped_overlong": 2, "documents": 2}.items()


def test_a_blank_answer_in_written_text_is_never_trained(tmp_path: Path) -> None:
    blank = "### Human: Who?### Assistant: {}### Human: And you?### Assistant: I"
    for white in ("", " ", "\n \t"):
        rows = [
            {"text": blank.format(white)},
            {"text": f"### Human: Who?### Assistant:{white}"},
            {"text": f"### Human: Who?### Assistant:{white}### Human: Hm.### Assistant: {white}"},
        ]
        corpus, _ = prepare(tmp_path, write(tmp_path / "a.jsonl", rows), template="guanaco")
        (row,) = corpus.dataset
        trained = [i for i, target in zip(row["input_ids"], row["mask"], strict=True) if target]
        assert small_tokenizer().decode(trained) == f" I{END}"
        assert corpus.statistics.rows_dropped_masked == 2


@pytest.mark.parametrize(
    ("rows", "changes", "said"),
    [
        ([], {}, "a.jsonl: the data is empty"),
        (
            [{"prompt": "a", "completion": ""}] * 2,
            {},
            "(?s)nothing is left.*2 .empty answer; first: .*a.jsonl:1",
        ),
        (
            [{"prompt": "a" * 50, "completion": "b"}],
            {"max_length": 9, "overlong": "truncate"},
            "1 .no trained token within --max_length",
        ),
        (
            [{"prompt": "a" * 50, "completion": "b"}],
            {"max_length": 9, "overlong": "drop"},
            "1 .longer than --max_length, with --overlong drop",
        ),
        ([{"a": 1}], {}, "the columns fit no format"),
        ([{"text": "a b"}], {"max_rows": 0}, "--max_rows 0"),
        (
            [{"text": "a b"}],
            {"dataset_weights": [1.0, 2.0]},
            "--dataset_weights has 2 numbers, but .* 1 data",
        ),
        ([{"text": "a b"}], {"dataset_weights": [0.0]}, "every weight must be a number above 0"),
        ([{"text": "a b"}], {"eval_split": "1.5"}, "--eval_split 1.5: a fraction lies between 0 and 1"),
        ([{"text": "a b"}] * 5, {"eval_split": "0.5"}, "needs at least 2 different rows, found 1"),
        ([{"text": "a b"}], {"eval_split": "split:test"}, "a single file has no split 'test'"),
        ([{"text": "a b"}], {"eval_split": "nowhere.jsonl"}, "file not found: nowhere.jsonl"),
    ],
)
def test_data_that_leaves_nothing_to_do_is_refused(
    tmp_path: Path, rows: list[dict[str, Any]], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        prepare(tmp_path, write(tmp_path / "a.jsonl", rows), **changes)


def test_held_out_rows_are_never_trained_on(tmp_path: Path) -> None:
    # Every row is there twice: a copy of a held-out row must not be trained on either.
    path = write(tmp_path / "a.jsonl", alpaca(40) * 2)
    train, held_out = prepare(tmp_path, path, eval_split="0.1", seed=5)
    assert held_out is not None
    assert len(held_out.lengths) == 8
    assert len(train.lengths) == 72
    assert not set(texts(train)) & set(texts(held_out))
    assert train.statistics.rows_read == 72
    same, _ = prepare(tmp_path, path, eval_split="0.1", seed=5)
    other, _ = prepare(tmp_path, path, eval_split="0.1", seed=6)
    assert same.fingerprint == train.fingerprint != other.fingerprint


def test_held_out_rows_stay_whole_where_they_are_split(tmp_path: Path) -> None:
    rows = [{"prompt": str(n), "completion": f"{n} is the answer " * 10} for n in range(10)]
    train, held_out = prepare(tmp_path, write(tmp_path / "a.jsonl", rows), eval_split="0.3", max_length=16)
    assert held_out is not None
    assert not set(train.dataset["row"]) & set(held_out.dataset["row"])
    assert len(set(held_out.dataset["row"])) == 3


def test_held_out_file_and_split_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    write(tmp_path / "rows" / "train.jsonl", alpaca(5))
    write(tmp_path / "rows" / "test.jsonl", alpaca(3, "test"))
    train, held_out = prepare(tmp_path, str(tmp_path / "rows"), eval_split="split:test", max_rows=4)
    assert held_out is not None
    assert (len(train.lengths), len(held_out.lengths)) == (4, 3)
    assert all("test" in text for text in texts(held_out))
    _, same = prepare(tmp_path, str(tmp_path / "rows"), eval_split=str(tmp_path / "rows" / "test.jsonl"))
    assert same is not None
    assert same.fingerprint == held_out.fingerprint


def test_held_out_rows_that_are_trained_too_are_counted(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", alpaca(10))
    other = write(tmp_path / "b.jsonl", [*alpaca(12)[8:], {"instruction": "", "output": ""}])
    _, held_out = prepare(tmp_path, train, eval_split=other)
    assert held_out is not None
    assert (held_out.statistics.rows_trained_too, held_out.statistics.rows_dropped_empty) == (2, 1)


def test_weights_of_a_source_without_an_answer_go_to_the_others(tmp_path: Path) -> None:
    names = [
        write(tmp_path / "a.jsonl", alpaca(10, "a")),
        write(tmp_path / "b.jsonl", [{"instruction": "b", "output": ""}]),
        write(tmp_path / "c.jsonl", alpaca(10, "c")),
    ]
    corpus, _ = prepare(tmp_path, *names, dataset_weights=[1.0, 6.0, 3.0])
    assert [use.rows_drawn for use in corpus.sources] == [5, 0, 15]


def test_weights_draw_in_their_proportion(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", alpaca(30, "first"))
    second = write(tmp_path / "b.jsonl", alpaca(10, "second"))
    corpus, _ = prepare(tmp_path, first, second, dataset_weights=[1.0, 3.0])
    assert corpus.draw is not None
    every = texts(corpus)
    assert len(every) == 40
    epochs = [corpus.draw(epoch) for epoch in range(8)]
    for drawn in epochs:
        assert sum("first" in every[index] for index in drawn) == 10
        assert sum("second" in every[index] for index in drawn) == 30
        assert len({every[index] for index in drawn if "second" in every[index]}) == 10
    assert len({tuple(drawn) for drawn in epochs}) == 8
    # By 10 of 30 rows in each of 8 epochs, (2/3)^8 of them are left out: one or two; by one draw for all, 20.
    assert len({index for drawn in epochs for index in drawn}) >= 36
    assert corpus.statistics.documents == len(epochs[0])
    assert corpus.statistics.tokens == corpus.lengths[epochs[0]].sum()
    assert corpus.statistics.target_tokens == corpus.target_counts[epochs[0]].sum()
    assert [use.rows_drawn for use in corpus.sources] == [10, 30]
    assert [use.rows_read for use in corpus.sources] == [30, 10]
    # Rows are counted through all sources.
    assert corpus.dataset["row"][:] == list(range(40))
    again, _ = prepare(tmp_path, first, second, dataset_weights=[1.0, 3.0])
    other, _ = prepare(tmp_path, first, second, dataset_weights=[1.0, 3.0], seed=1)
    assert again.fingerprint == corpus.fingerprint != other.fingerprint
    plain, _ = prepare(tmp_path, first, second)
    assert plain.draw is None
    assert texts(plain) == texts(prepare(tmp_path, first)[0]) + texts(prepare(tmp_path, second)[0])


def test_mixed_rows_need_no_common_column_types(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "one", "meta": 1},
        {"text": "two", "meta": {"a": [1]}},
        {"meta": None, "text": "three", "more": "x"},
    ]
    corpus, _ = prepare(tmp_path, write(tmp_path / "a.jsonl", rows))
    assert texts(corpus) == [f"{word}{END}" for word in ("one", "two", "three")]


def test_a_column_that_a_flag_names_is_in_one_of_the_data_sets(tmp_path: Path) -> None:
    own = write(tmp_path / "own.jsonl", [{"prompt": "1+1?", "completion": "2"}])
    other = write(tmp_path / "other.jsonl", [{"prompt": "1+2?", "answer": "3"}])
    renamed = {"columns": {"completion": "answer"}}
    assert len(texts(prepare(tmp_path, own, other, **renamed)[0])) == 2
    told = r"--completion_column answer: no such column in \S*own.jsonl, which has completion, prompt\. Drop"
    with pytest.raises(UserError, match=told):
        prepare(tmp_path, own, **renamed)
    third = write(tmp_path / "third.jsonl", [{"instruction": "1+3?", "output": "4"}])
    assert len(texts(prepare(tmp_path, other, third, **renamed)[0])) == 2
    with pytest.raises(UserError, match=r"--completion_column answer: none of .*own.jsonl, "):
        prepare(tmp_path, own, third, **renamed)


@pytest.mark.parametrize(
    "row",
    [{"instruction": "say b", "output": "b"}, {"messages": a_chat()}, {"question": "say b", "output": "b"}],
)
def test_held_out_rows_may_have_columns_of_their_own(tmp_path: Path, row: dict[str, Any]) -> None:
    train = write(tmp_path / "train.jsonl", [{"question": "say a", "output": "a"}])
    held_out = write(tmp_path / "held_out.jsonl", [row])
    renamed = {"columns": {"instruction": "question"}}
    _, beside = prepare(tmp_path, train, eval_split=held_out, **renamed)
    settings = prepare_settings(tmp_path, train, **renamed)
    assert beside is not None
    assert prepare_held_out(held_out, **settings).fingerprint == beside.fingerprint
    assert len(beside.lengths) == 1
    words = [
        "-m",
        "tiny",
        "--dataset_name",
        train,
        "--eval_split",
        held_out,
        "--instruction_column",
        "question",
    ]
    look_at_rows(parse(words).data, held_out)
    told = held_out_text(parse([*words, "--max_length", "400"]), small_tokenizer(), None)
    unused = f"--instruction_column question: no such column in {held_out}, whose own were read"
    assert (unused in told.notes) == ("question" not in row)


def test_rows_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chats = [
        [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}"}] for n in range(6)
    ]
    of_split = {
        "train": datasets.Dataset.from_dict({"messages": chats}),
        "test": datasets.Dataset.from_dict({"messages": chats[:2]}),
    }
    asked: list[Any] = []
    told: list[str] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        assert told[-1] == "asking the hub for hub/chats"  # before the first wait for it
        asked.append((name, config, split, streaming))
        return of_split[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus, held_out = prepare(
        tmp_path,
        "hub/chats",
        dataset_config="small",
        eval_split="split:test",
        max_rows=5,
        progress=told.append,
    )
    assert texts(corpus)[1] == f"\n\nUser: say 1\n\nAssistant: 1{END}"
    assert len(corpus.lengths) == 5
    assert held_out is not None
    assert len(held_out.lengths) == 2
    assert set(asked) == {("hub/chats", "small", split, False) for split in ("train", "test")}
    assert corpus.sources[0].format == "chat"


def test_an_unwritable_cache_is_told(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"the cache folder .* cannot be written"):
        prepare(tmp_path, write(tmp_path / "a.jsonl", alpaca(2)))


# The real tokenizer


@pytest.fixture(scope="module")
def falcon_tokenizer() -> Any:
    if not (SHARED / "falcon-tokenizer").is_dir():
        pytest.skip(f"the real tokenizer is not there: {SHARED / 'falcon-tokenizer'}")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SHARED / "falcon-tokenizer")


def test_the_real_tokenizer_gives_its_published_vectors(falcon_tokenizer: Any) -> None:
    folder = SHARED / "falcon-tokenizer"
    inputs = (folder / "vectors.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    outputs = (folder / "vectors.out").read_text().split("\n")
    expected = [[int(number) for number in line.split()] for line in outputs[: len(inputs)]]
    tokens = encoder(tokenizer=falcon_tokenizer)._tokenize(inputs)
    right = sum(ids.tolist() == wanted for (ids, _), wanted in zip(tokens, expected, strict=True))
    assert (right, len(inputs)) == (47, 47)


def test_the_real_tokenizer_on_real_rows(falcon_tokenizer: Any, tmp_path: Path) -> None:
    corpus, _ = prepare(
        tmp_path,
        str(SHARED / "alpaca_en_demo.json"),
        tokenizer=falcon_tokenizer,
        max_length=2048,
        max_rows=300,
    )
    rows = json.loads((SHARED / "alpaca_en_demo.json").read_text())[:300]
    for row, document in zip(rows, corpus.dataset, strict=True):
        ids, mask = np.array(document["input_ids"]), np.array(document["mask"], dtype=bool)
        whole = falcon_tokenizer.decode(ids)
        assert whole.endswith("### Response:" + row["output"] + END)
        prompt = whole.removesuffix(row["output"] + END)
        alone = [falcon_tokenizer(text)["input_ids"] for text in (prompt, row["output"])]
        assert ids.tolist() == [*alone[0], *alone[1], 11]
        assert falcon_tokenizer.decode(ids[mask]) == row["output"] + END
