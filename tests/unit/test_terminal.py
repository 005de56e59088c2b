"""What a person sees: one voice, whole lines in a file, one bar on a terminal, no chatter of libraries."""

from __future__ import annotations

import io
import logging
import re
import shlex
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM
from transformers.models.falcon.modeling_falcon import FalconLinear

from falcon_qlora.common.quantities import duration
from falcon_qlora.config import parse
from falcon_qlora.models.load import load_model
from falcon_qlora.models.tiny import tiny_path
from falcon_qlora.run_folder.directory import RunDirectory
from falcon_qlora.terminal import console, library_logging, phases
from falcon_qlora.terminal.console import print_answers, print_end, print_start
from falcon_qlora.training import progress, throughput
from falcon_qlora.training.activations import Activations
from falcon_qlora.training.batch_tokens import Cut, Cutter
from falcon_qlora.training.progress import ProgressCallback
from falcon_qlora.training.record import evaluated_when, start_rows
from tests.layouts import attach_lora

SUMMARY = {
    "steps": 120,
    "first_loss": 3.0,
    "final_loss": 1.5,
    "train_seconds": 193.2,
    "tokens_per_second": 12345.6,
    "samples_per_second_512": 24.1,
    "peak_memory_gib": 12.3,
    "best_eval_loss": 1.6,
    "best_step": 100,
}


@pytest.fixture(autouse=True)
def fresh_console() -> Iterator[None]:
    console.console.cache_clear()
    yield
    console.console.cache_clear()


def _run(
    steps: int,
    *,
    log_every: int = 1,
    start: int = 0,
    evaluate_at: tuple[int, ...] = (),
    before: tuple[float, ...] = (),
) -> None:
    log = [{"loss": 1.0}, *({"eval_loss": loss} for loss in before)]
    state = SimpleNamespace(global_step=start, max_steps=steps, log_history=log)
    callback = ProgressCallback(lambda: "")
    callback.on_train_begin(None, state, None)
    for step in range(start + 1, steps + 1):
        state.global_step = step
        callback.on_step_end(None, state, None)
        if step % log_every == 0:
            logs = {"loss": 3.0 / step, "tokens_per_second": 1234.5, "peak_memory_gib": 2.5}
            callback.on_log(None, state, None, logs=logs)
        if step in evaluate_at:
            callback.on_log(None, state, None, logs={"eval_loss": 2.0 / step})
    callback.on_train_end(None, state, None)


def test_what_is_about_to_be_trained_is_told_in_whole_lines_and_what_is_not_known_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = "runs/" + "long [a] " * 25 + "end"
    print_start([("model", "tiny"), ("held out", ""), ("writes to", path)], ["a note"])
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "falcon-qlora"
    assert lines == ["  model      tiny", f"  writes to  {path}", "note: a note", ""]


def test_a_run_tells_what_it_trains_on_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters as PEFT counts them on Hugging Face's model."""
    plain = AutoModelForCausalLM.from_pretrained(tiny_path())
    linears = [name for name, each in plain.transformer.named_modules() if type(each) is FalconLinear]
    targets = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    peft = get_peft_model(plain, LoraConfig(r=4, target_modules=targets))
    trainable, total = peft.get_nb_trainable_parameters()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    data = SimpleNamespace(
        statistics=SimpleNamespace(documents=90, tokens=12_345, target_tokens=2_345),
        notes=["12 dropped"],
        held_out=None,
        total_steps=1_000,
        epochs=1,
        efficiency=0.934,
    )
    cutter = Cutter(cut=Cut(tokens=8192, part=6144, micro_batches=1, why="-b, on the CPU"))
    cutter.activations = Activations(["none"], None, False)
    told = dict(
        start_rows(
            parse(["-m", "tiny", "-b", "3", "--max_length", "2048", "--dataset_name", "sample"]),
            RunDirectory(tmp_path),
            data,
            attach_lora(load_model("tiny", device="cpu"), r=4, alpha=8),
            tracking=["W&B: offline (no key)", "TensorBoard"],
            kernels={},
            cutter=cutter,
            checkpoint="checkpoints/step-7",
        )
    )
    assert told["model"].startswith("tiny · ")
    assert told["model"].endswith(f" · {total - trainable:,} parameters")
    assert told["quantized"].startswith("4bit · NF4, double quantization, computing in float32 · ")
    assert f" · {len(linears)} linear layers · " in told["quantized"]
    assert told["training"].endswith(
        f" · {trainable:,} of {total:,} parameters ({100 * trainable / total:.2f}%)"
    )
    assert told["devices"] == "CPU, 2 processes · 2 machines"
    assert told["data"] == "90 documents · 12,345 tokens, 2,345 of them in the loss · 12 dropped"
    assert told["held out"] == ""
    assert told["steps"] == (
        "1,000 · 1 epoch · 6 × 2,048 tokens a step, 1 micro-batch of 6,144 tokens on each device (-b, on the "
        "CPU) · packed 93% full · going on from step 7"
    )
    assert (told["tracking"], told[""], told["writes to"]) == (
        "W&B: offline (no key)",
        "TensorBoard",
        str(tmp_path),
    )


def test_how_often_held_out_rows_are_evaluated_is_told() -> None:
    often = "--eval_split 0.1 --eval_strategy"
    for words, when in (
        ("--eval_split 0.1", "every 100 steps"),
        (f"{often} steps --eval_steps 7 --eval_on_start", "at the start and every 7 steps"),
        (f"{often} epoch --save_strategy epoch", "after each epoch"),
        (f"{often} steps --eval_steps 3 --eval_delay 30", "every 3 steps, from step 30 on"),
    ):
        assert evaluated_when(parse(words.split()).training, 1_000) == f"evaluated {when}"


def test_the_end_summary_names_the_path_of_everything_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path / ("long ü " * 25))
    adapter, picture = run.adapter, run.loss_picture
    adapter.mkdir(parents=True)
    picture.touch()
    print_end(SUMMARY, run.told_contents(), adapter=str(adapter))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.endswith(f"{adapter}/") for line in lines), "a path stays on one line"
    assert any(str(picture) in line for line in lines)
    assert any("3 → 1.5 · best on held-out data 1.6 at step 100" in line for line in lines)
    assert any("steps 3 min 13 s" in line for line in lines)
    (command,) = (line.partition("try it")[2] for line in lines if "try it" in line)
    assert shlex.split(command)[:4] == ["falcon-qlora", "generate", "--adapter", str(adapter)]


def test_waiting_for_the_network_is_told_with_what_helps(capsys: pytest.CaptureFixture[str]) -> None:
    # 64 GPUs over 25 Gb/s a node: .54 of the speed, and .90 with eight micro-batches a step.
    for share, told in (
        (0.46, "46.0% of each step was waited for the network; 9.6% with eight"),
        (0.04, "4.0%"),
    ):
        print_end(SUMMARY | {"network_share": share}, [], adapter="a")
        output = " ".join(capsys.readouterr().out.split())
        assert told in output
        assert ("eight times" in output) == (share > 0.05)


def test_text_with_brackets_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    print_answers("before training", [("[bold]Say[/bold] [x]", "[red]no[/nothing]")])
    output = capsys.readouterr().out
    assert "[bold]Say[/bold] [x]" in output
    assert "[red]no[/nothing]" in output


@pytest.mark.parametrize("is_main", [True, False])
def test_two_threads_that_print_where_a_run_is_kept_back_do_not_meet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_main: bool
) -> None:
    """The second begins while the first prints, and prints after it has ended."""
    monkeypatch.setattr(console.ranks, "is_main_process", lambda: is_main)
    console.console().quiet = True
    second_is_at_it, first_has_ended = threading.Event(), threading.Event()
    second = threading.Thread(target=console.note_here, args=["second"])
    printable = console.printable

    def told(text: str, **named: Any) -> str:
        if text == "note: first" and second.ident is None:
            second.start()
            assert second_is_at_it.wait(10)
            console.print_plain("of the run")
        if text == "note: second":
            second_is_at_it.set()
            assert first_has_ended.wait(10)
        return printable(text, **named)

    monkeypatch.setattr(console, "printable", told)
    console.note_here("first")
    first_has_ended.set()
    second.join()
    console.print_plain("of the run")
    assert capsys.readouterr().out == "note: first\nnote: second\n"
    assert console.console().quiet


def test_without_a_terminal_a_long_run_prints_some_fifty_lines(capsys: pytest.CaptureFixture[str]) -> None:
    _run(5_000)
    lines = capsys.readouterr().out.splitlines()
    assert 40 <= len(lines) <= 60
    assert lines[0].startswith("step 1/5,000")
    assert lines[-1].startswith("step 5,000/5,000")
    assert "\x1b" not in "".join(lines)


def test_a_short_run_prints_every_logged_step(capsys: pytest.CaptureFixture[str]) -> None:
    _run(20, log_every=5)
    lines = capsys.readouterr().out.splitlines()
    assert [re.match(r"step (\d+)/20", line)[1] for line in lines] == ["5", "10", "15", "20"]
    assert "loss 0.6000  1,234 tokens/s  2.50 GiB" in lines[0]


def test_the_time_left_counts_saves_and_evaluations(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps of 2 s after a first one of 90, an evaluation with a save of 15 s after every tenth."""
    now = 1_000.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now))
    state = SimpleNamespace(global_step=0, max_steps=100, log_history=[])
    callback = ProgressCallback(lambda: "")
    callback.on_train_begin(None, state, None)
    ended = {}
    for step in range(1, 101):
        now += 90 if step == 1 else 2
        state.global_step = step
        callback.on_step_end(None, state, None)
        ended[step] = now
        callback.on_log(None, state, None, logs={"loss": 1.0})
        now += 0 if step % 10 else 15
    lines = capsys.readouterr().out.splitlines()
    told = {int(line.split("/")[0].removeprefix("step ")): line for line in lines}
    assert "left" not in told[1]  # nothing is known yet but what the first step took
    for step in range(31, 100, 10):
        minutes, seconds = re.search(r"(?:(\d+) min )?(\d+) s left$", told[step]).groups(default="0")
        assert 60 * int(minutes) + int(seconds) == pytest.approx(now - ended[step], rel=0.02, abs=2)


@pytest.mark.parametrize("cause", ["start", "saves", "evaluation"])
def test_the_speed_with_saves_and_evaluations_counts_nothing_else(
    cause: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The packing check pauses a first step of 10 s for 30 s, as a save does later."""
    now = 1_000.0
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: now, time=lambda: now))
    meter = throughput.Meter()
    meter.resume()
    now += 10
    meter.pause(cause)
    now += 30
    meter.resume()
    meter.add(tokens=800, positions=800, capacity=800)
    callback, state = (
        ProgressCallback(lambda: ""),
        SimpleNamespace(global_step=0, max_steps=9, log_history=[]),
    )
    callback.on_train_begin(None, state, None)
    callback.on_log(None, state, None, logs=meter.interval())
    callback.on_train_end(None, state, None)
    told = "80 tokens/s" if cause == "start" else "80 tokens/s (20 with saves and evaluations)"
    assert capsys.readouterr().out.endswith(f"  {told}\n")


def test_evaluations_are_printed_and_the_best_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    _run(20, log_every=5, evaluate_at=(10, 20))
    output = capsys.readouterr().out
    assert "step 10: held-out loss 0.2000, the best so far" in output
    assert "step 20: held-out loss 0.1000, the best so far" in output


def test_a_resumed_run_knows_the_best_of_before(capsys: pytest.CaptureFixture[str]) -> None:
    _run(20, start=8, log_every=5, evaluate_at=(10, 20), before=(0.15, 0.3))
    lines = capsys.readouterr().out.splitlines()
    assert "step 10: held-out loss 0.2000" in lines
    assert "step 20: held-out loss 0.1000, the best so far" in lines


@pytest.mark.parametrize("terminal", [False, True])
def test_what_a_long_command_does_is_shown(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with console.progress() as say:
        for block in range(1, 25):
            now += 1
            say(f"block {block} of 24")
    output = capsys.readouterr().out
    if terminal:
        assert output.endswith("\x1b[2K")  # nothing of it stays
    else:
        assert output.splitlines() == [f"block {block} of 24 …" for block in (5, 10, 15, 20)]


def test_a_loss_that_is_not_finite_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    state = SimpleNamespace(global_step=1, max_steps=2, log_history=[])
    callback = ProgressCallback(lambda: "")
    callback.on_train_begin(None, state, None)
    callback.on_log(None, state, None, logs={"loss": float("nan")})
    assert "loss nan" in capsys.readouterr().out


def test_what_takes_long_is_said_and_what_does_not_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with console.patience(0.2) as doing:
        doing("reading [a]")
        doing("tokenizing 5 rows")
        time.sleep(1)
        doing("loading tiny")
    with console.patience(0.2):
        pass
    time.sleep(0.5)
    assert capsys.readouterr().out == "tokenizing 5 rows …\n"


def test_a_terminal_gets_one_bar_that_ends_full(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr(progress, "console", lambda: console)
    _run(30, evaluate_at=(10,))
    shown = screen.getvalue()
    assert "held-out loss" in shown
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("step 30/30")
    assert "100%" in last


def test_a_resumed_run_starts_its_bar_where_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    _run(20, start=15)
    assert capsys.readouterr().out.startswith("step 16/20")


def test_other_processes_print_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    print_start([("model", "tiny")], [])
    _run(5)
    print_end(SUMMARY, [], adapter="a")
    console.note("nothing")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")]
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_libraries_are_silenced_and_the_users_settings_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in library_logging.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    with warnings.catch_warnings():
        library_logging.quiet_libraries()
        assert logging.getLogger("bitsandbytes").level == logging.ERROR
    import os

    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"
    assert os.environ["DATASETS_VERBOSITY"] == "error"
    for name in library_logging.ENVIRONMENT:
        monkeypatch.setenv(name, "x")  # so that the originals come back


@pytest.mark.slow
def test_importing_the_libraries_prints_nothing() -> None:
    code = (
        "from falcon_qlora.terminal.library_logging import quiet_libraries; quiet_libraries()\n"
        "import torch, transformers, trl, peft, bitsandbytes, accelerate, datasets, wandb\n"
        "from falcon_qlora.run_folder import tracking; from falcon_qlora.training import progress"
    )
    result: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == result.stderr == ""


def test_a_phase_is_said_as_it_begins_and_its_seconds_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), phases.phase("rows", "reading rows"):
        said = capsys.readouterr().out
        time.sleep(0.02)
        raise ZeroDivisionError
    assert said == "reading rows …\n"
    assert 0.02 <= phases.seconds["rows"] < 5
    with phases.phase("libraries"):
        pass
    assert capsys.readouterr().out == ""
