"""Inputs after public reports, and others of their kinds, as `falcon-qlora data` tells of them."""

from __future__ import annotations

import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from falcon_qlora.__main__ import main
from falcon_qlora.data import report

Content = str | bytes | list[Any] | Callable[[Path], Any]
ASKED, SAID = "Which planet is red?", "Mars."
CHAT = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]
SHARE = [{"from": "human", "value": ASKED}, {"from": "gpt", "value": SAID}]
CALLED = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
CODE = "Sure:\n\n```\nx\n```\n"
ALPACA = {"instruction": "Add.", "output": "5"}
NAN = float("nan")
ROW = '{"text": "a b c"}\n'
SHOWN = f"User: {ASKED} Assistant:⟦ {SAID}<|endoftext|>⟧"
CODED = {"role": "assistant", "content": CODE}


def parquet(**columns: Any) -> Callable[[Path], Any]:
    return lambda path: pq.write_table(pa.table(columns), path)


def link(target: str) -> Callable[[Path], Any]:
    return lambda path: os.symlink(target, path)


def zstd(text: str) -> bytes:
    return bytes(pa.Codec("zstd").compress(text.encode(), asbytes=True))


# Name of the case → inputs: files (the first or its folder is read), flags, what is told and what is not.
CASES: dict[str, list[tuple[dict[str, Content], str, list[str], list[str]]]] = {
    "blank_lines": [
        ({"a.jsonl": [{"messages": [CHAT[0], CODED]}]}, "", ["1 row has text whose white space"], []),
        (
            {"a.jsonl": [{"conversations": [{"from": "human", "value": "q\r\n\r\nr"}, SHARE[1]]}] * 2},
            "",
            ["2 rows have text whose white space template falcon-instruct changes"],
            [],
        ),
        ({"a.jsonl": [{"prompt": [CHAT[0]], "completion": [CODED]}]}, "", ["changes (at the ends"], []),
        ({"a.jsonl": [{"messages": [CHAT[0], CODED]}]}, "--template guanaco", [CODE.split()[0]], ["changes"]),
    ],
    "columnar": [
        (
            {"a.json": json.dumps({"instruction": ["a", "b"], "output": ["c", "d"]})},
            "",
            ["2 rows", "as col"],
            [],
        ),
        ({"a.jsonl": '{"text": {"0": "a b", "5": "c d"}}'}, "", ["2 rows", "read as columns, not rows"], []),
        ({"a.json": '{"x": [["a b"]], "text": ["c d"]}'}, "", ["⟦ d<|", "as columns", "not read: x"], []),
        ({"a.json": '{"text": ["a", "b"], "id": [1]}'}, "", ["error: a.json:1: the file holds columns"], []),
        ({"a.json": '{"columns": ["text"], "data": [["a"]]}'}, "", ['orient="records"'], []),
    ],
    "missing_key": [
        (
            {"a.jsonl": [ALPACA, {"instruction": "a", "response": "b"}]},
            "",
            ["lacks output; first: a.jsonl:2"],
            [],
        ),
        ({"a.jsonl": [ALPACA, {"output": "b"}]}, "", ["1 (lacks instruction; first: a.jsonl:2)"], ["⟦b"]),
        (
            {"a.jsonl": [ALPACA, {**ALPACA, "output": ""}]},
            "",
            ["1 (empty answer; first: a.jsonl:2)"],
            ["lacks"],
        ),
        (
            {"a.jsonl": [{"messages": [{"role": "user", "text": "a"}]}]},
            "",
            ["a.jsonl:1", "it has no text"],
            [],
        ),
        (
            {"a.jsonl": [{"conversations": [SHARE[0], {"from": "gpt"}]}]},
            "",
            ["message 2: it has no text"],
            [],
        ),
        ({"a.jsonl": [{"messages": CHAT}, {"messages": CHAT[:1]}]}, "", ["lacks a message of the assis"], []),
        ({"d/a.jsonl": [ALPACA], "d/b.jsonl": ROW}, "", ["of another format, text", "columns differ"], []),
    ],
    "nan": [
        ({"a.json": json.dumps([ALPACA, {**ALPACA, "output": NAN}])}, "", ["lacks output"], ["NaN", "nan<|"]),
        (
            {"a.parquet": parquet(instruction=["a", "b"], input=[NAN, 2.5], output=["c", "d"])},
            "",
            ["2.5"],
            ["nan"],
        ),
        ({"a.parquet": parquet(text=[NAN, 1.5])}, "", ["1 (lacks text; first: a.parquet row 1)"], ["nan"]),
        (
            {"a.jsonl": '{"messages": [{"role": "user", "content": NaN}]}\n'},
            "",
            ["lacks text of a message"],
            ["nan<"],
        ),
        (
            {"a.jsonl": ROW + '{"text": 1e400}\n'},
            "",
            ["error: a.jsonl:2: column text: the number is inf"],
            [],
        ),
        ({"a.parquet": parquet(text=["a b"], n=[[float("inf")]])}, "", ["a.parquet row 1: column n"], []),
    ],
    "role_keys": [
        ({"a.jsonl": [{"conversations": CHAT}]}, "", [SHOWN], []),
        ({"a.jsonl": [{"messages": SHARE}]}, "", [SHOWN], []),
        ({"a.jsonl": [{"turns": [SHARE[0], CHAT[1]]}]}, "--messages_column turns", [SHOWN], []),
        ({"a.csv": "messages\n" + '"' + json.dumps(SHARE).replace('"', '""') + '"\n'}, "", [SHOWN], []),
    ],
    "split_word_file": [
        (
            {
                "d/driving_test_questions.jsonl": ROW,
                "d/b.jsonl.zst": zstd(ROW),
                "d/c.csv.xz": lzma.compress(b"text\na\n"),
            },
            "",
            ["3 rows", "though a word in the name is for another: driving_test_questions.jsonl"],
            [],
        ),
        (
            {"d/a.jsonl": ROW, "d/held_out.jsonl": ROW},
            "",
            ["1 row", "of split test by the name: held_out"],
            [],
        ),
        (
            {"d/a.jsonl": ROW, "d/b.jsonl.gz": gzip.compress(b"{}")[:-3]},
            "",
            ["error: d/b.jsonl.gz: damaged"],
            [],
        ),
        (
            {"d/a.jsonl": ROW, "d/b.arrow": "", "d/.c.jsonl": ROW},
            "",
            ["rows: b.arrow", "hidden: .c.jsonl"],
            [],
        ),
    ],
    "symlinked_folder": [
        ({"d/a.jsonl": ROW, "o/b.jsonl": ROW, "d/l": link("../o")}, "", ["2 rows"], []),
        (
            {"d/a.jsonl": ROW, "d/l": link("."), "d/m": link("gone")},
            "",
            ["1 row", "l", "a broken link: m"],
            [],
        ),
        ({"d/a.jsonl": ROW, "o/b/c.jsonl": ROW, "d/b": link("../o/b"), "d/c": link("b")}, "", ["2 rows"], []),
    ],
    "unread_fields": [
        ({"a.jsonl": [{"system": "Pirate.", "messages": CHAT}]}, "", ["Pirate. " + SHOWN], ["not read"]),
        (
            {"a.jsonl": [{**ALPACA, "system": "P.", "history": [["q", "r"]]}]},
            "",
            ["P.", "⟦r<|"],
            ["not read"],
        ),
        (
            {"a.jsonl": [{"prompt": "a", "completion": "b", "system": "P."}]},
            "",
            ["columns not read: system"],
            [],
        ),
        ({"a.jsonl": [{"messages": [CHAT[0], {**CHAT[1], "thought": "t"}]}]}, "", ["not read: thought"], []),
        ({"a.jsonl": [{"messages": [CHAT[0], CALLED]}]}, "", ["a.jsonl:1", "cannot write tool_calls"], []),
        ({"a.jsonl": [{"messages": CHAT, "tools": [{"name": "f"}]}]}, "", ["cannot write the tools"], []),
        (
            {"a.jsonl": [{"messages": [*CHAT, CHAT[0], {**CHAT[1], "train": False}]}]},
            "",
            [SHOWN, f"Assistant: {SAID}<|endoftext|>"],
            [],
        ),
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_a_case_and_others_of_its_kind(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "draw_histogram", lambda *a, **k: None)
    monkeypatch.setattr(report, "histogram_text", lambda *a: "")
    for number, (files, flags, told, not_told) in enumerate(CASES[case]):
        folder = tmp_path / str(number)
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if callable(content):
                content(path)
            elif isinstance(content, list):
                path.write_text("".join(json.dumps(row) + "\n" for row in content))
            else:
                path.write_bytes(content.encode() if isinstance(content, str) else content)
        monkeypatch.chdir(folder)
        name = next(iter(files)).split("/")[0]
        status = main(["data", "-m", "tiny", "--dataset_name", name, "--cache_dir", "cache", *flags.split()])
        output = capsys.readouterr()
        text = " ".join((output.out + output.err).split())
        assert (status, "error: " in text) in ((0, False), (2, True)), (files, text)
        assert all(each in text for each in told), (files, text)
        assert not any(each in text for each in not_told), (files, text)
