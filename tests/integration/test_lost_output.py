"""A run whose output cannot be written, on a full disk or as nobody reads it any more, trains on.

Any other command says that its output is lost; of a stream that was closed before, none makes anything.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.forks import Popen
from tests.integration.runs import ENVIRONMENT, metrics, write_jsonl

TEXTS = [{"text": f"{n} and {n} is {2 * n}."} for n in range(20)]


def start(output: Path, gpus: int, **streams: Any) -> subprocess.Popen[str]:
    rows = write_jsonl(output.parent / "rows.jsonl", TEXTS)
    words = ["-m", "tiny", "--max_length", "32", "-b", "1", "--max_steps", "6", "--save_steps", "3"]
    words += ["--dataset_name", str(rows), "--report_to", "none", "--gpus", str(gpus)]
    return Popen(
        [sys.executable, "-m", "falcon_qlora", "train", *words, "--output_dir", str(output)],
        env=os.environ | ENVIRONMENT,
        text=True,
        **streams,
    )


def assert_whole(output: Path) -> None:
    assert [line["step"] for line in metrics(output)] == [1, 2, 3, 4, 5, 6]
    for name in ("summary.json", "adapter/adapter_model.safetensors", "checkpoints/step-6/manifest.json"):
        assert (output / name).is_file(), name


PRINTS = """
import sys
from falcon_qlora.terminal.output import drop_what_cannot_be_written
drop_what_cannot_be_written()
for stream in (sys.stdout, sys.stderr):
    print("x" * 100_000, file=stream, flush=True)
    print("left in the buffer", file=stream)
open(sys.argv[1], "w").close()
"""


def test_a_process_goes_on_and_ends_well(tmp_path: Path) -> None:
    words = [sys.executable, "-c", PRINTS]
    with open("/dev/full", "w") as full:
        assert subprocess.run([*words, tmp_path / "full"], stdout=full, stderr=full).returncode == 0
    reading, writing = os.pipe()
    os.close(reading)
    assert subprocess.run([*words, tmp_path / "pipe"], stdout=writing, stderr=writing).returncode == 0
    os.close(writing)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "pipe"]
    whole = subprocess.run([*words, tmp_path / "whole"], capture_output=True, text=True)
    assert whole.stdout == whole.stderr == "x" * 100_000 + "\nleft in the buffer\n"


ANSWERS, MEASURES = "generate --prompt Hello --max_new_tokens 2", "eval --dataset_name rows.jsonl"
FULL = "error: standard output: cannot be written (No space left on device)\n"
NO_PROMPT = "error: there is no prompt: standard input is closed. Give --prompt TEXT, or --prompt_file FILE\n"
TELLS = """
import sys
from falcon_qlora.terminal.output import say_loading, shown_as_text, write_answer
with shown_as_text():
    say_loading(aside=True)
    write_answer("an answer")
"""


@pytest.mark.parametrize(
    ("words", "streams", "status", "out", "told"),
    [
        (["-m", "falcon_qlora", "generate"], "<&-", 2, "", NO_PROMPT),
        (["-m", "falcon_qlora", "generate", "--chat"], "<&-", 2, "", NO_PROMPT),
        (["-m", "falcon_qlora", "--version"], ">/dev/full", 1, "", FULL),
        (["-m", "falcon_qlora", "nothing"], "2>/dev/full", 2, "", ""),
        (["-c", TELLS], ">&-", 0, "", "loading libraries …\n"),
        (["-c", TELLS], "2>&-", 0, "an answer", ""),
        (["-c", TELLS], "2>/dev/full", 0, "an answer", ""),
    ],
)
def test_a_command_without_its_streams(
    words: list[str], streams: str, status: int, out: str, told: str
) -> None:
    line = f"{shlex.join([sys.executable, *words])} {streams}"
    ended = subprocess.run(line, shell=True, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (status, out, told)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "streams"),
    [(ANSWERS, "<&- >&-"), (MEASURES, "2>&-"), (ANSWERS, ">/dev/full"), (MEASURES, ">/dev/full")],
)
def test_what_loads_a_model_without_its_streams(tmp_path: Path, command: str, streams: str) -> None:
    write_jsonl(tmp_path / "rows.jsonl", TEXTS)
    line = f"{sys.executable} -m falcon_qlora {command} -m tiny {streams}"
    ended = subprocess.run(
        line, shell=True, cwd=tmp_path, env=os.environ | ENVIRONMENT, capture_output=True, text=True
    )
    full = "full" in streams
    assert (ended.returncode, ended.stderr.endswith(FULL)) == (int(full), full), ended.stderr
    assert bool(ended.stdout) == (streams == "2>&-")


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [1, 2])
def test_output_onto_a_full_disk(tmp_path: Path, gpus: int) -> None:
    with open("/dev/full", "w") as full:
        process = start(tmp_path / "run", gpus, stdout=full, stderr=full)
        assert process.wait(timeout=240) == 0
    assert_whole(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("errors", [subprocess.PIPE, subprocess.STDOUT])
def test_output_into_a_pipe_whose_reader_leaves(tmp_path: Path, gpus: int, errors: int) -> None:
    process = start(tmp_path / "run", gpus, stdout=subprocess.PIPE, stderr=errors)
    assert process.stdout is not None
    while (line := process.stdout.readline().strip()) != "falcon-qlora":
        assert line.endswith("…"), line
    process.stdout.close()
    told = process.stderr.read() if process.stderr is not None else ""
    assert (process.wait(timeout=240), told) == (0, "")
    assert_whole(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-"])
def test_output_that_was_closed_before(tmp_path: Path, closed: str) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", TEXTS)
    words = f"-m tiny --max_length 32 -b 1 --max_steps 6 --save_steps 3 --report_to none --gpus 1 {closed}"
    line = f"{sys.executable} -m falcon_qlora train --dataset_name {rows} --output_dir run {words}"
    result = subprocess.run(line, shell=True, cwd=tmp_path, env=os.environ | ENVIRONMENT, timeout=240)
    assert result.returncode == 0
    assert_whole(tmp_path / "run")


@pytest.mark.slow
def test_a_refusal_that_cannot_be_told_is_still_one(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        words = ["-m", "falcon_qlora", "train", "-m", "no/such/model", "--gpus", "1", "--output_dir", "run"]
        result = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=os.environ | ENVIRONMENT, stderr=full, timeout=240
        )
    assert result.returncode == 2
