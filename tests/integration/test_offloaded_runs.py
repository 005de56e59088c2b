"""Runs whose base is in CPU memory: to the last bit those of a base on the device; each goes on as either."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.integration.interrupted import assert_same_run
from tests.integration.runs import command, metrics, train
from tests.integration.test_shared_out import SETTINGS

OFFLOADED = ("--offload_base",)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "gpus"),
    [
        ("-q 4bit --eval_split 0.1 --eval_steps 2 --generate_samples 1", 1),
        ("-q 8bit --kernels off --checkpointing full --lora_dropout 0.1 --packing true", 2),
        ("-q 16bit --method adapter_v2 --checkpointing offload", 1),
    ],
)
def test_a_run_is_that_of_a_base_on_the_device_to_the_last_bit(tmp_path: Path, flags: str, gpus: int) -> None:
    settings = [each for each in SETTINGS if "adapter" not in flags or each not in ("--lora_r", "8")]
    resident, offloaded = tmp_path / "resident", tmp_path / "offloaded"
    train(resident, *settings, *flags.split(), gpus=gpus)
    train(offloaded, *settings, *flags.split(), *OFFLOADED, gpus=gpus)
    assert_same_run(offloaded, resident)
    assert [[line.get("loss"), line.get("eval_loss")] for line in metrics(offloaded)] == [
        [line.get("loss"), line.get("eval_loss")] for line in metrics(resident)
    ]
    if "--generate_samples" in flags:
        answers = [(run / "samples.jsonl").read_text() for run in (resident, offloaded)]
        assert answers[0] == answers[1] != ""


@pytest.mark.slow
def test_a_run_goes_on_offloaded_or_not(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    train(whole, *SETTINGS, *OFFLOADED)
    for name, flags in (("again", OFFLOADED), ("resident", ("--offload_base", "false"))):
        run = tmp_path / name
        shutil.copytree(whole, run)
        shutil.rmtree(run / "adapter")
        shutil.rmtree(run / "checkpoints/step-4")
        result = command("train", "--resume", run, *flags)
        assert (result.returncode, result.stderr) == (0, "")
        assert "going on from step 2" in result.stdout
        assert ("in CPU memory" in result.stdout) == (name == "again")
        assert_same_run(run, whole)
