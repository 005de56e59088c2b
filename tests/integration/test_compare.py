"""Methods compared through the real command line, on the packaged model and rows."""

from __future__ import annotations

import csv
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from falcon_qlora import config
from falcon_qlora.commands import compare
from falcon_qlora.commands.words import split
from falcon_qlora.common.errors import UserError
from falcon_qlora.compare import plan
from falcon_qlora.data.sample_data import path as sample_rows
from falcon_qlora.run_folder.directory import RunDirectory
from tests.integration.processes import Processes
from tests.integration.runs import command, metrics, summary

SETTINGS = (
    f"-m tiny --dataset_name {sample_rows()} --gpus 1 --report_to none --max_length 64 -b 4 --steps 8 "
    "--global_batch_size 8 --eval_split 0.05 --max_rows 160 --compute_dtype fp32 --save_strategy no "
    "--logging_steps 1"
).split()
RATES = {"adapter": "1e-1", "adapter_v2": "1e-2", "lora": "2e-2", "qlora": "2e-3", "full": "2e-4"}


def run(folder: Path, methods: list[str], *more: str) -> list[dict[str, Any]]:
    rates = [f"{name}={RATES[name]}" for name in methods]
    given = ["--methods", ",".join(methods), "--learning_rates", *rates, "--output_dir", str(folder)]
    # Here, as the processes that train take long enough to begin.
    assert compare.main([*given, *SETTINGS, *more]) == 0
    with (folder / "comparison.csv").open() as file:
        return list(csv.DictReader(file))


def check_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        record, lines = summary(folder / "runs" / row["method"]), metrics(folder / "runs" / row["method"])
        losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
        assert lines[0]["step"] == 0, "not evaluated before the first step"
        assert [float(row["eval_loss_before"]), float(row["eval_loss_after"])] == [losses[0], losses[-1]]
        assert losses[-1] < 0.9 * losses[0]
        assert int(row["trainable_parameters"]) == record["trainable_parameters"]
        assert float(row["seconds"]) == pytest.approx(record["train_seconds"])
        assert int(row["samples"]) == record["samples"]
    # The same rows before any step, in float32 and, a little apart, in 4 bits.
    before = [float(row["eval_loss_before"]) for row in rows]
    assert before == pytest.approx([before[0]] * len(rows), rel=0.05)
    assert len({row["samples"] for row in rows}) == 1


def test_two_methods_are_compared_and_not_trained_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = run(tmp_path, ["lora", "full"])
    check_rows(tmp_path, rows)
    assert rows[0]["trainable_parameters"] == str(5 * (2 * 8 * 256 + 8 * (256 + 64)))
    assert (tmp_path / "training-time.png").exists()
    kept = [(tmp_path / "runs" / name / "metrics.jsonl").read_bytes() for name in ("lora", "full")]
    capfd.readouterr()
    assert run(tmp_path, ["lora", "full"]) == rows
    assert capfd.readouterr().out.count("trained already") == 2
    assert kept == [(tmp_path / "runs" / name / "metrics.jsonl").read_bytes() for name in ("lora", "full")]
    with pytest.raises(UserError, match="holds a run with other settings"):
        compare.main(["--methods", "full", "--output_dir", str(tmp_path), *SETTINGS])


@pytest.mark.slow
def test_only_the_method_that_is_missing_is_trained(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = run(tmp_path, ["lora", "full"])
    kept = (tmp_path / "runs" / "full" / "metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "runs" / "lora")
    (tmp_path / "runs" / "full" / "adapter" / "untouched").touch()
    capfd.readouterr()
    again = run(tmp_path, ["lora", "full"])
    assert capfd.readouterr().out.count("trained already") == 1
    assert (tmp_path / "runs" / "full" / "metrics.jsonl").read_bytes() == kept
    assert (tmp_path / "runs" / "full" / "adapter" / "untouched").exists()
    assert again[1] == rows[1] | {"time_ratio_to_full": "1.0"}
    assert again[0]["eval_loss_after"] == rows[0]["eval_loss_after"]


@pytest.mark.slow
def test_all_methods_learn_and_one_that_cannot_run_says_why(tmp_path: Path) -> None:
    names = list(plan.METHODS)
    rows = run(tmp_path, names)
    check_rows(tmp_path, rows)
    assert [row["method"] for row in rows] == names
    assert [row["base"] for row in rows] == ["16bit", "16bit", "16bit", "4bit", "16bit"]
    # The command that the report gives for a method makes its losses.
    words = next(
        line.strip(" `").split()
        for line in (tmp_path / "comparison.md").read_text().splitlines()
        if line.startswith("  `falcon-qlora train --recipe lit-adapter ")
    )
    alone = command(*words[1:], "--output_dir", tmp_path / "alone")
    assert alone.returncode == 0
    expected, found = (
        [line.get("loss", line.get("eval_loss")) for line in metrics(tmp_path / name)]
        for name in ("alone", "runs/adapter")
    )
    assert found == expected
    quantized = run(tmp_path / "quantized", ["full", "adapter"], "-q", "4bit")
    assert "quantized weights cannot take a step" in quantized[0]["reason"]
    assert quantized[1]["base"] == "4bit"


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    saving = ["--save_strategy", "steps", "--save_steps", "4", "--eval_steps", "4"]
    (whole,) = run(tmp_path, ["adapter"], *saving)
    lines = metrics(tmp_path / "runs" / "adapter")
    (tmp_path / "runs" / "adapter" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "runs" / "adapter" / "adapter")
    shutil.rmtree(tmp_path / "runs" / "adapter" / "checkpoints" / "step-8")
    (again,) = run(tmp_path, ["adapter"], *saving)
    for name in ("samples", "eval_loss_before", "eval_loss_after", "disk_bytes"):
        assert again[name] == whole[name]
    numbers = [
        [(line["step"], line.get("loss"), line.get("eval_loss")) for line in each]
        for each in (lines, metrics(tmp_path / "runs" / "adapter"))
    ]
    assert numbers[0] == numbers[1]
    evaluated = [step for step, _, loss in numbers[1] if loss is not None]
    assert evaluated == [0, 4, 8]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_a_signal_ends_it_with_what_it_started_and_the_same_command_goes_on(
    tmp_path: Path, number: signal.Signals
) -> None:
    processes, log = Processes(tmp_path), tmp_path / "out/runs/adapter/metrics.jsonl"
    words = ["compare", "--methods", "adapter,lora", "--output_dir", "out", *SETTINGS, "--steps", "60"]
    try:
        started = processes.start("falcon_qlora", *words)
        while not log.exists() and started.poll() is None:
            time.sleep(0.05)
        started.send_signal(number)
        output, errors = started.communicate(timeout=120)
        assert (started.returncode, errors) == (128 + number, "")
        assert processes.none_left()
        assert f"{number.name}: a checkpoint is saved" in output
        assert output.endswith("Stopped. The same command with --output_dir out goes on here.\n")
        stopped = re.search(r"stopped at step (\d+) of 60", output)
        assert stopped is not None
        assert not (tmp_path / "out/runs/lora").exists()
        again = processes.start("falcon_qlora", *words)
        output, errors = again.communicate(timeout=240)
        assert (again.returncode, errors) == (0, "")
        assert f"going on from step {stopped[1]}" in output
        assert [line["step"] for line in metrics(log.parent) if "loss" in line] == list(range(1, 61))
        assert (tmp_path / "out/runs/lora/summary.json").exists()
    finally:
        processes.end()


@pytest.mark.slow
def test_full_is_shared_out_beside_an_adapter_with_an_optimizer_that_goes_with_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = run(tmp_path, ["adapter", "full"], "--gpus", "2", "--sharding", "fsdp")
    check_rows(tmp_path, rows)
    told = capfd.readouterr().out
    assert "note: the model is sharded over the 2 processes" in told
    assert "recipe lit-full's adamw_bnb_8bit does not work on a sharded model: adamw_torch_fused" in told
    full = RunDirectory(tmp_path / "runs" / "full")
    assert full.read_config()["optim"] == "adamw_torch_fused"
    assert run(tmp_path, ["adapter", "full"], "--gpus", "2", "--sharding", "fsdp") == rows
    assert capfd.readouterr().out.count("trained already") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", ","], "--methods names none; give some of adapter,"),
        (["--methods", "adapter", "--sharding", "fsdp"], "--sharding does nothing with --methods adapter"),
        (["--methods", "lora,adaptor"], "'adaptor' is not one of .*did you mean adapter"),
        (["--methods", "lora", "--recipes", "full=lit-full"], "--recipes: full is not among --methods"),
        (["--methods", "lora", "--learning_rates", "lora"], "'lora' is not METHOD=VALUE"),
        (["--methods", "adapter", "--lora_r", "8"], "--lora_r does nothing with --methods adapter"),
        (["--methods", "lora,qlora", "--recipes", "qlora=default"], "all methods must see the same rows"),
        (["--methods", "full", "-q", "4bit"], "quantized weights cannot take a step"),
        (["--resume"], "goes on by itself"),
        (["--method", "lora"], "give --methods"),
    ],
)
def test_what_cannot_be_compared_is_refused_at_once(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compare.main(["-m", "tiny", *words])


def test_a_run_that_went_on_is_the_one_it_was(tmp_path: Path) -> None:
    # Going on, it has written down the size of its steps, which the user left to the number of processes;
    # and the optimizer that a sharded model took, where a recipe named one that does not go with it.
    words = f"-m tiny --dataset_name {sample_rows()} --report_to none -b 2".split()
    asked = config.parse(words)
    adopted = config.parse([*words, "--global_batch_size", "6"])
    for went_on, same in ((adopted, True), (config.parse([*words, "--learning_rate", "1"]), False)):
        RunDirectory(tmp_path).write_config(went_on.resolved())
        assert plan.read_alike(tmp_path, asked) is same
    replaced = config.parse([*words, "--recipe", "lit-full", "--optim", "adamw_torch_fused"])
    RunDirectory(tmp_path).write_config(replaced.resolved())
    assert plan.read_alike(tmp_path, config.parse([*words, "--recipe", "lit-full"]))
    named = ["--recipe", "lit-full", "--optim", "adamw_bnb_8bit"]
    assert not plan.read_alike(tmp_path, config.parse([*words, *named]))


def test_flags_of_one_method_reach_that_one_alone() -> None:
    words = "--lora_target_modules dense query_key_value --adapter_first_block=0 --sharding fsdp -s -1"
    words += " --hub_token=SECRET"
    planned = plan.plan(
        config.read_flags(words.split()),
        names=split(["lora, full ,", "adapter"]),
        recipes=["full=my.yaml"],
        learning_rates=["lora=0.5"],
    )
    assert {method.name: method.words for method in planned} == {
        "lora": (
            "--recipe lit-lora --method lora --lora_target_modules dense query_key_value --max_steps=-1 "
            "--learning_rate 0.5"
        ).split(),
        "full": "--recipe my.yaml --method full --sharding fsdp --max_steps=-1".split(),
        "adapter": "--recipe lit-adapter --method adapter --adapter_first_block 0 --max_steps=-1".split(),
    }
