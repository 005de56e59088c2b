"""From Python, in a notebook: one training, and what it made is asked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import falcon_qlora
import falcon_qlora.training.finish  # other libraries ask IPython, as they load, for what is not there
from falcon_qlora import __main__ as cli
from falcon_qlora.common.errors import UserError
from falcon_qlora.data.templates import Turn, get_template
from falcon_qlora.data.tokens import prompt_ids
from falcon_qlora.inference.generation import generate_batch
from falcon_qlora.models import hub
from falcon_qlora.models.tokenizer import load_tokenizer
from falcon_qlora.terminal import console
from tests.integration.runs import write_jsonl
from tests.notebook_cell import pretend_notebook


class LostHub:
    """A hub that knows the user, and cannot be reached later."""

    def __init__(self, token: str | None = None):
        pass

    def whoami(self) -> None:
        pass

    def create_repo(self, *arguments: Any, **how: Any) -> Any:
        raise ConnectionError("no network")


def test_a_notebook_trains_with_a_bar_and_a_picture_and_asks_with_the_runs_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cell = pretend_notebook(monkeypatch)
    console.console.cache_clear()
    monkeypatch.setattr(hub, "HfApi", LostHub)
    rows = [{"instruction": f"Say {n}.", "output": f"It is {n}."} for n in range(40)]
    run = falcon_qlora.train(
        model_name_or_path="tiny",
        dataset_name=write_jsonl(tmp_path / "rows.jsonl", rows),
        output_dir=tmp_path / "run",
        cache_dir=tmp_path / "cache",
        max_length=64,
        max_steps=4,
        save_steps=2,
        lora_r=4,
        learning_rate=3e-3,
        report_to="none",
        push_to_hub=True,
        hub_model_id="me/mine",
    )
    told = capfd.readouterr()
    assert told.err == ""
    assert not re.search(r"^step \d", told.out, re.MULTILINE)
    (bar, picture) = cell.displays
    assert 'value="4" max="4"' in bar[-1]["text/html"]
    assert picture[-1]["image/png"].startswith(b"\x89PNG")
    notes = [line for line in told.out.splitlines() if line.startswith("note: ")]
    (lost,) = [line for line in notes if "me/mine" in line]
    assert "no network" in lost
    assert lost.endswith(f"hf upload me/mine {run / 'adapter'}")

    model = falcon_qlora.load_adapter(run)
    capfd.readouterr()
    answer = model.generate_text("Say 3.", max_new_tokens=12)
    assert answer
    assert model.chat("Say 3.", max_new_tokens=12) == answer
    assert cli.main(["generate", "--adapter", str(run), "--prompt", "Say 3.", "--max_new_tokens", "12"]) == 0
    assert capfd.readouterr().out.strip() == answer

    said = [("user", "Say 3."), ("assistant", "It is 3."), ("user", "Say 4.")]
    tokenizer = load_tokenizer("tiny")
    ids = prompt_ids(get_template("alpaca"), [Turn(role, text) for role, text in said], tokenizer)
    (expected,) = generate_batch(model, tokenizer, [ids], max_new_tokens=12)
    messages = [{"role": role, "content": text} for role, text in said]
    assert model.chat(messages, max_new_tokens=12) == expected.strip()
    for nothing in ([], messages[:2]):
        with pytest.raises(UserError, match="there is nothing to answer"):
            model.chat(nothing)
    with pytest.raises(UserError, match="message 1: unknown role 'me'"):
        model.chat([{"role": "me", "content": "x"}])
