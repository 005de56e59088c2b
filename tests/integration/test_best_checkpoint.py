"""Which checkpoint is the best one, where evaluations, saves, stops and failures fall otherwise than usual.

At a learning rate of zero all evaluations are the same to the last bit: none is better than the first.
"""

from __future__ import annotations

import errno
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

import falcon_qlora
from falcon_qlora.processes import stop_signals
from tests.integration.runs import metrics, summary
from tests.integration.test_adapter import fine_tune
from tests.integration.test_background_saves import fail_save

# A rate that moves what is zero, and changes no loss.
SAME = {"learning_rate": 1e-20, "eval_split": 0.3, "eval_steps": 1, "logging_steps": 1, "save_total_limit": 9}


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.slow
def test_a_run_that_saves_its_best_alone_is_saved_where_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {**SAME, "save_strategy": "best", "eval_strategy": "steps", "max_steps": 4}
    settings["generate_samples"] = 1
    with monkeypatch.context() as patch:
        patch.setattr(stop_signals, "asked_to_stop", lambda: signal.SIGTERM)
        run = fine_tune(tmp_path, **settings)
    assert checkpoints(run) == ["step-1", "step-2"]
    assert not (run / "adapter").exists()
    fine_tune(tmp_path, **settings, resume="latest")
    assert (summary(run)["steps"], summary(run)["best_step"]) == (4, 1)
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]
    answers = (run / "samples.jsonl").read_text().splitlines()
    assert [json.loads(answer)["step"] for answer in answers] == [0, 1, 2, 3, 4]


def test_the_best_is_one_that_was_saved(tmp_path: Path) -> None:
    run = fine_tune(tmp_path, **SAME, max_steps=4, save_steps=2)
    assert checkpoints(run) == ["step-2", "step-4"]
    found = summary(run)
    assert (found["best_step"], found["best_eval_loss"]) == (2, metrics(run)[1]["eval_loss"])


def test_the_best_is_none_that_could_not_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_save(monkeypatch, 1, OSError(errno.ENOSPC, "No space left on device"))
    run = fine_tune(tmp_path, **SAME, max_steps=3, save_steps=1)
    assert checkpoints(run) == ["step-2", "step-3"]
    assert summary(run)["best_step"] == 2
    assert (run / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_where_the_best_is_damaged_the_best_after_it_is_kept_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fine_tune(tmp_path, **SAME, max_steps=3, save_steps=1)
    assert summary(run)["best_step"] == 1
    shutil.rmtree(run / "checkpoints" / "step-3")
    (run / "checkpoints" / "step-1" / "optimizer.pt").write_bytes(b"")
    falcon_qlora.train(resume=run)
    assert "step-1, the best so far, is not whole (optimizer.pt has 0 bytes" in capsys.readouterr().out
    assert summary(run)["best_step"] == 3


def test_an_epoch_is_a_pass_over_the_data(tmp_path: Path) -> None:
    per_epoch = dict.fromkeys(("logging_strategy", "eval_strategy", "save_strategy"), "epoch")
    settings = {"eval_split": 0.3, "save_total_limit": 9, "packing": False, "max_steps": -1, **per_epoch}
    # What is not held out of six documents makes two steps.
    run = fine_tune(tmp_path, **settings, num_train_epochs=2.5)
    assert checkpoints(run) == ["step-2", "step-4", "step-5"]
    lines = metrics(run)
    assert [(line["step"], line["epoch"]) for line in lines] == [(2, 1.0), (4, 2.0), (5, 2.5)]
    assert all("eval_loss" in line and "loss" in line for line in lines)
    stopped = fine_tune(
        tmp_path,
        **settings,
        num_train_epochs=9,
        learning_rate=1e-20,  # which moves what is zero, and no loss
        early_stopping=1,
        output_dir=tmp_path / "stopped",
    )
    assert [line["step"] for line in metrics(stopped)] == [2, 4]
