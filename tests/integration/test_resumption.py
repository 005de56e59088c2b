"""What a run may have changed when it goes on, and what makes it another run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import falcon_qlora
from falcon_qlora.errors import UserError
from tests.integration.runs import write_jsonl

ROWS = [{"instruction": f"Say {number}.", "output": f"It is {number}."} for number in range(12)]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, and its rows: a stream of a file and a folder."""
    folder = tmp_path_factory.mktemp("stopped")
    write_jsonl(folder / "rows.jsonl", ROWS)
    (folder / "more").mkdir()
    for name in "ab":
        write_jsonl(folder / "more" / f"{name}.jsonl", ROWS)
    falcon_qlora.train(
        model_name_or_path="tiny",
        dataset_name=[folder / "rows.jsonl", folder / "more"],
        streaming=True,
        output_dir=folder / "run",
        max_length=64,
        max_steps=2,
        logging_steps=1,
        save_steps=1,
        lora_r=4,
        report_to="none",
    )
    shutil.rmtree(folder / "run" / "checkpoints" / "step-2")
    return folder


def refusal(folder: Path, **settings: Any) -> str:
    """Why the run does not go on, with which nothing of it may be lost."""
    before = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError) as refused:
        falcon_qlora.train(resume=folder / "run", **settings)
    assert before == {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    return str(refused.value)


@pytest.mark.parametrize(
    ("setting", "value", "was"),
    [
        ("compute_dtype", "bf16", "auto"),
        ("optim_args", "momentum=0.5", "None"),
        ("lr_scheduler_kwargs", '{"num_cycles": 2}', "None"),
        ("neftune_noise_alpha", 5, "None"),
    ],
)
def test_a_setting_that_changes_the_losses_is_refused(stopped, setting, value, was):
    assert refusal(stopped, **{setting: value}).startswith(f"--resume: {setting} was {was} in the run")


def test_what_changes_the_rounding_alone_is_said(stopped, capsys):
    refusal(stopped, kernels="off", dataset_name="none.jsonl")  # so that it ends before the model is read
    assert "note: kernels was auto and is off now: the losses agree up to rounding" in capsys.readouterr().out
