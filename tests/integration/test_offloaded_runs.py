"""Runs whose base is in CPU memory: to the last bit those of a base on the device; each goes on as either."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

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
        ("-q 16bit --method adapter_v2 --adapter_first_block 0 --checkpointing offload", 1),
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "gpus"),
    [
        ("--offload_base", 1),  # whose settings are eval's
        ("--use_dora", 1),
        ("--sharding fsdp", 2),
        ("-q 16bit --method full", 1),
    ],
)
def test_what_was_trained_is_measured_and_merged_from_cpu_memory_to_the_last_bit(
    tmp_path: Path, flags: str, gpus: int
) -> None:
    run = tmp_path / "run"
    settings = [each for each in SETTINGS if "full" not in flags or each not in ("--lora_r", "8")]
    train(run, *settings, "--eval_split", "0.1", *flags.split(), gpus=gpus)

    def figures(*more: str) -> dict[str, Any]:
        result = command("eval", "--adapter", run, "--results", tmp_path / "figures.json", *more)
        assert result.returncode == 0, result.stderr
        return json.loads((tmp_path / "figures.json").read_text())

    resident = figures("--offload_base", "false")
    assert figures("--offload_base") == resident
    if flags == "--offload_base":
        assert figures() == resident
    if "full" in flags:
        return
    for way in ("true", "false"):
        merge = ("merge", "--adapter", run, "--out", tmp_path / way, "--offload_base", way)
        assert command(*merge, "--held_out_tokens", "256").returncode == 0
    one, other = (json.loads((tmp_path / way / "certificate.json").read_text()) for way in ("true", "false"))
    assert one == other


@pytest.mark.slow
def test_every_run_with_it_says_with_it_how_its_adapter_is_tried(tmp_path: Path) -> None:
    words = ("train", "--output_dir", tmp_path / "run", "--report_to", "none", *SETTINGS)
    assert "generate --adapter" in (told := command(*words, *OFFLOADED).stdout)
    assert f"{tmp_path / 'run/adapter'} --offload_base --prompt" in told
