"""``falcon-qlora bench --gpus`` with the real command in two processes, on the CPU."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from falcon_qlora import __main__ as cli
from falcon_qlora.bench import scaling
from falcon_qlora.bench.scaling import Row, Work, measure
from falcon_qlora.checkpoint.manifest import newest_whole
from falcon_qlora.run_folder.directory import RunDirectory
from tests.benchmarks import against
from tests.integration.runs import ENVIRONMENT

pytestmark = pytest.mark.usefixtures("forked")


@pytest.mark.slow
def test_two_processes_share_the_global_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    size = ("--tokens", "128", "--max_length", "32", "--fixed", "global", "--global_tokens", "512")
    asked = ("--gpus", "2", "--variants", "recipe,ours,ours-fp8", "--lengths", "uneven")
    pace = ("--steps", "3", "--warmup", "1")
    file = tmp_path / "records.csv"
    status = against.main(["--models", "tiny", "--lora_r", "4", *size, *asked, *pace, "--csv", str(file)])
    assert status == 0
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [row["gpus"] for row in rows] == ["1", "1", "2"] * 3
    assert [row["variant"] for row in rows[::3]] == ["lambda-7b-4bit", "ours", "ours-fp8"]
    recipe, ours, fp8 = rows[2::3]
    assert fp8["note"].startswith("not run: there is no FP8 on the CPU; ")
    for row in (recipe, ours):
        assert "3 of 4 steps timed" in row["note"]
        assert "of the same GPUs alone" in row["note"]
        seconds = float(row["step_ms"]) / 1e3
        positions = float(row["samples_per_second_512"]) * seconds * 512
        tokens = int(row["tokens_per_second"]) * seconds
        # Padded, a step is 16 rows of 32 positions; packed, it has as many tokens as fit.
        assert positions == pytest.approx(512 if row is recipe else tokens, rel=0.05)
        assert (tokens < 400) if row is recipe else (440 < tokens <= 515)
    assert "2 GPUs" in (told := capsys.readouterr().err)
    assert "GPU 1 alone" in told


@pytest.mark.slow
def test_a_whole_run_saves_as_the_same_command_does_for_a_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    found, read_run = [], scaling.read_run

    def read(row: Row, directory: RunDirectory, *, warmup: int) -> Any:
        found.append(newest_whole(directory.checkpoints)[0])
        return read_run(row, directory, warmup=warmup)

    monkeypatch.setattr(scaling, "read_run", read)
    file = tmp_path / "records.csv"
    size = "--models tiny --lora_r 4 --tokens 128 --max_length 32 --steps 3".split()
    assert (
        cli.main(["bench", "--gpus", "1", "--variants", "ours", "--whole_run", *size, "--csv", str(file)])
        == 0
    )
    assert [each and each.name for each in found] == ["step-3", "step-3"]
    with file.open(newline="") as opened:
        assert all("with the recipe's checkpoints" in row["note"] for row in csv.DictReader(opened))


def test_a_run_that_breaks_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    row = Row(
        name="ours", model="tiny", quantize_mode="4bit", gpus=1, work=Work(), flags=("--no_such_flag", "1")
    )
    measured = measure(row, steps=1, warmup=0, on_gpu=False)
    assert measured.failure is not None
    assert measured.failure.startswith("failed: ")
    assert "--no_such_flag" in measured.failure
    assert "exit status 2" in measured.failure
    assert "--no_such_flag" in capsys.readouterr().err
