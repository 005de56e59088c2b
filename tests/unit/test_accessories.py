"""What a run can do without costs it a line; what libraries fail with ends it with one."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from falcon_qlora import __main__ as cli
from falcon_qlora.common.errors import UserError
from falcon_qlora.models.tokenizer import load_tokenizer
from falcon_qlora.processes import endings
from falcon_qlora.run_folder.directory import RunDirectory
from falcon_qlora.terminal import console
from tests.panics import PanicException


@pytest.fixture(autouse=True)
def fresh_console() -> Iterator[None]:
    console.console.cache_clear()
    yield
    console.console.cache_clear()


def test_a_picture_that_cannot_be_drawn_costs_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = RunDirectory(tmp_path)
    directory.append_metrics(1, {"loss": 1.0})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    directory.draw_loss()
    assert capsys.readouterr().out.startswith(f"note: {directory.loss_picture} could not be written (import")


def test_a_tokenizer_that_panics_is_told_as_one_that_cannot_be_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def panic(*arguments: Any, **how: Any) -> Any:
        raise PanicException("index out of bounds")

    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", panic)
    with pytest.raises(UserError, match=r"the tokenizer of tiny cannot be loaded: .*index out of bounds"):
        load_tokenizer("tiny")


def test_a_panic_in_a_process_of_a_run_ends_it_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def panic() -> None:
        raise PanicException("index out of bounds")

    assert endings.exit_status(panic) == 1
    assert capsys.readouterr().err == "error: native code of a library panicked: index out of bounds\n"


def test_a_terminal_that_cannot_show_a_character_gets_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "Grüß mich → jetzt.", "output": "Ja."}\n', encoding="utf-8")
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="ascii"))
    words = ["-m", "tiny", "--dataset_name", str(rows), "--max_length", "64", "--cache_dir", str(tmp_path)]
    assert cli.main(["data", *words]) == 0
    sys.stdout.flush()
    assert rb"Gr\xfc\xdf mich \u2192 jetzt." in terminal.getvalue()
