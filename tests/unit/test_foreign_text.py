"""Foreign text is shown as text, whatever it holds: on a terminal, in Markdown, in a picture."""

from __future__ import annotations

import ast
import io
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from falcon_qlora import __main__ as cli
from falcon_qlora.common.errors import printable
from falcon_qlora.compare.figures import Compared
from falcon_qlora.compare.report import Comparison
from falcon_qlora.merge import certificate
from falcon_qlora.models.tiny import tiny_path
from falcon_qlora.run_folder.model_card import ModelCard
from falcon_qlora.terminal import console, markdown
from falcon_qlora.terminal.output import shown_as_text
from tests.fuzzing import fuzz

PACKAGE = Path(cli.__file__).parent
# Sets the title, clears the screen, hides what follows, goes back a line, rings, turns the direction, and
# begins a line.
ORDERS = "a\x1b]0;owned\x07b\x1b[2J\x1b[8mc\x9b31md\re\x08f\u202eg\u2066\u200bh\nforged"
SHOWN = printable(ORDERS)
# In a file's name there can be all of it.
ROW = {"instruction": ORDERS, "output": ORDERS}


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    console.console.cache_clear()
    yield tmp_path
    console.console.cache_clear()


def adapter(**changes: Any) -> str:
    folder = Path(f"adapter{ORDERS}")
    folder.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": "tiny", "target_modules": ["dense"]}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **changes}))
    (folder / "adapter_model.safetensors").write_bytes(ORDERS.encode())
    return str(folder)


def rows(*lines: Any, name: str = ORDERS) -> str:
    file = Path(f"{name}.jsonl")
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return str(file)


def settings(text: str) -> str:
    Path(f"{ORDERS}.yaml").write_text(text)
    return f"{ORDERS}.yaml"


def template(text: str) -> str:
    Path("given.jinja").write_text(text)
    return "given.jinja"


def folder_with(name: str, content: str) -> str:
    folder = Path(ORDERS)
    folder.mkdir()
    (folder / name).write_text(content)
    return str(folder)


def tokenizer(**changes: Any) -> str:
    folder = Path(shutil.copytree(tiny_path(), f"tokenizer{ORDERS}"))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return str(folder)


DATA = ["data", "-m", "tiny", "--max_length", "64", "--png", "p.png", "--dataset_name"]
TRAIN = ["train", "-m", "tiny", "--dataset_name"]
# Where foreign text comes from: a file's name, its rows, its keys, a template, a manifest, a flag, ...
SAID: dict[str, Callable[[], list[str]]] = {
    "rows are previewed": lambda: [*DATA, rows(*[ROW] * 3)],
    "a stream is previewed": lambda: [*DATA, rows(*[ROW] * 3), "--streaming", "--max_steps", "1"],
    "unknown columns": lambda: [*DATA, rows({ORDERS: 1})],
    "a broken row": lambda: [*DATA, rows(ORDERS)],
    "a row of another shape": lambda: [*DATA, rows({"messages": [{"role": ORDERS, "content": ORDERS}]})],
    "a template raises": lambda: [
        *(*DATA, rows({"messages": [{"role": "user", "content": ORDERS}]}), "--template"),
        template("{{ raise_exception(messages[0].content) }}"),
    ],
    "the tokenizer's template raises": lambda: [
        *(*DATA, rows({"messages": [{"role": "user", "content": ORDERS}]}), "--template", "tokenizer"),
        *("--tokenizer_name_or_path", tokenizer(chat_template="{{ raise_exception(messages[0].content) }}")),
    ],
    "no file": lambda: [*TRAIN, f"{ORDERS}.jsonl"],
    "no folder": lambda: ["train", "-m", f"./{ORDERS}"],
    "a folder that is no model": lambda: ["train", "-m", folder_with("config.json", json.dumps(ROW))],
    "an unknown key": lambda: ["train", "--config", settings(json.dumps({ORDERS: ORDERS}))],
    "a value that does not fit": lambda: ["train", "--config", settings(json.dumps({"max_length": ORDERS}))],
    "settings that are no YAML": lambda: ["train", "--config", settings(f"a: [{ORDERS}")],
    "an unknown flag": lambda: ["train", f"--{ORDERS}"],
    "a stray word": lambda: ["train", ORDERS],
    "a bad value": lambda: ["train", "--quantize_mode", ORDERS],
    "an unknown recipe": lambda: ["train", "--recipe", ORDERS],
    "a manifest": lambda: ["inspect", folder_with("manifest.json", json.dumps(ROW))],
    "a summary": lambda: ["inspect", folder_with("summary.json", json.dumps(ROW))],
    "a model's configuration": lambda: [
        "inspect",
        folder_with("config.json", json.dumps({"model_type": ORDERS, "architectures": [ORDERS]})),
    ],
    "an adapter is inspected": lambda: ["inspect", adapter(r=ORDERS)],
    "an adapter's kind": lambda: ["merge", "--out", "o", "--adapter", adapter(peft_type=ORDERS)],
    "an adapter's base": lambda: ["generate", "--adapter", adapter(base_model_name_or_path=ORDERS)],
    "an adapter's weights": lambda: ["generate", "--adapter", adapter()],
    "a base that is shown": lambda: ["params", "-m", str(shutil.copytree(tiny_path(), ORDERS))],
    "runs that are none": lambda: ["compare", folder_with("config.yaml", json.dumps(ROW))],
    "prompts that are no JSON": lambda: ["generate", "-m", "tiny", "--prompt_file", rows(ORDERS, ORDERS)],
}


PREVIEWED = ("rows are previewed", "a stream is previewed")
# Colours and weights, a line that is erased, the cursor.
RICHS = r"\x1b\[(0|[1-79]|[34]\d|38;5;\d+|;)*m|\x1b\[\?25[hl]|\x1b\[2K|\x1b\[1A"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("said", SAID)
def test_no_message_brings_orders_to_a_terminal(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = SAID[said]()
    for stream in (io.StringIO, Terminal):
        told = stream()
        monkeypatch.setattr(sys, "stdout", told)
        monkeypatch.setattr(sys, "stderr", told)
        console.console.cache_clear()
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", "200")
        assert cli.main(words) in (0, 2)
        text = told.getvalue()
        left = re.sub(RICHS, "", text) if stream is Terminal else text
        assert printable(left, keep="\n\t\r" if stream is Terminal else "\n\t") == left, said
        # Some of it is shown, as text.
        assert re.search(r"x1b\]0;owned|u202eg", left), (said, text)
        # No name and no value begins a line; a row that is shown as a whole has lines.
        assert said in PREVIEWED or not re.search(r"^\W*forged", left, re.MULTILINE), (said, text)


def test_bars_and_answers_are_written_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from falcon_qlora.terminal.output import write_answer

    for stream, answer in ((io.StringIO(), "a\r\x1b[1m\n"), (Terminal(), "a\\r\\x1b[1m\n")):
        monkeypatch.setattr(sys, "stdout", stream)
        with shown_as_text():
            for bar in ("\r 40%|████", "\n\n", "\x1b[A\x1b[A"):  # as tqdm writes them
                print(bar, end="")
            write_answer("a\r\x1b[1m\n")
            print("\r 40%\x1b[A")
        assert stream.getvalue() == f"\r 40%|████\n\n\x1b[A\x1b[A{answer}\\r 40%\\x1b[A\n"


def test_joiners_and_spaces_of_scripts_stay() -> None:
    text = "می\u200cخواهم 👩\u200d🚀 東京\u3000都 12\u00a0€"
    assert printable(text) == text


def test_nothing_is_printed_past_the_streams() -> None:
    """Only the terminal's room knows the streams below, and who tells of signals before it is imported."""
    for file in PACKAGE.rglob("*.py"):
        if file.parent.name == "terminal" or file == PACKAGE / "processes" / "early.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = {getattr(node, "attr", None), getattr(node, "id", None)}
            assert not names & {"__stdout__", "__stderr__", "Console"}, file
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "os.write":
                assert ast.unparse(node.args[0]) not in ("1", "2"), file


# --- Markdown -----------------------------------------------------------------------------------------------
MARKUP = [
    '<img src=x onerror="alert(1)">',
    "[click](https://evil.example)",
    "![pixel](https://evil.example/p.png)",
    "<https://evil.example>",
    "a | b `c` *d* _e_ ~~f~~ &lt; # g \\",
    "``\n\n# not a heading\n\n<script>",
    "x`<b>`y",
    ORDERS.replace("\r", "").replace("\n", ""),
]
READER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
TEXTS = st.text(st.sampled_from("ab \\`*_{}[]<>()#+-.!|~&;:/@$\n\x1b\u202e"), max_size=24)


def read(text: str) -> tuple[set[str], list[str]]:
    """The kinds of what is in a page, and its texts: one for each line of text, or code in it."""
    kinds, texts = set(), []
    for block in READER.parse(text):
        kinds.add(block.type)
        for each in block.children or ():
            kinds.add(each.type)
        if block.type == "inline":
            texts.append("".join(each.content for each in block.children or ()))
    return kinds, texts


@given(text=TEXTS)
@example("a/__init__.py")
@example("___a___ __b__ _c d_ 1__2__3")
@fuzz(300)
def test_any_text_is_shown_as_it_is_in_a_line_and_in_a_table(text: str) -> None:
    shown = printable(text).strip()
    for line in (f"x {markdown.escaped(text)} x", f"x {markdown.code(text)} x"):
        kinds, (found,) = read(line)
        assert kinds <= {"paragraph_open", "inline", "paragraph_close", "text", "text_special", "code_inline"}
        assert found.replace(" ", "") == f"x{shown}x".replace(" ", "")
    kinds, found = read("\n".join(markdown.table(["a", text], [[text, "b"]])))
    assert not kinds & {"html_inline", "html_block", "link_open", "image", "em_open", "code_inline"}
    assert [each.strip() for each in found if each.strip()] == ["a", *[shown, shown] * bool(shown), "b"]


# GitHub and the hub also make links of what only looks like an address.
@pytest.mark.parametrize("text", ["https://evil.example", "www.evil.example", "a@b.example", "mailto:a@b.c"])
def test_an_address_becomes_no_link(text: str) -> None:
    assert text not in markdown.escaped(text)
    assert read(markdown.escaped(text))[1] == [text]


@pytest.mark.parametrize("text", MARKUP)
@pytest.mark.parametrize("opened_by", ["peft", "falcon_qlora"])
def test_a_card_holds_no_markup_but_its_own(text: str, opened_by: str) -> None:
    def card(text: str) -> str:
        return ModelCard(
            base_model=text,
            method="lora",
            title="LoRA",
            trains="low-rank matrices",
            opened_by=opened_by,
            datasets=[text],
            settings={"dataset_name": [text], "run_name": text},
            data={text: 3},
            template=text,
            refused_by_peft=[text] if opened_by != "peft" else [],
            began_from=(text, "ab"),
            vocabulary=9,
        ).render()

    assert_same_page(card, text)


@pytest.mark.parametrize("text", MARKUP)
def test_a_certificate_holds_no_markup_but_its_own(text: str) -> None:
    def card(text: str) -> str:
        return certificate.card(
            certificate.Certificate(
                merged_onto="16bit",
                chosen_by="loss",
                dtype="bf16",
                origin=certificate.Origin(
                    base_model=text,
                    base_revision=text,
                    adapter_base=text,
                    is_the_adapters_base=False,
                    licence=None,
                    quantization=text,
                    template=text,
                    datasets=[text],
                    settings={"a": text},
                    adapter={text: text},
                ),
                held_out=certificate.HeldOut(
                    source=text, fingerprint="", documents=1, tokens=1, target_tokens=1, is_the_runs_own=True
                ),
                adapter_loss=1.0,
                merges={},
                max_loss_increase=1.0,
                max_kl_divergence=1.0,
                tensors={},
                files={},
            )
        )

    assert_same_page(card, text)


@pytest.mark.parametrize("text", MARKUP)
def test_a_comparison_holds_no_markup_but_its_own(text: str) -> None:
    def page(text: str) -> str:
        run = Compared(name=text, folder=Path(text.replace("/", "")), reason=text, command=text)
        return Comparison(title=text, compared=[run], differences=[text]).markdown()

    assert_same_page(page, text)


def assert_same_page(page: Callable[[str], str], text: str) -> None:
    """The page that has `text` in it is the one with a harmless word there, but for the word."""
    word = "falconword"
    pages = [re.sub(r"^---\n.*?\n---\n", "", page(each), flags=re.DOTALL) for each in (text, word)]
    (kinds, found), (expected_kinds, expected) = map(read, pages)
    assert kinds - {"text_special"} == expected_kinds - {"text_special"}
    assert len(found) == len(expected)
    shown = printable(text)
    assert sum(word in each for each in expected) >= 2
    for line, plain in zip(found, expected, strict=True):
        if word in plain:
            assert shown.split()[0] in line, (line, plain)


def test_a_word_of_a_shown_command_is_quoted_so_that_a_shell_reads_it() -> None:
    """`shlex` puts escape sequences in plain quotes; shown as text they would name another file."""
    found = [
        file.relative_to(PACKAGE)
        for file in PACKAGE.rglob("*.py")
        if re.search(r"shlex\.(quote|join)", file.read_text())
    ]
    assert found == [Path("common/files.py")]
