"""A run of an earlier release still opens, and is resumed as it would have gone on then.

``old_run/`` was trained by the release before the rooms were moved (commit 71182b5) for four steps, and keeps
its checkpoint of step 2.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import falcon_qlora
from falcon_qlora import __main__ as cli
from falcon_qlora.models.tiny import tiny_path
from tests.integration.runs import metrics

OLD = Path(__file__).parent / "old_run"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, beside its data, in the working directory."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "runs" / "old"
    shutil.copy(
        tiny_path() / "tokenizer.json", folder / "adapter"
    )  # the same file; it need not be kept twice
    monkeypatch.chdir(tmp_path)
    return folder


def test_it_opens(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("runs/old", "runs/old/adapter", "runs/old/checkpoints/step-2"):
        assert cli.main(["inspect", folder]) == 0, folder
    assert "tiny" in capsys.readouterr().out
    words = ["--adapter", "runs/old", "--prompt", "Name a bird.", "--max_new_tokens", "2"]
    assert cli.main(["generate", *words]) == 0
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_path()), run / "adapter")


def test_it_is_resumed_as_it_would_have_gone_on(run: Path) -> None:
    before, adapter = metrics(run), load_file(run / "adapter" / "adapter_model.safetensors")
    falcon_qlora.train(resume="runs/old")
    again = metrics(run)
    assert [line["step"] for line in again] == [1, 2, 3, 4]
    for old, new in zip(before, again, strict=True):
        assert new["learning_rate"] == old["learning_rate"]
        assert new["loss"] == pytest.approx(old["loss"], rel=1e-4)  # another processor rounds otherwise
    # Adam's first steps move each weight by about the rate, whatever rounding its gradient has seen.
    resumed = load_file(run / "adapter" / "adapter_model.safetensors")
    assert_close(resumed, adapter, rtol=1e-3, atol=2e-5)
