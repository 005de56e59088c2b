"""Methods compared through the real command line, on the packaged model and rows."""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from falcon_qlora import config
from falcon_qlora.commands import compare
from falcon_qlora.commands.words import split
from falcon_qlora.common.errors import UserError
from falcon_qlora.compare import plan, report
from falcon_qlora.config.arguments import LaunchArguments
from falcon_qlora.data.sample_data import path as sample_rows
from falcon_qlora.processes import stop_signals
from falcon_qlora.run_folder.directory import RunDirectory
from tests.integration.interrupted import SMALL
from tests.integration.processes import Processes
from tests.integration.runs import command, metrics, summary
from tests.unit.test_report import make_run

SETTINGS = (
    f"--dataset_name {sample_rows()} --gpus 1 --report_to none --max_length 64 -b 4 "
    "--global_batch_size 8 --eval_split 0.05 --max_rows 160 --compute_dtype fp32 --save_strategy no "
    "--logging_steps 1"
).split()
pytestmark = pytest.mark.usefixtures("forked")
LEARNING = "-m tiny --steps 8".split()
QUICK = f"{SMALL} --steps 3".split()
RATES = {"adapter": "1e-1", "adapter_v2": "1e-2", "lora": "2e-3", "qlora": "2e-3", "full": "2e-4"}


def run(folder: Path, methods: list[str], *more: str, size: Sequence[str] = LEARNING) -> list[dict[str, Any]]:
    rates = [f"{name}={RATES[name]}" for name in methods]
    given = ["--methods", ",".join(methods), "--learning_rates", *rates, "--output_dir", str(folder)]
    assert compare.main([*given, *SETTINGS, *size, *more]) == 0
    with (folder / "comparison.csv").open() as file:
        return list(csv.DictReader(file))


def check_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        folder_of_run = folder / "runs" / row["name"]
        record, lines = summary(folder_of_run), metrics(folder_of_run)
        losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
        assert lines[0]["step"] == 0, "not evaluated before the first step"
        assert [float(row["eval_loss_before"]), float(row["eval_loss_after"])] == [losses[0], losses[-1]]
        assert losses[-1] < 0.9 * losses[0]
        assert int(row["trainable_parameters"]) == record["trainable_parameters"]
        assert float(row["seconds"]) == pytest.approx(record["train_seconds"])
        assert float(row["wall_seconds"]) == record["wall_seconds"]
        assert int(row["samples"]) == record["samples"]
    # The same rows before any step, by the same base.
    before = {(row["base"], f"{float(row['eval_loss_before']):.4f}") for row in rows}
    assert len(before) == len({row["base"] for row in rows})
    assert len({row["samples"] for row in rows}) == 1


@pytest.mark.slow
def test_two_methods_are_compared_and_not_trained_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    slices = ["--lora_r", "8", "--lora_slices", "query", "value"]
    rows = run(tmp_path, ["lora", "full"], *slices)
    assert "lora: --quantize_mode 16bit, not 4bit: " in capfd.readouterr().out
    check_rows(tmp_path, rows)
    assert rows[0]["trainable_parameters"] == str(5 * (2 * 8 * 256 + 8 * (256 + 64)))
    for picture in ("training-time.png", "evaluation-loss.png", "loss-curves.png"):
        assert (tmp_path / picture).exists()
    kept = [(tmp_path / "runs" / name / "metrics.jsonl").read_bytes() for name in ("lora", "full")]
    assert run(tmp_path, ["lora", "full"], *slices) == rows
    assert capfd.readouterr().out.count("trained already") == 2
    assert kept == [(tmp_path / "runs" / name / "metrics.jsonl").read_bytes() for name in ("lora", "full")]
    with pytest.raises(UserError, match="holds a run with other settings"):
        compare.main(["--methods", "full", "--output_dir", str(tmp_path), *SETTINGS, *LEARNING])


@pytest.mark.slow
def test_only_the_runs_that_are_missing_are_trained(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = run(tmp_path, ["lora", "full"], size=QUICK)
    kept = (tmp_path / "runs" / "full" / "metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "runs" / "lora")
    (tmp_path / "runs" / "full" / "adapter" / "untouched").touch()
    capfd.readouterr()
    again = run(tmp_path, ["lora", "full"], "--seeds", "2", size=QUICK)
    assert capfd.readouterr().out.count("trained already") == 1
    assert (tmp_path / "runs" / "full" / "metrics.jsonl").read_bytes() == kept
    assert (tmp_path / "runs" / "full" / "adapter" / "untouched").exists()
    assert [(row["name"], row["seed"]) for row in again] == [
        ("lora", "42"),
        ("full", "42"),
        ("lora", "43"),
        ("full", "43"),
    ]
    assert [row["eval_loss_after"] for row in again[:2]] == [row["eval_loss_after"] for row in rows]
    for row, name in zip(again[2:], ("lora", "full"), strict=True):
        lines = metrics(tmp_path / "runs" / f"{name}-seed-43")
        assert float(row["eval_loss_after"]) == lines[-1]["eval_loss"]
        assert row["eval_loss_after"] != again[("lora", "full").index(name)]["eval_loss_after"]
    told = (tmp_path / "comparison.md").read_text()
    assert "each with a --seed of its own, which also draws the held-out rows" in told
    assert re.search(r"\| evaluation loss after \| [\d.]+ \([\d.]+ to [\d.]+\) \|", told)


@pytest.mark.slow
def test_all_methods_learn_and_one_that_cannot_run_says_why(tmp_path: Path) -> None:
    names = list(plan.METHODS)
    rows = run(tmp_path, names)
    check_rows(tmp_path, rows)
    assert [row["name"] for row in rows] == names
    assert [row["base"] for row in rows] == ["4bit", "4bit", "16bit", "4bit", "16bit"]
    # The command that the report gives for a method makes its losses.
    words = next(
        line.split("`")[1].split()
        for line in (tmp_path / "comparison.md").read_text().splitlines()
        if line.startswith("- adapter: `falcon-qlora train ")
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
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_what_it_started_and_the_same_command_goes_on(
    tmp_path: Path, number: signal.Signals
) -> None:
    processes, log = Processes(tmp_path), tmp_path / "out/runs/adapter/metrics.jsonl"
    words = ["compare", "--methods", "adapter,lora", "--output_dir", "out", *SETTINGS, *SMALL.split()]
    words += ["--steps", "60", "--adapter_first_block", "0"]
    try:
        started = processes.start("falcon_qlora", *words)
        while not log.exists() and started.poll() is None:
            time.sleep(0.05)
        started.send_signal(number)
        output, errors = started.communicate(timeout=120)
        assert (started.returncode, errors) == (75, "")  # as of train, whose run is saved
        assert processes.none_left()
        assert f"{number.name}: saving at the end of a step" in output
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
    flags = "--gpus 2 --sharding fsdp --recipes adapter=lit-adapter full=lit-full".split()
    rows = run(tmp_path, ["adapter", "full"], *flags)
    check_rows(tmp_path, rows)
    told = capfd.readouterr().out
    assert "note: the model is sharded over the 2 processes" in told
    assert "recipe lit-full's adamw_bnb_8bit does not work on a sharded model: adamw_torch_fused" in told
    full = RunDirectory(tmp_path / "runs" / "full")
    assert full.read_config()["optim"] == "adamw_torch_fused"
    assert run(tmp_path, ["adapter", "full"], *flags) == rows
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
        (
            ["--methods", "adapter", "--lora_r", "8", "--sharding", "fsdp", "--recipes", "full=lit-full"],
            "3 things to mend\n  --recipes: full is.*\n  --lora_r does nothing.*\n  --sharding does nothing",
        ),
        (["--methods", "lora,qlora", "--recipes", "qlora=lit-qlora"], "all methods must see the same rows"),
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


def planned(words: str, **more: list[str]) -> tuple[list[plan.Planned], dict[str, str]]:
    how = {"recipes": [], "learning_rates": [], **more}
    return plan.plan(config.read_flags(words.split()), extra_arguments=LaunchArguments, **how)


def test_flags_of_one_method_reach_that_one_alone(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("learning_rate: 0.25")
    of_all = "--max_steps=-1 --push_to_hub true --hub_model_id me/it --eval_strategy no"
    words = "--lora_target_modules dense query_key_value --adapter_first_block=0 --sharding fsdp"
    methods, refused = planned(
        f"{words} {of_all} --hub_token=SECRET",
        names=split(["lora, full ,", "adapter"]),
        recipes=[f"full={tmp_path}/my.yaml"],
        learning_rates=["lora=0.5"],
    )
    assert {method.name: method.words for method in methods} == {
        "lora": (
            f"--method lora --lora_target_modules dense query_key_value {of_all} --learning_rate 0.5 "
            "--quantize_mode 16bit"
        ).split(),
        "full": f"--method full --sharding fsdp {of_all} --recipe {tmp_path}/my.yaml".split(),
        "adapter": f"--method adapter --adapter_first_block 0 {of_all} --learning_rate 0.009".split(),
    }
    assert refused == {}


def test_a_method_is_trained_as_train_would_but_for_what_is_told() -> None:
    words = "-m tiny --max_steps 8 --eval_strategy steps --eval_split 0.1 --lora_r 4"
    names = ["adapter", "lora", "qlora", "full"]
    methods, _ = planned(words, names=names)
    for method in methods:
        flags = words.replace(" --lora_r 4", " --lora_r 4" * ("lora" in method.name))
        as_train = config.parse([*flags.split(), "--method", method.configuration.method.name]).resolved()
        differing = {
            name for name, value in method.configuration.resolved().items() if as_train.get(name) != value
        }
        assert differing == method.instead.keys()
        assert all(method.instead[name][1] == as_train.get(name) for name in differing)
    assert [sorted(method.instead) for method in methods] == [
        ["eval_on_start", "learning_rate"],
        ["eval_on_start", "quantize_mode"],
        ["eval_on_start"],
        ["eval_on_start", "learning_rate"],
    ]
    told = plan.differences(methods, seeds=2)
    assert [line.split(":")[0] for line in told] == ["adapter", "all", "lora", "full", "all"]
    assert told[2].startswith("lora: --quantize_mode 16bit, not 4bit: ")
    assert "which also draws the held-out rows" in told[-1]
    # A flag, a file or a recipe says otherwise.
    methods, refused = planned(f"{words} -q 8bit --learning_rate 1", names=names)
    assert [(each.name, list(each.instead)) for each in methods] == [
        ("adapter", ["eval_on_start"]),
        ("lora", ["eval_on_start"]),
    ]
    assert refused["qlora"] == "with these settings it is the same as lora"
    assert "quantized weights cannot take a step" in refused["full"]
    methods, _ = planned("-m tiny --eval_split 0.1 --recipe lit-full", names=["adapter", "lora", "full"])
    assert {name for each in methods for name in each.instead} == {"eval_on_start"}


def test_each_seed_has_its_folder_and_the_first_is_as_without(tmp_path: Path) -> None:
    (lora,), _ = planned("-m tiny --seed 7", names=["lora"])
    first, second = (plan.with_seed(lora, number, LaunchArguments) for number in range(2))
    assert first is lora
    assert (second.folder, second.settings) == ("lora-seed-8", lora.settings | {"seed": 8})
    assert second.configuration.resolved() == lora.configuration.resolved() | {"seed": 8}


def test_a_stop_ends_with_what_there_is_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "-m tiny --eval_split 0.1 -q 16bit"
    (adapter, _), _ = planned(words, names=["adapter", "full"])
    folder = make_run(tmp_path / "runs" / "adapter", speeds=[100], gpus=1, evaluations={0: 3.0, 1: 1.5})
    RunDirectory(folder).write_config(adapter.configuration.resolved())
    for draw in ("draw_bars", "draw_curves"):  # what is drawn, test_report says
        monkeypatch.setattr(report.charts, draw, lambda *args, **kwargs: None)
    flags = ["--methods", "adapter,full,qlora", *words.split(), "--output_dir", str(tmp_path)]
    for status in (75, 130):  # of train: saved, or at once
        monkeypatch.setattr(compare._Child, "run", lambda self, command, status=status: (status, []))
        assert compare.main(flags) == status
        output, aside = capsys.readouterr()
        assert "| evaluation loss after | 1.5000 |" in output
        assert "note: qlora will not be run: QLoRA is LoRA on a quantized base" in aside
        assert output.endswith(f"Stopped. The same command with --output_dir {tmp_path} goes on here.\n")
    assert "1.5000" in (tmp_path / "comparison.md").read_text()


def test_every_signal_reaches_the_run_and_its_status_is_taken() -> None:
    child = compare._Child()
    script = "f() { n=1$n; [ $n = 11 ] && exit 7; }; trap f INT; for i in $(seq 200); do sleep 0.05; done"
    with stop_signals.stop_signals_to(child.take):
        timers = [threading.Timer(s, os.kill, (os.getpid(), signal.SIGINT)) for s in (0.5, 1.0)]
        for timer in timers:
            timer.start()
        assert child.run(["bash", "-c", script]) == (7, [])
        for timer in timers:
            timer.join()


def test_runs_that_are_there_are_compared_through_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(Path(__file__).parent / "old_run" / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    assert compare.main(["runs/old", "--output_dir", "out"]) == 0
    assert (tmp_path / "out/loss-curves.png").exists()
    assert "| steps | 4 |" in capsys.readouterr().out
    for words, message in (
        (["runs/old", "--output_dir", "out"], "holds a comparison already"),
        (["runs/old", "-s", "8"], "--max_steps does nothing where finished runs are compared"),
        (["runs/old", "-s", "8", "--seeds", "2"], "2 things to mend\n  --max_steps does.*\n  --seeds does"),
        (["runs/new"], "runs/new holds no run .*; runs nearby: runs/old$"),
    ):
        with pytest.raises(UserError, match=message):
            compare.main(words)
